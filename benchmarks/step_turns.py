"""How ``benchmarks/step.py`` lets steps take turns, and what the turns say.

Ratios are taken within a round, so that a machine that slows down slows everybody.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import step_contenders as steps
from step_contenders import Contender, Problem

# What is asked: of the step without re-matching, and of a cycle of three epochs, one of which
# re-matches, on an accelerator.
_SOFTMAX, _BY_HAND, _CYCLE = 1.0, 1.02, 1.03
# Steps that start from one state differ by rounding only.
_AGREE = 1e-4

# Dense TFLOP/s from the vendors' data sheets: of bfloat16, and of what JAX makes of float32
# matrices by default (TF32 on these GPUs, one pass of bfloat16 on TPUs).
PEAKS = {
    "NVIDIA H200": {"bfloat16": 989.0, "float32": 494.0},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989.0, "float32": 494.0},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312.0, "float32": 156.0},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312.0, "float32": 156.0},
    "NVIDIA L4": {"bfloat16": 121.0, "float32": 60.0},
    "TPU v4": {"bfloat16": 275.0, "float32": 275.0},
    "TPU v5 lite": {"bfloat16": 197.0, "float32": 197.0},
    "TPU v5p": {"bfloat16": 459.0, "float32": 459.0},
    "TPU v6 lite": {"bfloat16": 918.0, "float32": 918.0},
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        rounds: turns of each contender that count.
        seconds: that a turn should take; at least one step.
        seed: of the data, the network and the targets.
        solvers: keys of ``step_contenders.SOLVERS``.
        peak: TFLOP/s of the device; from ``PEAKS`` if None.
    """

    rounds: int
    seconds: float
    seed: int
    solvers: Sequence[str]
    peak: float | None = None


