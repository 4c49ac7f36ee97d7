"""The measuring of ``benchmarks/assign.py``: every solver in turn, as often as time allows."""

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import assign_problems
import assign_solvers
import jax
import jax.numpy as jnp
import numpy as np
from assign_problems import Case, Problem
from assign_solvers import Solver
from scipy.optimize import linear_sum_assignment

from nat_jax import assign

_LARGE = 1024  # one problem of each family above
_TOLERANCE = 1e-6  # of the sum of the optimum's |costs|
# Seconds of the first call, how many turns follow, and how many calls are timed in each. A first
# call above the last line counts itself: what it warmed up is nothing beside what it took.
_TURNS = ((0.05, 5, 3), (0.5, 3, 1))
_ONCE = 1.0  # seconds above which a solver does one problem of a case only


@dataclasses.dataclass
class Timed:
    """What one solver did to one problem."""

    solver: Solver
    arguments: tuple
    turns: int = 0
    repeats: int = 0
    cpu: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)

    def call(self) -> Any:
        """Solve once, and note how long it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = self.solver.solve(*self.arguments)
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return result

    def plan(self) -> None:
        """Decide from the first call how many follow."""
        first = self.cpu[0]
        self.turns, self.repeats = next((plan for most, *plan in _TURNS if first < most), (0, 0))
        if self.turns:
            self.cpu.clear()
            self.wall.clear()

    def turn(self) -> None:
        """Time a turn's calls.

        The others' turns have left the caches cold. Where several calls are timed, that would count
        for as much as the solving: one more goes before them.
        """
        if self.repeats > 1:
            self.solver.solve(*self.arguments)
        for _ in range(self.repeats):
            self.call()


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
    """Results so far, and what they say about how long the next ones take."""

    def __init__(self, *, budget: float, call: float) -> None:
        self._end, self._call = time.monotonic() + budget, call
        self._seconds: dict[tuple[str, str], tuple[int, float]] = {}  # by solver and family
        self._ready: dict[tuple[str, str], float] = {}  # seconds to compile, by solver and shape
        self.results: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    @property
    def compile_seconds(self) -> list[dict[str, Any]]:
        """The seconds that each solver's first call of a shape took, less those of its second."""
        return [
            {"solver": solver, "shape": shape, "seconds": round(seconds, 3)}
            for (solver, shape), seconds in self._ready.items()
        ]

    def run(self, case: Case, solvers: list[Solver]) -> None:
        """Time the solvers on the problems of a case."""
        begin = time.monotonic()
        chosen = [solver for solver in solvers if self._is_quick_enough(solver, case)]
        kept: dict[str, list[dict[str, float]]] = {solver.name: [] for solver in solvers}
        for seed in range(case.seeds):
            if not chosen or time.monotonic() > self._end:
                break
            for name, found in self._one(case, case.make(seed), chosen).items():
                kept[name].append(found)
            slow = {
                name for name, done in kept.items() if done and done[0]["cpu_ms"] > 1000 * _ONCE
            }
            chosen = [solver for solver in chosen if solver.name not in slow]
        said = []
        for solver in solvers:
            found = kept[solver.name]
            if solver.start and not found:  # these problems have no such start
                continue
            row: dict[str, Any] = {"shape": case.shape, "family": case.family}
            row |= {"solver": solver.name, "problems": len(found), "cpu_ms": None, "wall_ms": None}
            if found:
                for key in ("cpu_ms", "wall_ms"):
                    row[key] = float(f"{statistics.geometric_mean(x[key] for x in found):.4g}")
                row["calls"] = int(sum(x["calls"] for x in found))
                row["gap"] = float(f"{max(x['gap'] for x in found):.2g}")
                seconds = max(x["cpu_ms"] for x in found) / 1000 / (case.count or 1)
                self._seconds[solver.name, case.family] = case.n, seconds
                said.append(f"{solver.name} {row['cpu_ms']:.3g}")
            self.results.append(row)
        seconds = time.monotonic() - begin
        print(
            f"{case.shape} {case.family}: {', '.join(said)} ms ({seconds:.0f} s)", file=sys.stderr
        )

    def _is_quick_enough(self, solver: Solver, case: Case) -> bool:
        """Say whether a call takes little enough, if time grows with the cube of n."""
        key = solver.name, case.family
        n, seconds = self._seconds.get(key, (case.n, 0.0))
        self._seconds[key] = case.n, seconds * (case.n / n) ** 3  # until it is measured
        return self._seconds[key][1] * (case.count or 1) <= self._call

    def _one(
        self, case: Case, problem: Problem, solvers: list[Solver]
    ) -> dict[str, dict[str, float]]:
        best = optimum(problem.cost)
        entries, gaps = [], {}
        for solver in solvers:
            starts = (_start(problem, solver.start),) if solver.start else ()
            if any(start is None for start in starts):
                continue
            self._compile(solver, case)
            entry = Timed(solver, solver.prepare(problem.cost, *starts))
            result = entry.call()
            gaps[solver.name] = self._check(case, problem, best, solver, result)
            entry.plan()
            entries.append(entry)
        gc.collect()
        gc.disable()
        for turn in range(max((entry.turns for entry in entries), default=0)):
            for entry in entries:
                if turn < entry.turns:
                    entry.turn()
        gc.enable()
        return {
            entry.solver.name: {
                "cpu_ms": 1000 * statistics.median(entry.cpu),
                "wall_ms": 1000 * statistics.median(entry.wall),
                "calls": len(entry.cpu),
                "gap": gaps[entry.solver.name],
            }
            for entry in entries
        }

    def _compile(self, solver: Solver, case: Case) -> None:
        """Call a solver once on the easiest problem of a shape, so that later calls only solve."""
        if not solver.compiled or (solver.name, case.shape) in self._ready:
            return
        cost = np.broadcast_to(-np.eye(case.n, dtype=np.float32), _dimensions(case)).copy()
        prices = (np.zeros(cost.shape[:-1], np.float32),) if solver.start else ()
        entry = Timed(solver, solver.prepare(cost, *prices))
        entry.call()
        entry.call()
        self._ready[solver.name, case.shape] = entry.cpu[0] - entry.cpu[1]

    def _check(
        self, case: Case, problem: Problem, best: np.ndarray, solver: Solver, result: Any
    ) -> float:
        """Return how far a result is from the optimum, relative to the sum of |costs|."""
        columns = solver.columns(result)
        where = f"{solver.name}, {case.shape} {case.family}"
        mine = solver.name.startswith("auction")
        if not np.array_equal(np.sort(columns, axis=-1), np.sort(best, axis=-1)):
            if mine:
                self.wrong.append(f"{where}: no permutation")
            return float("inf")
        least = paid(problem.cost, best)
        excess = paid(problem.cost, columns).sum(axis=-1) - least.sum(axis=-1)
        scale = np.maximum(np.abs(least).sum(axis=-1), np.finfo(np.float32).tiny)
        gap = float(np.max(excess / scale))
        if mine and gap > _TOLERANCE:
            self.wrong.append(f"{where}: {gap:.2g} above the optimum")
        if mine and np.any(excess > np.asarray(result.gap) + 1e-12 * scale):
            self.wrong.append(f"{where}: the gap it certifies is lower than the true one")
        return gap


