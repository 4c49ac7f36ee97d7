"""The measuring of ``assign.py``: every solver in turn, as often as time allows."""

import argparse
import dataclasses
import gc
import statistics
import time
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
_ONCE = 1.0  # seconds above which a solver does one problem of a case only


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
        """Time a turn's calls.

        The turns of others leave the caches cold, which would count for as much as the solving of
        small problems: where several calls are timed, one untimed call precedes them.
        """
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


def paid(cost: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the float64[..., n] costs of the matched pairs."""
    return np.take_along_axis(cost.astype(np.float64), columns[..., None], axis=-1)[..., 0]


class Bench:
    """Results so far, and estimates from them of how long the next ones take."""

    def __init__(self, *, budget: float, call: float) -> None:
        self._end, self._call = time.monotonic() + budget, call
        self._seconds: dict[tuple[str, str], tuple[int, float]] = {}  # by solver and family
        self._ready: dict[tuple[str, str], float] = {}  # seconds to compile, by solver and shape
        self.results: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    @property
    def compile_seconds(self) -> list[dict[str, Any]]:
        """Seconds of each solver's first call of a shape, less those of its second."""
        return [
            {"solver": solver, "shape": shape, "seconds": round(seconds, 3)}
            for (solver, shape), seconds in self._ready.items()
        ]

    def run(self, case: Case, solvers: list[Solver]) -> None:
        """Time the solvers on the problems of a case."""
        chosen = [solver for solver in solvers if self._is_quick_enough(solver, case)]
        kept: dict[str, list[dict[str, float]]] = {solver.name: [] for solver in solvers}
        for seed in range(case.seeds):
            if not chosen or time.monotonic() > self._end:
                break
            for name, found in self._one(case, case.make(seed), chosen).items():
                kept[name].append(found)
            chosen = [
                solver
                for solver in chosen
                if not kept[solver.name] or kept[solver.name][0]["wall_ms"] < 1000 * _ONCE
            ]
        done = []
        for solver in solvers:
            found = kept[solver.name]
            row: dict[str, Any] = {"shape": case.shape, "family": case.family}
            row |= {"solver": solver.name, "problems": len(found), "cpu_ms": None, "wall_ms": None}
            if found:
                for key in ("cpu_ms", "wall_ms"):
                    row[key] = measure.short(statistics.geometric_mean(x[key] for x in found))
                row["calls"] = int(sum(x["calls"] for x in found))
                row["gap"] = measure.short(max(x["gap"] for x in found), 2)
                seconds = max(x["wall_ms"] for x in found) / 1000 / (case.count or 1)
                self._seconds[solver.name, case.family] = case.n, seconds
                done.append(f"{solver.name} {row['cpu_ms']:.3g}")
            self.results.append(row)
        measure.log(f"{case.shape} {case.family}: {', '.join(done)} ms")

    def _is_quick_enough(self, solver: Solver, case: Case) -> bool:
        """Estimate whether a call is short enough; time grows with the cube of n."""
        key = solver.name, case.family
        n, seconds = self._seconds.get(key, (case.n, 0.0))
        self._seconds[key] = case.n, seconds * (case.n / n) ** 3  # until it is measured
        return self._seconds[key][1] * (case.count or 1) <= self._call

    def _one(
        self, case: Case, cost: np.ndarray, solvers: list[Solver]
    ) -> dict[str, dict[str, float]]:
        """Check the first result of each solver, then time all in turn."""
        best = optimum(cost)
        entries, gaps = [], {}
        for solver in solvers:
            self._compile(solver, case)
            entry = Entry(solver, solver.prepare(cost))
            gaps[solver.name] = self._check(case, cost, best, solver, entry.call())
            entry.plan()
            entries.append(entry)
        gc.collect()
        gc.disable()
        taken: dict[str, int] = dict.fromkeys(gaps, 0)
        for entry in measure.interleave(entries, max((e.turns for e in entries), default=0)):
            if taken[entry.solver.name] < entry.turns:
                taken[entry.solver.name] += 1
                entry.turn()
        gc.enable()
        return {
            entry.solver.name: {
                "cpu_ms": entry.milliseconds("cpu"),
                "wall_ms": entry.milliseconds("seconds"),
                "calls": len(entry.calls),
                "gap": gaps[entry.solver.name],
            }
            for entry in entries
        }

    def _compile(self, solver: Solver, case: Case) -> None:
        """Call a solver on the easiest problem of a shape, so that later calls only solve."""
        if not solver.compiled or (solver.name, case.shape) in self._ready:
            return
        cost = -np.eye(case.n, dtype=np.float32)
        if case.count:
            cost = np.broadcast_to(cost, (case.count, case.n, case.n)).copy()
        entry = Entry(solver, solver.prepare(cost))
        entry.call()
        entry.call()
        first, second = (call["cpu"] for call in entry.calls)
        self._ready[solver.name, case.shape] = first - second

    def _check(
        self, case: Case, cost: np.ndarray, best: np.ndarray, solver: Solver, result: Any
    ) -> float:
        """Return how far a result is from the optimum, relative to the sum of |costs|."""
        columns = solver.columns(result)
        where = f"{solver.name}, {case.shape} {case.family}"
        mine = solver.name.startswith("auction")
        if not np.array_equal(np.sort(columns, axis=-1), np.sort(best, axis=-1)):
            if mine:
                self.wrong.append(f"{where}: no permutation")
            return float("inf")
        least = paid(cost, best)
        excess = paid(cost, columns).sum(axis=-1) - least.sum(axis=-1)
        scale = np.maximum(np.abs(least).sum(axis=-1), np.finfo(np.float32).tiny)
        gap = float(np.max(excess / scale))
        if mine and gap > _TOLERANCE:
            self.wrong.append(f"{where}: {gap:.2g} above the optimum")
        if mine and np.any(excess > np.asarray(result.gap) + 1e-12 * scale):
            self.wrong.append(f"{where}: the gap it certifies is lower than the true one")
        return gap


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, from small to large."""
    shapes = [(int(n), 0) for n in arguments.sizes]
    shapes += [
        (int(n), int(count)) for count, _, n in (x.partition("x") for x in arguments.batches)
    ]
    every = (*assign_problems.FEATURES, *assign_problems.OTHERS)
    for n, count in sorted(shapes, key=lambda shape: (shape[0] ** 2 * (shape[1] or 1), shape)):
        seeds = 1 if count or n > _LARGE else arguments.seeds
        for family in assign_problems.FEATURES if count else every:
            yield assign_problems.synthetic(family, n, count, seeds)
        if arguments.costs and n <= _LARGE:
            yield from assign_problems.recorded(arguments.costs, n, count, seeds)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return results, compile times, the overhead of a call, and what was wrong."""
    names = arguments.solvers
    for name, package in (absent := assign_solvers.missing(names)).items():
        measure.log(f"without {name}: pip install {package}")
    names = [name for name in names if name not in absent]
    bench = Bench(budget=arguments.budget, call=arguments.call)
    solvers = {batched: assign_solvers.solvers(names, batched=batched) for batched in (False, True)}
    for case in cases(arguments):
        if not arguments.families or case.family in arguments.families:
            bench.run(case, solvers[bool(case.count)])
    return {
        "device": jax.devices()[0].device_kind,
        "skipped": absent,
        "results": bench.results,
        "compile_seconds": bench.compile_seconds,
        "wrong": bench.wrong,
    }
