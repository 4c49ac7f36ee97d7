"""Time the assignment solver beside its rivals, on one core, and check every total.

    python benchmarks/assign.py --quick
    python benchmarks/assign.py --costs DIR --output docs/results/assign.json \
        --plot docs/images/assign.png

The rivals: SciPy, lapx (lapjvr, lapjvx, and its batch calls), lapjv, Optax's Hungarian algorithm
under jit, OTT-JAX's Sinkhorn with rounding, and a pure_callback from jit to lapx. The families of
problems are those of ``assign_problems.py``; ``--costs`` adds those that training met, from a
folder that ``nat_costs.py`` wrote. Everything runs in one process on one core with one thread,
every solver called as its users call it (``assign_solvers.py``), after a warm-up, in turn: A B C A
B C, quick ones several times in each turn. Reported is the median of the process's CPU time, which
other work on the machine disturbs least; wall time is in the JSON.

The total of every result is compared with SciPy's optimum in float64. What is more than 1e-6 of
the sum of the optimum's |costs| above it is marked *; if the auction is, or its own bound on that
difference is too low, the exit code is 1. Sinkhorn does not promise the optimum.

A solver that takes more than a second does the first problem of a kind only. "-" means not run:
estimated from smaller problems, one call would have taken more than ``--call``
seconds, or the ``--budget`` was spent.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import hardware


def one_core() -> None:
    """Bind this process to one core, before any library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
        " intra_op_parallelism_threads=1"
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Compile times would be those of reading a cache.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def words(text: str) -> list[str]:
    """Split a list at commas; nothing for an empty one."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=words, default=words("64,256,1024,4096"))
    parser.add_argument("--batches", type=words, default=words("32x256,8x1024,128x256"))
    parser.add_argument("--families", type=words, help="comma-separated; all by default")
    parser.add_argument("--solvers", type=words, help="auction, scipy, lapx, lapjv, optax, ott")
    parser.add_argument("--costs", type=Path, help="folder that nat_costs.py wrote")
    parser.add_argument("--seeds", type=int, default=3, help="problems a family; 1 above n = 1024")
    parser.add_argument("--quick", action="store_true", help="few problems, in under a minute")
    parser.add_argument("--budget", type=float, default=1200, help="seconds for all of it")
    parser.add_argument("--call", type=float, default=40, help="seconds that one call may take")
    parser.add_argument("--output", type=Path, help="JSON; the tables go beside it as .md")
    parser.add_argument("--plot", type=Path, help="PNG")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.batches = ["256"], ["4x256"]
        arguments.seeds, arguments.call = 1, 0.2
    return arguments


def environment(packages: tuple[str, ...]) -> dict[str, str]:
    """Return what the numbers depend on."""
    versions = {}
    for package in ("nat_jax", "jax", "numpy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, one core of {hardware.cpu()}",
        "python": platform.python_version(),
        **versions,
    }


def main() -> None:
    """Measure, and show the tables, the targets and what was wrong."""
    arguments = parse()
    one_core()
    import assign_measure
    import assign_solvers
    import assign_tables

    measured = assign_measure.measure(arguments)
    results = {"benchmark": "assign", **environment(assign_solvers.PACKAGES), **measured}
    results["targets"] = assign_tables.targets(results["results"])
    text = assign_tables.tables(results)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        assign_tables.plot(results["results"], arguments.plot)
    for line in results["wrong"]:
        print(f"WRONG: {line}", file=sys.stderr)
    sys.exit(bool(results["wrong"]))


if __name__ == "__main__":
    main()
