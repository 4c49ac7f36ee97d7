"""Time the train step, supervised training and the same step written by hand, in turn.

    python benchmarks/step.py --problems tiny --rounds 3 --seconds 0.1
    python benchmarks/step.py --start convnet,alexnet-16 --output docs/results/step.json

On one device (the first of JAX's default ones: a GPU or TPU where there is one), from the same
batches on it, with the same SGD:

    NAT                    the library's step without re-matching
    NAT, re-matching, ...  with it; where the problems are solved, and by which solver
    by hand                the first again, as anybody would write it: value_and_grad, optax, jit
    softmax on z           supervised, by hand: the same network and a linear layer to classes on z
    supervised             the library's own supervised step: the last layer returns the classes

They take turns, A B C C B A, after a warm-up, each with at most two steps in flight as in training;
a turn ends when all its results are there. A ratio is the median over the rounds of ratios within
a round. A cycle is three epochs, the first of which re-matches, over three epochs of supervised
training. Ratios of processor time are there too: other work on the machine disturbs them less.
What should agree is compared (the first losses of a step and its hand-written form, and of all that
re-match): the exit status is 1 if it does not.

On an accelerator the problems are the convnet and AlexNet with B = 256 in float32 and bfloat16, the
Pallas kernel is among the solvers of an NVIDIA GPU, and the share of the peak is reported: the
operations of the hand-written program before optimisation, over ``--peak`` or the data sheet's
figure for the device (``PEAKS``).

``--torch`` adds PyTorch to the turns: its plain step, and features in evaluation mode by it and by
the library. It runs in an environment of its own, with as many threads as there are cores, and its
features before training have to be the library's. malloc keeps freed pages on both sides.

``--start`` times the first steps of new processes that compile, and of others that find the
compiled programs.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import step_contenders as steps
from measure import number, words
from step_contenders import PROBLEMS, SOLVERS, Contender, Problem

from nat_jax.runtime import host_memory

_ON_CPU = ("convnet", "alexnet-16")
_ON_ACCELERATOR = ("convnet", "alexnet", "alexnet-bf16")
_PACKAGES = ("nat_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")
# Variables that change how fast a step is.
_SETTINGS = ("GLIBC_TUNABLES", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
# Steps that start from one state differ by rounding only.
_AGREE = 1e-4
# Unit features of two libraries with the same weights.
_SAME_FEATURES = 1e-3

# Dense TFLOP/s from the vendors' data sheets: of bfloat16, of what JAX makes of float32 matrices by
# default (TF32 on these GPUs, one pass of bfloat16 on TPUs), and of float32 without tensor cores.
PEAKS = {
    "NVIDIA H200": {"bfloat16": 989.0, "float32": 494.0, "full float32": 67.0},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.0, "float32": 494.0, "full float32": 67.0},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312.0, "float32": 156.0, "full float32": 19.5},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312.0, "float32": 156.0, "full float32": 19.5},
    "NVIDIA L4": {"bfloat16": 121.0, "float32": 60.0, "full float32": 30.3},
    "TPU v4": {"bfloat16": 275.0, "float32": 275.0},
    "TPU v5 lite": {"bfloat16": 197.0, "float32": 197.0},
    "TPU v5p": {"bfloat16": 459.0, "float32": 459.0},
    "TPU v6 lite": {"bfloat16": 918.0, "float32": 918.0},
}


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--problems", type=words, help=f"of {', '.join(PROBLEMS)}")
    parser.add_argument("--solvers", type=words, help=f"of {', '.join(SOLVERS)}")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each that count")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn; at least one step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device")
    parser.add_argument("--torch", metavar="PYTHON", help="Python of an environment with PyTorch")
    parser.add_argument("--start", type=words, default=[], help="problems to time first steps of")
    parser.add_argument("--output", type=Path, help="JSON; the tables go to a .md file next to it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for chosen, known in (
        ({*(arguments.problems or ()), *arguments.start}, PROBLEMS),
        (set(arguments.solvers or ()), SOLVERS),
    ):
        if unknown := sorted(chosen - set(known)):
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if arguments.torch:
        try:
            subprocess.run([arguments.torch, "-c", "import torch, numpy"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            parser.error(f"--torch: it has to be a Python with torch and NumPy ({error})")
    return arguments


def compare(problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Let the contenders take turns at a problem; return results, ratios and what was wrong."""
    batches = steps.make_batches(problem, options.seed)
    running = list(steps.contenders(problem, batches, options.solvers, options.seed))
    with contextlib.ExitStack() as stack:
        wrong, other = [], {}
        if options.torch:
            running.append(steps.features(problem, batches, options.seed))
            theirs, other = stack.enter_context(
                steps.torch_contenders(options.torch, problem, batches, options.seed)
            )
            wrong += compare_features(running[-1], other.pop("features"))
            running += theirs
        each, more = take_turns(problem, running, options.rounds, options.seconds)
        wrong += more
    flops = operations(running[1])
    peak = options.peak or PEAKS.get(jax.devices()[0].device_kind, {}).get(problem.dtype)
    return {
        "problem": dataclasses.asdict(problem),
        "steps_per_turn": each,
        **other,
        "flops_of_a_step": flops,
        "results": [summary(each, problem, flops, peak) for each in running],
        "ratios": list(all_ratios(running)),
        "wrong": wrong,
    }