def _dimensions(case: Case) -> tuple[int, ...]:
    return (case.count, case.n, case.n) if case.count else (case.n, case.n)


def _start(problem: Problem, name: str) -> np.ndarray | None:
    """Return the prices of a warm start, None where the problem has no such start."""
    if name != "similar":
        return problem.starts.get(name)
    return None if problem.similar is None else np.asarray(assign.auction(problem.similar).prices)


def call_overhead() -> dict[str, float]:
    """Return the CPU ms of the auction at n = 256 and n = 2, by how it is called."""
    cost = assign_problems.synthetic("sphere", 256, 0, 1).make(0).cost
    jitted = jax.jit(assign.auction)
    ways: dict[str, tuple[Callable, Any]] = {
        "n=256, device array": (assign.auction, jnp.asarray(cost)),
        "n=256, device array, inside the user's jit": (jitted, jnp.asarray(cost)),
        "n=256, NumPy float32": (assign.auction, cost),
        "n=256, NumPy float64": (assign.auction, cost.astype(np.float64)),
        "n=2, device array": (assign.auction, jnp.eye(2)),
        "n=2, device array, inside the user's jit": (jitted, jnp.eye(2)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(32):
        for name, (function, argument) in ways.items():
            begin = time.process_time()
            jax.block_until_ready(function(argument))
            if turn:
                taken[name].append(1000 * (time.process_time() - begin))
    return {name: float(f"{statistics.median(ms):.3g}") for name, ms in taken.items()}


def cases(arguments: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, from small to large."""
    shapes = [(int(n), 0) for n in arguments.sizes]
    shapes += [
        (int(n), int(count)) for count, _, n in (x.partition("x") for x in arguments.batches)
    ]
    every = (*assign_problems.FEATURES, *assign_problems.OTHERS)
    for n, count in sorted(shapes, key=lambda shape: (shape[0] ** 2 * (shape[1] or 1), shape)):
        seeds = 1 if count or n > _LARGE else arguments.seeds
        for family in every if not count else assign_problems.FEATURES:
            yield assign_problems.synthetic(family, n, count, seeds)
        if arguments.costs and n <= _LARGE:
            yield from assign_problems.from_training(arguments.costs, n, count, seeds)


def _wanted(found: Iterable[Case], families: list[str] | None) -> Iterator[Case]:
    return (case for case in found if not families or case.family in families)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return results, compile times, the overhead of a call, and what was wrong."""
    names = arguments.solvers or list(assign_solvers.NAMES)
    for name, package in (absent := assign_solvers.missing(names)).items():
        print(f"without {name}: pip install {package}", file=sys.stderr)
    names = [name for name in names if name not in absent]
    bench = Bench(budget=arguments.budget, call=arguments.call)
    solvers = {batched: assign_solvers.solvers(names, batched=batched) for batched in (False, True)}
    for case in _wanted(cases(arguments), arguments.families):
        bench.run(case, solvers[bool(case.count)])
    return {
        "skipped": absent,
        "results": bench.results,
        "compile_seconds": bench.compile_seconds,
        "call_overhead_ms": call_overhead() if "auction" in names else {},
        "wrong": bench.wrong,
    }
