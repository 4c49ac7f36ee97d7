"""The measuring of ``assign.py``: every solver in turn, on the problems of every case."""

import argparse
import dataclasses
import gc
import statistics
from collections.abc import Iterator
from typing import Any

import assign_problems
import assign_solvers
import jax
import measure
import numpy as np
from assign_problems import Case
from assign_solvers import Solver
from scipy.optimize import linear_sum_assignment

_LARGE = 1024  # one problem of each family above
_TOLERANCE = 1e-6  # of the sum of the optimum's |costs|
# Seconds of the first call, the number of turns that follow, and of calls that are timed in each.
# A slower first call counts itself.
_TURNS = ((0.05, 5, 3), (0.5, 3, 1))


@dataclasses.dataclass
class Entry:
    """The calls of one solver on one problem."""

    solver: Solver
    argument: Any
    turns: int = 0
    repeats: int = 0
    calls: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def call(self) -> Any:
        """Solve once, and keep the seconds."""
        result, seconds = measure.timed(lambda: self.solver.solve(self.argument))
        self.calls.append(seconds)
        return result

    def plan(self) -> None:
        """Decide from the first call how many follow."""
        first = self.calls[0]["seconds"]
        self.turns, self.repeats = next((plan for most, *plan in _TURNS if first < most), (0, 0))
        if self.turns:
            self.calls.clear()

    def turn(self) -> None:
        """Time a turn's calls, if there is one left.

        The turns of others leave the caches cold, which would count for as much as the solving of
        small problems: where several calls are timed, one untimed call precedes them.
        """
        if self.turns:
            self.turns -= 1
            if self.repeats > 1:
                self.solver.solve(self.argument)
            for _ in range(self.repeats):
                self.call()

    def milliseconds(self, clock: str) -> float:
        """Return the median of the calls; ``clock`` is "seconds" or "cpu"."""
        return 1000 * statistics.median(call[clock] for call in self.calls)


def optimum(cost: np.ndarray) -> np.ndarray:
    """Return the optimal columns of the problems of float[..., n, n], in float64.

    SciPy is much faster on near-collapsed features without the columns' means, which change no
    optimum.
    """
    wide = cost.astype(np.float64)
    centred = (wide - wide.mean(axis=-2, keepdims=True)).reshape(-1, *cost.shape[-2:])
    found = [linear_sum_assignment(one)[1] for one in centred]
    return np.asarray(found).reshape(cost.shape[:-1])


def check(cost: np.ndarray, best: np.ndarray, solver: Solver, result: Any) -> tuple[float, str]:
    """Compare a result with the optimal columns.

    Returns:
        How far it is above the optimum, relative to the sum of the optimum's |costs|; and what is
        wrong with it, if it is the auction's.
    """
    columns = solver.columns(result)
    if not np.array_equal(np.sort(columns, axis=-1), np.sort(best, axis=-1)):
        return float("inf"), "no permutation"

    def paid(columns: np.ndarray) -> np.ndarray:
        return np.take_along_axis(cost.astype(np.float64), columns[..., None], axis=-1)[..., 0]

    least = paid(best)
    excess = paid(columns).sum(axis=-1) - least.sum(axis=-1)
    scale = np.maximum(np.abs(least).sum(axis=-1), np.finfo(np.float32).tiny)
    gap = float(np.max(excess / scale))
    if gap > _TOLERANCE:
        return gap, f"{gap:.2g} above the optimum"
    bounds = getattr(result, "gap", None)
    if bounds is not None and np.any(excess > np.asarray(bounds) + 1e-12 * scale):
        return gap, "the gap it certifies is lower than the true one"
    return gap, ""


def compile_seconds(solver: Solver, case: Case) -> float:
    """Return the CPU seconds of the first call of a shape less those of the second one."""
    cost = -np.eye(case.n, dtype=np.float32)
    if case.count:
        cost = np.broadcast_to(cost, (case.count, case.n, case.n)).copy()
    entry = Entry(solver, solver.prepare(cost))
    for _ in range(2):
        entry.call()
    return round(entry.calls[0]["cpu"] - entry.calls[1]["cpu"], 3)


