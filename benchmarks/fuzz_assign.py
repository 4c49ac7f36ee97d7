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
import os
import sys
import time
from collections import Counter
from pathlib import Path

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
from fuzz_cells import Case, Cell, cases_of, order, solve  # noqa: E402

from nat_jax import assign  # noqa: E402

ENDLESS = 300  # seconds that no cell takes
DRAWN = 10  # one case in so many is hypothesis's
BLOCK = 500  # draws between looks at the clock


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