def compare(problem: Problem, options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Let the contenders take turns at a problem, A B C C B A; return what there is to say."""
    batches = steps.make_batches(problem, options.seed)
    running = list(steps.contenders(problem, batches, options.solvers, options.seed))
    wrong = warm_up(running, say)
    each = max(1, round(options.seconds / running[0].turn(1)["seconds"]))
    begin = time.perf_counter()
    for number in range(options.rounds):
        # There and back, as what a step leaves in caches and free memory is the next one's gain.
        for contender in running if number % 2 == 0 else reversed(running):
            contender.turns.append(contender.turn(each))
    say(f"{problem.name}: {options.rounds} rounds in {time.perf_counter() - begin:.0f} s")
    for contender in running:
        if not math.isfinite(float(contender.metrics[steps.LOSS])):
            wrong.append(f"{problem.name}, {contender.name}: the loss is not finite")
    ratios = list(all_ratios(running))
    flops = flops_of_step(running[1])
    return {
        "problem": dataclasses.asdict(problem),
        "steps_per_turn": each,
        "flops_of_a_step": flops,
        "results": [summary(each, problem, flops, options.peak) for each in running],
        "ratios": ratios,
        "goals": [goal | {"problem": problem.name} for goal in goals(ratios)],
        "wrong": wrong,
    }


def warm_up(running: Iterable[Contender], say: Callable[[str], None]) -> list[str]:
    """Do two steps of each; return the complaints of those that should agree and do not."""
    first: dict[str, float] = {}
    for contender in running:
        begin = time.perf_counter()
        contender.turn(1)
        first[contender.name] = float(contender.metrics[steps.LOSS])
        contender.turn(1)
        say(f"{contender.name}: ready after {time.perf_counter() - begin:.1f} s")
    matched = {name: loss for name, loss in first.items() if name.startswith(f"{steps.PLAIN}, ")}
    pairs = [(steps.PLAIN, steps.BY_HAND), *((next(iter(matched), ""), name) for name in matched)]
    return [
        f"{one} and {other} differ: {first[one]} and {first[other]}"
        for one, other in pairs
        if not math.isclose(first[one], first[other], abs_tol=_AGREE)
    ]


def flops_of_step(by_hand: Contender) -> float | None:
    """Return the floating-point operations of a step, as XLA counts those of the program given it.

    A multiplication and an addition are two. None where the backend does not count.
    """
    costs = by_hand.lowered().cost_analysis() if by_hand.lowered else None
    return float(costs["flops"]) if costs and "flops" in costs else None


def peak_of_device(dtype: str) -> float | None:
    """Return the TFLOP/s of the first device from ``PEAKS``."""
    return PEAKS.get(jax.devices()[0].device_kind, {}).get(dtype)


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return [_short(values[0])] * 3
    return [_short(q) for q in statistics.quantiles(values, n=4, method="inclusive")]


def summary(
    contender: Contender, problem: Problem, flops: float | None, peak: float | None
) -> dict[str, Any]:
    """Return what a contender's turns come to."""
    taken = [turn["seconds"] for turn in contender.turns]
    low, median, high = quartiles([1000 * seconds for seconds in taken])
    found = {
        "name": contender.name,
        "ms": median,
        "quartiles": [low, high],
        "cpu_ms": _short(1000 * statistics.median(turn["cpu"] for turn in contender.turns)),
        "images_per_second": _short(1000 * problem.batch / median),
        "steps": contender.done,
        "loss": _short(float(contender.metrics[steps.LOSS])),
    }
    solving = statistics.median(turn["solving"] for turn in contender.turns)
    if solving:
        share = statistics.median(turn["solving"] / turn["seconds"] for turn in contender.turns)
        found |= {"solver_ms": _short(1000 * solving), "solver_share": _short(share)}
    for name in ("rounds", "moved", "cosine_before", "cosine_after"):
        if f"assign/{name}" in contender.metrics:
            found[name] = _short(float(contender.metrics[f"assign/{name}"]))
    peak = peak or peak_of_device(problem.dtype)
    if flops and peak and jax.default_backend() != "cpu":
        found["share_of_peak"] = _short(flops / (median / 1000) / (peak * 1e12))
        found["peak_tflops"] = peak
    return found


def all_ratios(running: Sequence[Contender]) -> Iterable[dict[str, Any]]:
    """Yield how long steps take beside others, and a cycle of three epochs beside supervised."""
    named = {contender.name: contender for contender in running}
    plain = named[steps.PLAIN]
    for other in (steps.BY_HAND, steps.SOFTMAX, steps.SUPERVISED):
        yield ratio("step", [plain], [named[other]])
    for one in running:
        if one.name.startswith(f"{steps.PLAIN}, "):
            yield ratio("step", [one], [plain])
            yield ratio("cycle", [one, plain, plain], [named[steps.SUPERVISED]] * 3)


def ratio(what: str, some: Sequence[Contender], others: Sequence[Contender]) -> dict[str, Any]:
    """Return how many times as long as the others some take, round by round.

    Returns:
        quartiles: of the ratios of wall time; cpu: the median ratio of processor time, which other
        work on the machine disturbs less.
    """

    def rounds(name: str) -> list[float]:
        sums = [
            [sum(turns) for turns in zip(*([t[name] for t in c.turns] for c in who), strict=True)]
            for who in (some, others)
        ]
        return [mine / theirs for mine, theirs in zip(*sums, strict=True)]

    return {
        "what": what,
        "one": some[0].name,
        "other": others[0].name,
        "quartiles": quartiles(rounds("seconds")),
        "cpu": _short(statistics.median(rounds("cpu"))),
    }


def goals(ratios: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what was asked and whether it was met; the best of the re-matching steps counts."""
    pairs = list(ratios)
    asked = {steps.BY_HAND: _BY_HAND, steps.SOFTMAX: _SOFTMAX, steps.SUPERVISED: _SOFTMAX}
    goals = [
        {**pair, "asked": asked[pair["other"]]}
        for pair in pairs
        if pair["what"] == "step" and pair["other"] in asked
    ]
    cycles = [p for p in pairs if p["what"] == "cycle" and p["other"] == steps.SUPERVISED]
    if cycles:
        best = min(cycles, key=lambda pair: pair["quartiles"][1])
        goals.append({**best, "asked": _CYCLE})
    return [{**goal, "met": goal["quartiles"][1] <= goal["asked"]} for goal in goals]


def _short(value: float) -> float:
    return float(f"{value:.4g}")
