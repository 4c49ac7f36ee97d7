"""Time the train step beside supervised training and beside the same step written by hand.

    python benchmarks/step.py --problems tiny --rounds 3 --seconds 0.1
    python benchmarks/step.py --output docs/results/step.json

On one device, from the same batches on it, with the same SGD:

    NAT                    the library's step without re-matching
    NAT, re-matching, ...  with it; where the problems are solved, and by which solver
    by hand                the first again, as anybody would write it: value_and_grad, optax, jit
    softmax on z           supervised, by hand: the same network, a linear layer to classes behind z
    supervised             the library's own supervised step: the last layer gives the classes

They take turns, A B C C B A, after a warm-up, each with at most two steps in flight as in training;
a turn ends when all its results are there. A ratio is the median over the rounds of what two took
in the same round. A cycle is three epochs, the first of which re-matches, beside three epochs of
supervised training. Where the processor computes, ratios of its time are given too: other work
on the machine disturbs them less. What should agree is compared (the first losses of a step and
its hand-written form, and of all that re-match): the exit code is 1 if it does not.

The share of the peak counts the operations of the hand-written program before optimisation, over
``--peak`` or the data sheet's figure for the device (``PEAKS`` in step_turns.py).

``--start`` times the first steps of new processes that compile, and of others that find the
compiled programs. ``--hosts`` compares two ways to solve on the hosts of two processes; see
step_hosts.py.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import hardware

_ON_CPU = ("convnet", "alexnet-16")
_ON_ACCELERATOR = ("convnet", "alexnet", "alexnet-bf16")
# Variables that change how fast a step is.
_SETTINGS = ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")


def words(text: str) -> list[str]:
    """Split a list at commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=words, help="of step_contenders.py; by device if none")
    parser.add_argument("--solvers", type=words, help="of step_contenders.py; by device if none")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each that count")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn; at least one step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    parser.add_argument("--start", type=words, default=[], help="problems to time first steps of")
    parser.add_argument("--hosts", action="store_true", help="compare two processes' ways too")
    parser.add_argument("--output", type=Path, help="JSON; the tables go beside it as .md")
    return parser.parse_args()


def environment() -> dict[str, Any]:
    """Return what the numbers depend on."""
    import jax

    import nat_jax

    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {cores} cores of {hardware.cpu()}",
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        "nat_jax": nat_jax.__version__,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        **{package: metadata.version(package) for package in packages},
    }


def main() -> None:
    """Measure, and show the tables, the goals and what was wrong."""
    arguments = parse()
    import jax
    import step_hosts
    import step_start
    import step_tables
    import step_turns
    from step_contenders import KERNEL, PROBLEMS, SOLVERS

    if unknown := sorted({*(arguments.problems or ()), *arguments.start} - set(PROBLEMS)):
        sys.exit(f"unknown problems {', '.join(unknown)}. Known: {', '.join(PROBLEMS)}")
    if unknown := sorted(set(arguments.solvers or ()) - set(SOLVERS)):
        sys.exit(f"unknown solvers {', '.join(unknown)}. Known: {', '.join(SOLVERS)}")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    # First, while this process has not taken an accelerator for itself.
    start = [row for name in arguments.start for row in step_start.measure(name, say)]
    hosts = step_hosts.measure(arguments.rounds, say) if arguments.hosts else []
    by_default = _ON_CPU if jax.default_backend() == "cpu" else _ON_ACCELERATOR
    solvers = arguments.solvers
    if solvers is None:
        solvers = [name for name in SOLVERS if name != KERNEL or jax.default_backend() == "gpu"]
    options = step_turns.Options(
        arguments.rounds, arguments.seconds, arguments.seed, solvers, arguments.peak
    )
    results: dict[str, Any] = {
        "benchmark": "step",
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "seed": arguments.seed,
        "rounds": arguments.rounds,
        **environment(),
        "groups": [
            step_turns.compare(PROBLEMS[name], options, say)
            for name in arguments.problems or by_default
        ],
        "start": start,
        "hosts": hosts,
    }
    text = step_tables.tables(results)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)
    wrong = [line for group in results["groups"] for line in group["wrong"]]
    for line in wrong:
        say(f"WRONG: {line}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