def take_turns(
    problem: Problem, running: Sequence[Contender], rounds: int, seconds: float
) -> tuple[int, list[str]]:
    """Warm the contenders up and let them take turns; return a turn's steps, and what was wrong."""
    wrong = warm_up(running)
    each = max(1, round(seconds / running[0].turn(1)["seconds"]))
    begin = time.perf_counter()
    for contender in measure.interleave(running, rounds):
        contender.turns.append(contender.turn(each))
    measure.log(f"{problem.name}: {rounds} rounds, {time.perf_counter() - begin:.0f} s")
    for contender in running:
        if not math.isfinite(float(contender.metrics[steps.LOSS])):
            wrong.append(f"{problem.name}, {contender.name}: the loss is not finite")
    return each, wrong


def compare_features(ours: Contender, theirs: Sequence[Sequence[float]]) -> list[str]:
    """Return a complaint if PyTorch does not compute the library's features of a batch."""
    _, found = ours.step(ours.state, next(ours.batches))
    difference = float(jnp.max(jnp.abs(found[steps.Z] - jnp.asarray(theirs))))
    return [f"PyTorch's features differ by {difference}"] * (not difference < _SAME_FEATURES)


def operations(contender: Contender) -> float | None:
    """Return the floating-point operations of a step by hand, None where JAX does not count."""
    costs = contender.lowered().cost_analysis() if contender.lowered else None
    return float(costs["flops"]) if costs and "flops" in costs else None


def warm_up(running: Iterable[Contender]) -> list[str]:
    """Do two steps of each; return the complaints of those that should agree and do not."""
    first: dict[str, float] = {}
    for contender in running:
        begin = time.perf_counter()
        contender.turn(1)
        first[contender.name] = float(contender.metrics[steps.LOSS])
        contender.turn(1)
        measure.log(f"{contender.name}: ready after {time.perf_counter() - begin:.1f} s")
    matched = [name for name in first if name.startswith(f"{steps.PLAIN}, ")]
    pairs = [(steps.PLAIN, steps.BY_HAND), *itertools.pairwise(matched)]
    return [
        f"{one} and {other} differ: {first[one]} and {first[other]}"
        for one, other in pairs
        if {one, other} <= set(first) and not math.isclose(first[one], first[other], abs_tol=_AGREE)
    ]