def time_problem(
    cost: np.ndarray, solvers: list[Solver]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """Check the first result of each solver, then time all in turn; return times and faults."""
    best = optimum(cost)
    entries, found, wrong = [], {}, []
    for solver in solvers:
        entry = Entry(solver, solver.prepare(cost))
        gap, fault = check(cost, best, solver, entry.call())
        found[solver.name] = {"gap": gap}
        if fault and solver.name.startswith("auction"):
            wrong.append(f"{solver.name}: {fault}")
        entry.plan()
        entries.append(entry)
    gc.collect()
    gc.disable()
    for entry in measure.interleave(entries, max((entry.turns for entry in entries), default=0)):
        entry.turn()
    gc.enable()
    for entry in entries:
        times = {"cpu_ms": entry.milliseconds("cpu"), "wall_ms": entry.milliseconds("seconds")}
        found[entry.solver.name] |= times | {"calls": len(entry.calls)}
    return found, wrong


def time_case(case: Case, solvers: list[Solver]) -> tuple[list[dict[str, Any]], list[str]]:
    """Time the solvers on the problems of a case; return a row for each, and faults."""
    chosen = [solver for solver in solvers if case.n <= solver.largest]
    results = [time_problem(case.make(seed), chosen) for seed in range(case.seeds)]
    rows = []
    for solver in solvers:
        found = [times[solver.name] for times, _ in results if solver.name in times]
        row: dict[str, Any] = {"shape": case.shape, "family": case.family}
        row |= {"solver": solver.name, "problems": len(found), "cpu_ms": None, "wall_ms": None}
        if found:
            for key in ("cpu_ms", "wall_ms"):
                row[key] = measure.short(statistics.geometric_mean(x[key] for x in found))
            row["calls"] = int(sum(x["calls"] for x in found))
            row["gap"] = measure.short(max(x["gap"] for x in found), 2)
        rows.append(row)
    times = (f"{row['solver']} {row['cpu_ms']:.3g}" for row in rows if row["cpu_ms"])
    measure.log(f"{case.shape} {case.family}: {', '.join(times)} ms")
    return rows, [f"{case.shape} {case.family}, {fault}" for _, wrong in results for fault in wrong]


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, from small to large."""
    shapes = [(int(n), 0) for n in arguments.sizes]
    pairs = (shape.partition("x") for shape in arguments.batches)
    shapes += [(int(n), int(count)) for count, _, n in pairs]
    every = (*assign_problems.FEATURES, *assign_problems.OTHERS)
    for n, count in sorted(shapes, key=lambda shape: (shape[0] ** 2 * (shape[1] or 1), shape)):
        seeds = 1 if count or n > _LARGE else arguments.seeds
        for family in assign_problems.FEATURES if count else every:
            yield assign_problems.synthetic(family, n, count, seeds)
        if arguments.costs and n <= _LARGE:
            yield from assign_problems.recorded(arguments.costs, n, count, seeds)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return results, compile times, and what was wrong."""
    names = arguments.solvers
    for name, package in (absent := assign_solvers.missing(names)).items():
        measure.log(f"without {name}: pip install {package}")
    names = [name for name in names if name not in absent]
    solvers = {batched: assign_solvers.solvers(names, batched=batched) for batched in (False, True)}
    results: list[dict[str, Any]] = []
    wrong: list[str] = []
    compiled: dict[tuple[str, str], float] = {}
    for case in cases(arguments):
        if arguments.families and case.family not in arguments.families:
            continue
        for solver in solvers[bool(case.count)]:
            key = (solver.name, case.shape)
            if solver.compiled and case.n <= solver.largest and key not in compiled:
                compiled[key] = compile_seconds(solver, case)
        rows, faults = time_case(case, solvers[bool(case.count)])
        results += rows
        wrong += faults
    return {
        "device": jax.devices()[0].device_kind,
        "skipped": absent,
        "results": results,
        "compile_seconds": [
            {"solver": solver, "shape": shape, "seconds": seconds}
            for (solver, shape), seconds in compiled.items()
        ],
        "wrong": wrong,
    }
