"""Solve very many assignment problems of all kinds, in all ways, and check every result.

    python benchmarks/fuzz_assign.py --cases 100000 --output docs/results/fuzz_assign.json
    python benchmarks/fuzz_assign.py --only 'auction/3x7/float32/vmap/maximize+prices/uniform/17'

A cell is a solver, a shape, a type, a way of calling (eager, jit, vmap, batched, scan, sharded over
8 simulated devices) and options; it compiles once, and problems of every kind go through it. First
come cells in which every pair of these occurs, then others at random; one case in ten is a
problem that hypothesis draws. The problems and the checks are those of ``tests/assign``: a valid
matching, an honest status, a total within ``gap`` of the float64 optimum (in exact arithmetic), the
promised accuracy, prices that prove it, and integers exact. A quarter of each cell's problems also
come twice and with their rows and columns in another order.

A case that fails is printed as an argument of ``--only``; after a hang the last cell printed is the
one that hung. ``--only`` also takes a cell, and then solves and names its problems one by one.
"""

import argparse
import faulthandler
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = 8
# Before jax starts: it reads these once. Fewer threads than devices may deadlock.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = str(2 * DEVICES)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "assign"))

import hypothesis  # noqa: E402
import jax  # noqa: E402
import measure  # noqa: E402
import numpy as np  # noqa: E402
import problems  # noqa: E402
from draws import SHARES, Draw, calls, faults_of  # noqa: E402

from nat_jax import assign  # noqa: E402

ENDLESS = 300  # seconds that no cell takes
DRAWN = 10  # one case in so many is hypothesis's
BLOCK = 500  # draws between looks at the clock


SHAPES = (
    *((n, n) for n in (0, 1, 2, 3, 7, 16, 64, 257)),
    *((0, 3), (3, 0), (1, 7), (7, 1), (3, 7), (7, 3), (16, 64), (64, 16), (64, 257), (257, 64)),
)
OPTIONS = {
    "auction": (
        *("plain", "maximize", "eps=0.01", "eps=3e38", "max_rounds=3"),
        *("prices", "maximize+prices+max_rounds=1"),
    ),
    "scipy": ("plain", "maximize"),
    "hungarian": ("plain", "maximize"),
}


