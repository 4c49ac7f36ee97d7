"""Time the assignment solver and its rivals in turn, and check every total.

    python benchmarks/assign.py --sizes 256 --batches 4x256 --seeds 1
    python benchmarks/assign.py --record cifar10 --source folder:PATH --epochs 3 --costs DIR
    python benchmarks/assign.py --costs DIR --output docs/results/assign.json \
        --plot docs/images/assign.png
    python benchmarks/assign.py --accelerator --output assign_gpu.json

The rivals: SciPy, lapx (lapjvr, lapjvx, and its batch calls), Optax's Hungarian algorithm under
jit, and a pure_callback from jit to lapx. The families of problems are those of
``assign_problems.py``; ``--costs`` adds those of a folder that ``--record`` wrote. Everything runs
in one process on one core with one thread, every solver called as its users call it, after a
warm-up, in turn, quick ones several times in each turn. Reported is the median of the process's CPU
time, which other work on the machine disturbs least; wall time is in the JSON.

``--accelerator`` leaves JAX's default device, threads and cores as they are, adds the Pallas kernel
for NVIDIA GPUs, and reports wall time.

The total of every result is compared with SciPy's optimum in float64. What is more than 1e-6 of
the sum of the optimum's |costs| above it is marked *; if the auction is, or its own bound on that
difference is too low, the exit status is 1.
"""

import argparse
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import measure
from assign_problems import FEATURES, OTHERS, record
from measure import words

Row = dict[str, Any]

SOLVERS = ("auction", "scipy", "lapx", "optax")
PACKAGES = ("nat_jax", "jax", "numpy", "scipy", "lapx", "optax")
RIVALS = ("scipy", "optax", "lapx lapjvr", "lapx lapjvr_batch")
_WRONG = 1e-6


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=words, default=words("64,256,1024,4096"))
    parser.add_argument("--batches", type=words, default=words("32x256,8x1024,128x256"))
    parser.add_argument("--families", type=words, help="comma-separated; all by default")
    parser.add_argument("--solvers", type=words, help=f"of {', '.join(SOLVERS)}, kernel")
    parser.add_argument("--costs", type=Path, help="folder of the problems that --record writes")
    parser.add_argument("--seeds", type=int, default=3, help="problems a family; 1 above n = 1024")
    parser.add_argument("--accelerator", action="store_true", help="use JAX's default device")
    parser.add_argument("--record", metavar="CONFIG", help="train configs/CONFIG.py, save problems")
    parser.add_argument("--source", help="of --record: arrays:PATH or folder:PATH")
    parser.add_argument("--epochs", type=float, help="of --record; the config's by default")
    parser.add_argument(
        "--moment", type=int, default=32, help="of --record: batches of each moment"
    )
    parser.add_argument("--output", type=Path, help="JSON; the tables go to a .md file next to it")
    parser.add_argument("--plot", type=Path, help="PNG")
    arguments = parser.parse_args()
    if arguments.record and not (arguments.source and arguments.costs):
        parser.error("--record needs --source and --costs")
    if arguments.solvers is None:
        arguments.solvers = [*SOLVERS, "kernel"] if arguments.accelerator else list(SOLVERS)
    if unknown := sorted({*arguments.solvers} - {*SOLVERS, "kernel"}):
        parser.error(f"unknown solvers {', '.join(unknown)}; known: {', '.join(SOLVERS)}, kernel")
    return arguments


def use_one_core() -> None:
    """Bind this process to one core and one thread, before any library counts them."""
    measure.use_cores(1)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        " intra_op_parallelism_threads=1"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"


def _times(results: Iterable[Row], shape: str, solver: str, clock: str) -> dict[str, float]:
    """Return the milliseconds of a solver by family."""
    return {
        row["family"]: row[clock]
        for row in results
        if (row["shape"], row["solver"]) == (shape, solver) and row[clock] is not None
    }


def _mean(times: dict[str, float], families: Iterable[str]) -> float | None:
    """Return the geometric mean over the families, None if one is missing."""
    values = [times.get(family) for family in families]
    return None if None in values or not values else statistics.geometric_mean(values)


def targets(results: Sequence[Row], clock: str) -> list[dict[str, Any]]:
    """Return how many times as fast as its rivals the auction is.

    Means are over those of the five main families that both solvers did.
    """
    found = []
    for shape in dict.fromkeys(row["shape"] for row in results):
        mine = _times(results, shape, "auction", clock)
        for rival in RIVALS:
            theirs = _times(results, shape, rival, clock)
            shared = [family for family in FEATURES if family in mine and family in theirs]
            if shared:
                one, other = (_mean(times, shared) for times in (mine, theirs))
                assert one and other
                row = {"what": f"{shape}, geometric mean of {len(shared)} families"}
                row |= {"solver": "auction", "ms": measure.short(one), "rival": rival}
                row |= {"rival_ms": measure.short(other)}
                found.append(row | {"times_as_fast": measure.short(other / one, 3)})
    return found