def summary(
    contender: Contender, problem: Problem, flops: float | None, peak: float | None
) -> dict[str, Any]:
    """Return the medians of a contender's turns; ``peak`` is in TFLOP/s."""
    low, median, high = measure.quartiles([1000 * turn["seconds"] for turn in contender.turns])
    cpu = statistics.median(turn["cpu"] for turn in contender.turns)
    found = {
        "name": contender.name,
        "ms": median,
        "quartiles": [low, high],
        "cpu_ms": measure.short(1000 * cpu),
        "images_per_second": measure.short(1000 * problem.batch / median),
        "steps": contender.done,
        "loss": measure.short(float(contender.metrics[steps.LOSS])),
    }
    if solving := statistics.median(turn["solving"] for turn in contender.turns):
        share = statistics.median(turn["solving"] / turn["seconds"] for turn in contender.turns)
        found |= {"solver_ms": measure.short(1000 * solving), "solver_share": measure.short(share)}
    for name in ("rounds", "moved", "cosine_before", "cosine_after"):
        if f"assign/{name}" in contender.metrics:
            found[name] = measure.short(float(contender.metrics[f"assign/{name}"]))
    if flops and peak and jax.default_backend() != "cpu":
        found["share_of_peak"] = measure.short(flops / (median / 1000) / (peak * 1e12))
        found["peak_tflops"] = peak
    return found


def all_ratios(running: Sequence[Contender]) -> Iterator[dict[str, Any]]:
    """Yield the ratios of steps, and those of cycles of three epochs to supervised ones."""
    named = {contender.name: contender for contender in running}
    plain, supervised = named[steps.PLAIN], named[steps.SUPERVISED]
    for other in (steps.BY_HAND, steps.SOFTMAX, steps.SUPERVISED):
        yield ratio("step", [plain], [named[other]])
    rematching = [one for one in running if one.name.startswith(f"{steps.PLAIN}, ")]
    for one in rematching:
        yield ratio("step", [one], [plain])
        yield ratio("cycle", [one, plain, plain], [supervised] * 3)
    if steps.TORCH in named:
        for one in (plain, *rematching):
            yield ratio("step", [one], [named[steps.TORCH]])
        yield ratio("features", [named[steps.FEATURES]], [named[steps.TORCH_FEATURES]])


def ratio(what: str, some: Sequence[Contender], others: Sequence[Contender]) -> dict[str, Any]:
    """Return the ratio of the summed times of a round: quartiles of wall time, median of CPU."""

    def rounds(clock: str, who: Sequence[Contender]) -> list[float]:
        turns = ([turn[clock] for turn in contender.turns] for contender in who)
        return [sum(each) for each in zip(*turns, strict=True)]

    found = {c: measure.ratios(rounds(c, some), rounds(c, others)) for c in ("seconds", "cpu")}
    names = {"one": some[0].name, "other": others[0].name}
    return {"what": what, **names, "quartiles": found["seconds"], "cpu": found["cpu"][1]}


def first_steps(name: str) -> dict[str, Any]:
    """Do the first step of each kind in this new process; return the seconds of each part."""
    begin = float(os.environ["STARTED"])
    seconds: dict[str, float] = {}

    def lap(what: str) -> None:
        nonlocal begin
        now = time.time()
        seconds[what], begin = round(now - begin, 2), now

    jax.block_until_ready(jnp.zeros(1) + 1)
    lap("imports and JAX")
    problem = PROBLEMS[name]
    batches = steps.make_batches(problem, seed=0)
    lap("data")
    kinds: dict[str, dict[str, Any]] = {
        steps.PLAIN: {},
        f"{steps.PLAIN}, re-matching, device": dict(reassign=True, placement="device"),
        f"{steps.PLAIN}, re-matching, host": dict(reassign=True, placement="host"),
    }
    for kind, settings in kinds.items():
        contender = steps.of_library(problem, batches, kind, seed=0, **settings)
        jax.block_until_ready(contender.state)
        lap(f"state of {kind}")
        contender.turn(1)
        lap(kind)
    return {"problem": problem.name, "seconds": seconds}