class Cell(NamedTuple):
    """One program."""

    solver: str
    shape: tuple[int, int]
    dtype: str
    way: str
    options: str

    def __str__(self) -> str:
        n, m = self.shape
        return f"{self.solver}/{n}x{m}/{self.dtype}/{self.way}/{self.options}"

    @classmethod
    def of(cls, text: str) -> "Cell":
        """Return the cell of that name."""
        solver, shape, dtype, way, options = text.split("/")
        n, m = map(int, shape.split("x"))
        return cls(solver, (n, m), dtype, way, options)

    @property
    def named(self) -> dict[str, Any]:
        """The options by name; that of prices is true."""
        pairs = (word.partition("=") for word in self.options.split("+") if word != "plain")
        values = {"eps": float, "max_rounds": int}
        return {name: values[name](value) if value else True for name, _, value in pairs}

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of problems that fit the type."""
        integers = problems.DTYPES[self.dtype].kind in "biu"
        return problems.FINITE if integers else tuple(problems.KINDS)

    def size(self) -> int:
        """Return the number of problems: small ones, which are solved faster, are more."""
        area = self.shape[0] * self.shape[1]
        sizes = ((0, 16), (49, 640), (256, 448), (64 * 64, 112))
        return next((number for most, number in sizes if area <= most), 32)


class Case(NamedTuple):
    """One problem of a cell; the same whenever it is made."""

    cell: Cell
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.cell}/{self.kind}/{self.seed}"

    def make(self) -> np.ndarray:
        """Return the cost, with the prices as one more row if the solver is given any."""
        cell, (n, m) = self.cell, self.cell.shape
        to = problems.DTYPES[cell.dtype]
        if n * m == 0:
            cost = np.zeros((n, m), to)
        else:
            cost = problems.make(self.kind, n, m, self.seed, cell.dtype)
        if "maximize" in cell.named and to.kind not in "biu":
            cost = -cost  # so that the same pairs are forbidden
        if "prices" not in cell.named:
            return cost
        return np.concatenate([cost, self._prices(cost).astype(to)[None]])

    def _prices(self, cost: np.ndarray) -> np.ndarray:
        """Return prices that help, or mislead, or are none."""
        rng = np.random.default_rng([self.seed, len(str(self))])
        values = cost.astype(np.float64)
        finite = np.where(np.isfinite(values), values, 0)
        size = np.abs(finite).max(initial=0)
        helpful = -finite.mean(axis=0) if len(finite) else np.zeros(cost.shape[1])
        noise = rng.standard_normal(cost.shape[1])
        special = rng.choice([0, 1e30, -3e38, np.inf, np.nan, 2**24 + 1], cost.shape[1])
        with np.errstate(all="ignore"):
            choices = (helpful, helpful + 0.1 * size * noise, 100 * size * noise, special)
            prices = choices[rng.integers(len(choices))]
            dtype = problems.DTYPES[self.cell.dtype]
            if dtype.kind in "biu":
                high = 1 if dtype == np.bool_ else np.iinfo(dtype).max
                low = 0 if dtype == np.bool_ else np.iinfo(dtype).min
                prices = np.clip(np.nan_to_num(prices), low, high)
            return prices.astype(dtype)


def pairs_of(cell: Cell) -> set[tuple]:
    """Return the pairs of values that a cell covers."""
    return set(itertools.combinations(enumerate(cell), 2))


def order(seed: int) -> Iterator[tuple[Cell, bool]]:
    """Yield the cells, and whether each is one of those that cover all pairs.

    Of a hundred at random always that one comes next that has most pairs not yet seen.
    """
    rng = np.random.default_rng(seed)
    cells = [
        Cell(solver, *rest)
        for solver in assign.SOLVERS
        for rest in itertools.product(SHAPES, problems.DTYPES, problems.WAYS, OPTIONS[solver])
    ]
    cells = [cells[k] for k in rng.permutation(len(cells))]
    missing = set().union(*map(pairs_of, cells))
    rest = list(cells)
    while missing:
        some = rng.choice(len(rest), 100, replace=False)
        best = max(some, key=lambda k: len(pairs_of(rest[k]) & missing))
        if not pairs_of(rest[best]) & missing:
            best = next(k for k, cell in enumerate(rest) if pairs_of(cell) & missing)
        missing -= pairs_of(rest[best])
        yield rest.pop(best), True
    # Small shapes first: many cases for each program.
    while rest:
        some = rng.choice(len(rest), 3)
        best = max(some, key=lambda k: rest[k].size())
        yield rest.pop(best), False


def solve(cell: Cell, given: np.ndarray) -> assign.Assignment:
    """Solve [k, n, m] of costs, or [k, n + 1, m] of costs and prices, in a cell's way."""
    options = cell.named
    priced = options.pop("prices", False)

    def call(x: Any) -> assign.Assignment:
        if not priced:
            return assign.solve(x, solver=cell.solver, **options)
        prices = x[..., -1, :].astype(np.float32)
        return assign.solve(x[..., :-1, :], solver=cell.solver, prices=prices, **options)

    return problems.run(cell.way, call, given)