def _by_family(results: Sequence[Row], shape: str, families: Sequence[str], clock: str) -> str:
    """Return the table of a shape: a line for each solver."""
    cells = {}
    rows = [row for row in results if row["shape"] == shape]
    for row in rows:
        if set(FEATURES) <= set(families):
            mean = _mean(_times(results, shape, row["solver"], clock), FEATURES)
            cells[row["solver"], "mean"] = f"**{measure.number(mean)}**" if mean else "-"
        if row["family"] in families:
            text = "-" if row[clock] is None else measure.number(row[clock])
            cells[row["solver"], row["family"]] = text + "*" * (row.get("gap", 0) > _WRONG)
    return measure.pivot(shape, cells)


def tables(measured: dict[str, Any]) -> str:
    """Return everything as one page of Markdown."""
    results, clock = measured["results"], measured.get("clock", "cpu_ms")
    shapes = list(dict.fromkeys(row["shape"] for row in results))
    there = dict.fromkeys(row["family"] for row in results)
    families = [family for family in (*FEATURES, *OTHERS) if family in there]
    parts = [
        "# Assignment solvers\n",
        f"{measure.described(measured, *PACKAGES)}. Median "
        f"{'CPU' if clock == 'cpu_ms' else 'wall'} milliseconds of one call, float32 costs; the "
        "geometric mean over problems. `mean` is that over sphere, near-collapsed, half-way, "
        "clustered and matched. -: not run, as too slow. *: the total is more than 1e-6 above the "
        "optimum.\n",
        "## Against rivals\n",
        measure.table(
            ["what", "solver", "ms", "rival", "ms", "times as fast"],
            (
                [
                    *(row["what"], row["solver"], measure.number(row["ms"]), row["rival"]),
                    *(measure.number(row["rival_ms"]), f"{row['times_as_fast']:.3g}"),
                ]
                for row in measured["targets"]
            ),
        ),
    ]
    recorded = [family for family in there if family not in families]
    for title, group in (("Families", families), ("Costs of training", recorded)):
        parts += [f"## {title}\n"] if group else []
        for shape in shapes:
            done = {row["family"] for row in results if row["shape"] == shape}
            if used := [family for family in group if family in done]:
                parts.append(_by_family(results, shape, used, clock))
    seconds = {
        (row["solver"], row["shape"]): f"{row['seconds']:.2g}"
        for row in measured["compile_seconds"]
    }
    parts += ["## Seconds to compile\n", measure.pivot("solver", seconds, shapes)]
    return "\n".join(parts)


def plot(results: Sequence[Row], path: Path, clock: str) -> None:
    """Draw time against size, and the families next to each other."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    sizes = sorted({int(row["shape"]) for row in results if "x" not in row["shape"]})
    shape = str(max((n for n in sizes if n <= 1024), default=sizes[-1]))
    there = dict.fromkeys(row["family"] for row in results if row["shape"] == shape)
    families = [f for f in there if f in FEATURES or f in OTHERS or f.endswith((" early", " late"))]
    for solver in dict.fromkeys(row["solver"] for row in results):
        width = 2.6 if solver == "auction" else 1.4
        means = {n: _mean(_times(results, str(n), solver, clock), FEATURES) for n in sizes}
        known = {n: value for n, value in means.items() if value is not None}
        if not known:
            continue
        (line,) = left.plot(*zip(*known.items(), strict=True), "o-", linewidth=width, label=solver)
        times = _times(results, shape, solver, clock)
        points = [(times[f], -i) for i, f in enumerate(families) if f in times]
        right.scatter(*zip(*points, strict=True), color=line.get_color(), s=24 * width)
    unit = "CPU milliseconds, one thread" if clock == "cpu_ms" else "milliseconds"
    left.set(xscale="log", yscale="log", title="Time against size", xlabel="n", ylabel=unit)
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.minorticks_off()
    right.set(xscale="log", title=f"n = {shape}, by kind of cost", xlabel=unit)
    right.set_yticks([-i for i in range(len(families))], [f.replace("_", "-") for f in families])
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Measure, and show the tables and what was wrong; or record problems."""
    arguments = parse()
    if arguments.record:
        record(arguments)
        return
    if not arguments.accelerator:
        use_one_core()
    # Compile times would be those of reading a cache.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    import assign_turns

    clock = "wall_ms" if arguments.accelerator else "cpu_ms"
    measured = assign_turns.run(arguments)
    results = {"benchmark": "assign", **measure.environment(*PACKAGES), "clock": clock, **measured}
    results["targets"] = targets(results["results"], clock)
    text = tables(results)
    print(text)
    measure.write(arguments.output, results, text)
    if arguments.plot:
        plot(results["results"], arguments.plot, clock)
    measure.finish(results["wrong"])


if __name__ == "__main__":
    main()