def starts(name: str) -> Iterator[dict[str, Any]]:
    """Time two new processes, one after the other, that keep their programs in one empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        for programs in ("compiled", "kept"):
            variables = {"JAX_COMPILATION_CACHE_DIR": folder, "STARTED": str(time.time())}
            variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
            (row,) = measure.run_child("step.py", "--child", name, **variables)
            measure.log(f"first steps of {name}, programs {programs}: {row['seconds']}")
            yield {"programs": programs, **row}


def _name(pair: dict[str, Any]) -> str:
    epochs = "three epochs, " if pair["what"] == "cycle" else ""
    return f"{epochs}{pair['one']} / {pair['other']}"


def _ratio(pair: dict[str, Any]) -> list[str]:
    low, median, high = pair["quartiles"]
    return [_name(pair), f"{median:.3f}", f"{low:.3f} to {high:.3f}", f"{pair['cpu']:.3f}"]


def _result(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"**{number(row['ms'])}**",
        " to ".join(map(number, row["quartiles"])),
        number(row["cpu_ms"]),
        number(row["images_per_second"]),
        number(row["solver_ms"]) if "solver_ms" in row else "",
        f"{100 * row['solver_share']:.2g} %" if "solver_share" in row else "",
        number(row["rounds"]) if "rounds" in row else "",
        f"{100 * row['share_of_peak']:.3g} %" if "share_of_peak" in row else "",
    ]


def tables(results: dict[str, Any]) -> str:
    """Return everything as one page of Markdown."""
    settings = "".join(f"{name}={value} " for name, value in results["settings"].items())
    parts = [
        "# The train step\n",
        f"{measure.described(results, *_PACKAGES)}; {results['device']}; seed {results['seed']}. "
        f"`{settings}{results['command']}`\n",
        f"Median over {results['rounds']} turns, A B C C B A, and quartiles; ratios are taken "
        "within rounds. The steps are described in `benchmarks/step.py`.\n",
        "## Steps\n",
    ]
    head = ["ratio of times", "median", "quartiles", "by CPU time"]
    for group in results["groups"]:
        columns = [group["problem"]["name"], "ms a step", "quartiles", "CPU ms", "images/s"]
        columns += ["host solves, ms", "of the step", "rounds", "of the peak"]
        flops = group["flops_of_a_step"]
        counted = f"{flops / 1e9:,.0f} GFLOP a step; " if flops else ""
        parts += [measure.table(columns, map(_result, group["results"]))]
        parts += [f"{counted}{group['steps_per_turn']} steps a turn.\n"]
        parts += [measure.table(head, map(_ratio, group["ratios"]))]
    seconds = {
        (lap, f"{row['problem']}, programs {row['programs']}"): f"{taken:.2f}"
        for row in results["start"]
        for lap, taken in row["seconds"].items()
    }
    if seconds:
        parts += ["## First steps of a new process\n", measure.pivot("seconds of", seconds)]
    return "\n".join(parts)


def main() -> None:
    """Measure, and show the tables and what was wrong."""
    if host_memory.only_cpu():
        host_memory.keep_freed_pages()  # as the program does
    options = parse()
    if options.child:
        print(json.dumps(first_steps(options.child)))
        return
    # First, while this process has not taken an accelerator for itself.
    start = [row for name in options.start for row in starts(name)]
    platform = jax.default_backend()
    if options.solvers is None:
        options.solvers = [name for name in SOLVERS if name != steps.KERNEL or platform == "gpu"]
    names = options.problems or (_ON_CPU if platform == "cpu" else _ON_ACCELERATOR)
    results: dict[str, Any] = {
        "benchmark": "step",
        "command": " ".join(["python", "benchmarks/step.py", *sys.argv[1:]]),
        "seed": options.seed,
        "rounds": options.rounds,
        **measure.environment(*_PACKAGES),
        "device": f"{platform}: {jax.devices()[0].device_kind}",
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "groups": [compare(PROBLEMS[name], options) for name in names],
        "start": start,
    }
    text = tables(results)
    print(text)
    measure.write(options.output, results, text)
    measure.finish([line for group in results["groups"] for line in group["wrong"]])


if __name__ == "__main__":
    main()