def cases_of(cell: Cell, seed: int) -> list[Case]:
    """Return a cell's problems: its kinds in turn."""
    kinds = cell.kinds if 0 not in cell.shape else ("nothing",)
    return [
        Case(cell, kinds[k % len(kinds)], 1000 * seed + k // len(kinds)) for k in range(cell.size())
    ]


class Record:
    """Counts, faults and the largest gaps so far."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("solver", "shape", "dtype", "way", "options", "kind")
        }
        self.cases = self.cells = 0
        self.failures: list[dict[str, str]] = []
        self.coarsest = dict.fromkeys(assign.SOLVERS, (0.0, ""))

    def count(self, case: Case) -> None:
        """Count a case under each of its properties."""
        n, m = case.cell.shape
        cell = case.cell._replace(shape=f"{n}x{m}")._asdict()
        for name, value in {**cell, "kind": case.kind}.items():
            self.counts[name][value] += 1
        self.cases += 1

    def fail(self, only: str, found: list[problems.Fault]) -> None:
        """Note and print what is wrong with a case."""
        for fault in found:
            self.failures.append({"only": only, "check": fault.check, "message": fault.message})
            print(f"FAILED {fault.check}: {fault.message[:500]}\n    --only '{only}'", flush=True)

    def measure(self, case: Case, cost: np.ndarray, result: assign.Assignment) -> None:
        """Keep the result of each solver whose gap is largest."""
        gap = float(result.gap)
        if not 0 < gap < np.inf or int(result.status) != assign.Status.OPTIMAL_WITHIN_EPS:
            return
        finite = cost[np.isfinite(cost)].astype(np.float64)
        most = min(cost.shape) * float(np.ptp(finite))
        # Below the smallest normal numbers nothing is promised; larger eps and prices cost more.
        if most > 1e-30 and case.cell.options in ("plain", "maximize"):
            solver = case.cell.solver
            self.coarsest[solver] = max(self.coarsest[solver], (gap / most, str(case)))


def watch(seconds: float, only: str) -> None:
    """End the process, even in compiled code, unless the next call comes within so many seconds."""
    print(only, end=" ", flush=True)
    faulthandler.dump_traceback_later(seconds, exit=True)


def faults(case: Case, given: np.ndarray, result: assign.Assignment) -> list[problems.Fault]:
    """Return all that is wrong with one result."""
    options = case.cell.named
    return problems.faults(
        given[: case.cell.shape[0]],
        result,
        maximize=options.get("maximize", False),
        share=SHARES[case.cell.solver],
        eps=options.get("eps", 0.0),
        max_rounds=options.get("max_rounds"),
        warm=options.get("prices", False),
    )


def go_through(cell: Cell, cases: list[Case], record: Record) -> None:
    """Solve these problems of a cell in one go, a quarter of them in three forms, and check all."""
    rng = np.random.default_rng(len(cases))
    n, m = cell.shape
    once = [case.make() for case in cases]
    few = -(-len(cases) // 4)
    rows = np.arange(len(once[0]))
    rows[:n] = rng.permutation(n)
    others = [given[rows][:, rng.permutation(m)] for given in once[:few]]
    results = solve(cell, np.stack([*once, *once[:few], *others]))
    for k, case in enumerate(cases):
        result = jax.tree.map(lambda leaf, k=k: leaf[k], results)
        found = faults(case, once[k], result)
        if k < few:
            again, other = (
                jax.tree.map(lambda leaf, k=k, j=j: leaf[len(cases) + j * few + k], results)
                for j in (0, 1)
            )
            found += problems.differences(result, again)
            found += faults(case, others[k], other)
            if not found and cell.shape[0] * cell.shape[1]:
                found += problems.value_changes(once[k][:n], result, others[k][:n], other)
        if cell.options in ("plain", "maximize"):
            maximize = cell.options == "maximize"
            found += problems.disagreement(case.kind, once[k], result, maximize=maximize)
        record.count(case)
        if found:
            record.fail(str(case), found)
        else:
            record.measure(case, once[k][:n], result)


def draw(number: int, seed: int, record: Record) -> None:
    """Let hypothesis draw that many problems; note the smallest that fails, if any does."""
    failed: list[tuple[Draw, list[problems.Fault]]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=number,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        verbosity=hypothesis.Verbosity.quiet,
    )
    @hypothesis.given(calls())
    def problem(drawn: Draw) -> None:
        found = faults_of(drawn)
        if found:
            failed.append((drawn, found))
            raise AssertionError
        record.counts["kind"]["drawn"] += 1
        record.cases += 1

    try:
        problem()
    except AssertionError:
        drawn, found = failed[-1]  # hypothesis ends with the simplest
        record.fail(f"{drawn.solver} {drawn.options} {drawn.cost.tolist()}", found)


def replay(only: str, record: Record, endless: float) -> None:
    """Solve one case, or every case of a cell by itself."""
    *cell_words, kind, seed = only.split("/") if only.count("/") == 6 else (only, "", "0")
    cell = Cell.of("/".join(cell_words))
    every = [Case(cell, kind, int(seed))] if kind else cases_of(cell, 0)
    for case in every:
        watch(endless, f"{case}\n")
        go_through(cell, [case] * 2 * DEVICES, record)  # the way sharded wants a multiple


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600, help="start nothing after these")
    parser.add_argument("--endless", type=float, default=ENDLESS, help="seconds that are a hang")
    parser.add_argument("--only", help="a case or a cell, as failures print them")
    parser.add_argument("--output", type=Path, help="JSON")
    return parser.parse_args()


def fuzz(arguments: argparse.Namespace, record: Record) -> bool:
    """Run cells and draws until there are cases enough; return whether all pairs were covered."""
    begin = time.monotonic()

    def over() -> bool:
        return time.monotonic() - begin > arguments.seconds

    covered, drawn = False, 0
    for cell, for_pairs in order(arguments.seed):
        covered = not for_pairs
        if over() or record.cases + arguments.cases // DRAWN >= arguments.cases:
            break
        start, before = time.monotonic(), len(record.failures)
        watch(arguments.endless, str(cell))
        try:
            go_through(cell, cases_of(cell, arguments.seed), record)
        except Exception as error:
            record.fail(str(cell), [problems.Fault("raised", repr(error))])
        record.cells += 1
        seconds, bad = time.monotonic() - start, len(record.failures) - before
        print(f"{record.cells:4} {record.cases:7} {seconds:6.1f} s" + f" {bad} FAULTS" * bool(bad))
    while record.cases < arguments.cases and not over():
        watch(arguments.endless, f"draws {drawn} of seed {arguments.seed}\n")
        number = min(BLOCK, arguments.cases - record.cases)
        before = record.cases
        draw(number, arguments.seed * 1_000_000 + drawn, record)
        drawn += 1
        if record.cases == before:
            break
    return covered


def main() -> None:
    """Fuzz, or replay, and show what was found."""
    arguments = parse()
    record = Record()
    begin = time.monotonic()
    covered = None
    if arguments.only:
        replay(arguments.only, record, arguments.endless)
    else:
        covered = fuzz(arguments, record)
    faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - begin

    for name, counts in record.counts.items():
        print(f"{name}: " + ", ".join(f"{value} {number}" for value, number in counts.items()))
    for solver, (share, case) in record.coarsest.items():
        print(f"largest gap of {solver}: {share:.3g} of S, {case}")
    print(
        f"{record.cases} cases of {record.cells} programs in {seconds:.0f} s, "
        f"{'all' if covered else 'not all'} pairs covered: {len(record.failures)} faults"
    )
    result = {
        "benchmark": "fuzz_assign",
        **measure.environment("jax", "jaxlib", "numpy", "scipy", "optax"),
        "seed": arguments.seed,
        "cases": record.cases,
        "programs": record.cells,
        "all_pairs": covered,
        "seconds": round(seconds),
        "faults": record.failures,
        "counts": record.counts,
        "largest_gap": {
            solver: {"share_of_S": share, "only": case}
            for solver, (share, case) in record.coarsest.items()
        },
    }
    measure.write(arguments.output, result)
    measure.finish([fault["message"] for fault in record.failures])


if __name__ == "__main__":
    main()
