"""The paper's claims, and the rule by which runs agree with them, differ, or say nothing.

A claim compares accuracies. Two arms are compared seed by seed: networks of the same seed see the
same images in the same order. The noise of a mean difference is the half-width of its 95 % interval
by Student's t over the seeds; of one seed it is what the test images alone leave open.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

HOLDS, NOISE, FAILS, NOTHING = "trend holds", "within noise", "does not hold", "no result"

TRAINED, UNTRAINED = "trained", "untrained"

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Arm:
    """What a claim compares: the accuracies of an experiment's networks.

    Attributes:
        name: in tables.
        experiment: a file of configs/paper.
        value: of a sweep; "" of an experiment that is none.
        network: "trained", or "untrained" for the same network before training.
    """

    name: str
    experiment: str
    value: str = ""
    network: str = TRAINED


@dataclasses.dataclass(frozen=True)
class Claim:
    """What the paper says of two or more arms.

    Attributes:
        place: where in the paper.
        says: the claim, in one sentence.
        paper: the paper's numbers, in words.
        left: the arm that the claim is about.
        rights: those that it is compared with.
        probe: "own", the networks' own decisions, or a probe of the last convolution.
        rule: "above": left is more accurate than every right; "close": it is within ``margin``;
            "settles": it rises along its training and then flattens.
        margin: in [0, 1], for "close".
    """

    place: str
    says: str
    paper: str
    left: Arm
    rights: tuple[Arm, ...]
    probe: str
    rule: Literal["above", "close", "settles"] = "above"
    margin: float = 0.0


class Difference(NamedTuple):
    """A mean difference of accuracies and its noise, both in [-1, 1]; verdict of its rule."""

    mean: float
    noise: float
    seeds: tuple[int, ...]
    verdict: str


def claims(periods: Sequence[str], ks: Sequence[str]) -> tuple[Claim, ...]:
    """Return the paper's claims.

    Args:
        periods: values of fig2_period, "0" being never.
        ks: values of discrete_targets.
    """
    nat = Arm("NAT", "table3_imagenet")
    soft, square = Arm("softmax", "table1_softmax"), Arm("square", "table1_square")
    clean, high = Arm("clean", "table2_clean"), Arm("high-pass", "table2_highpass")
    sobel = Arm("Sobel", "table2_sobel")
    three = Arm("every 3", "fig2_period", "3")
    others = [p for p in periods if p not in ("3", "0")]
    return (
        Claim(
            "table 3",
            "NAT's last convolution is far better than an untrained one.",
            "36.0 against 12.0",
            nat,
            (Arm("untrained", "table3_imagenet", network=UNTRAINED),),
            "mlp_probe",
        ),
        Claim(
            "text",
            "Noise is a better target than k one-hot rows.",
            "33.5 against 19 for the best k",
            nat,
            tuple(Arm(f"k = {k}", "discrete_targets", k) for k in ks),
            "mlp_probe",
        ),
        Claim(
            "figure 2, left",
            "Re-matching every 3 epochs is best.",
            "a figure; every period is above 30",
            three,
            tuple(Arm(f"every {p}", "fig2_period", p) for p in others),
            "mlp_probe",
        ),
        Claim(
            "figure 2, left",
            "Re-matching beats leaving every image its first random target.",
            "not in the paper",
            three,
            (Arm("never", "fig2_period", "0"),),
            "mlp_probe",
        ),
        Claim(
            "figure 2, right",
            "Accuracy rises along training and then settles.",
            "a figure; settled after about 100 epochs",
            Arm("NAT, constant rate", "fig2_epochs"),
            (),
            "mlp_probe",
            "settles",
        ),
        Claim(
            "table 1",
            "With labels the square loss is about as good as softmax.",
            "58.4 against 59.2",
            square,
            (soft,),
            "own",
            "close",
            0.02,
        ),
        Claim(
            "table 2",
            "With labels clean images are a little better than high-pass filtered ones.",
            "59.7 against 58.5",
            clean,
            (high,),
            "own",
        ),
        Claim(
            "table 2",
            "With labels high-pass filtered images are a little better than Sobel gradients.",
            "58.5 against 57.4",
            high,
            (sobel,),
            "own",
        ),
    )


def compare(
    left: Mapping[int, float],
    right: Mapping[int, float],
    *,
    tests: int,
    rule: Literal["above", "close"] = "above",
    margin: float = 0.0,
) -> Difference | None:
    """Compare two arms by the seeds that both have.

    Args:
        left: accuracies in [0, 1] by seed.
        right: the same of the other arm.
        tests: test images that each accuracy was measured on.
        rule: see ``Claim``.
        margin: for "close".

    Returns:
        "above" holds where the mean difference exceeds its noise, and does not where it is below
        minus the noise. "close" holds where the whole interval lies within the margin, and does not
        where it lies outside. What is neither is within noise. None without a seed in common.

    Raises:
        ValueError: an accuracy outside [0, 1], or no test images.
    """
    if tests < 1:
        raise ValueError(f"tests: expected at least 1 image; got {tests}")
    for value in (*left.values(), *right.values()):
        if not 0 <= value <= 1:
            raise ValueError(f"accuracy: expected a number in [0, 1]; got {value}")
    seeds = tuple(sorted(left.keys() & right.keys()))
    if not seeds:
        return None
    differences = np.asarray([left[s] - right[s] for s in seeds])
    mean = float(differences.mean())
    if len(seeds) > 1:
        noise = _t(len(seeds)) * float(differences.std(ddof=1)) / math.sqrt(len(seeds))
    else:
        noise = _of_one_seed(left[seeds[0]], right[seeds[0]], tests)
    if rule == "close":
        verdict = _close(mean, noise, margin)
    else:
        verdict = HOLDS if mean > noise else FAILS if mean < -noise else NOISE
    return Difference(mean, noise, seeds, verdict)


def settles(curve: Sequence[tuple[float, float]], *, tests: int) -> tuple[Difference, ...]:
    """Judge whether accuracy rises along training and then flattens.

    Args:
        curve: (epoch, accuracy) in the order of epochs, with the untrained network as epoch 0.
        tests: test images that each accuracy was measured on.

    Returns:
        The gains of the first half and of the second, the verdict standing in both: it holds where
        the first exceeds its noise and the second is smaller; it is within noise where the first
        does not exceed it; it does not hold otherwise. Nothing for fewer than three points.
    """
    if len(curve) < 3:
        return ()
    half = curve[-1][0] / 2
    middle = min(curve[1:-1], key=lambda point: abs(point[0] - half))[1]
    first, last = curve[0][1], curve[-1][1]
    gains = (middle - first, last - middle)
    noises = (_of_one_seed(first, middle, tests), _of_one_seed(middle, last, tests))
    if gains[0] < -noises[0]:
        verdict = FAILS
    elif gains[0] <= noises[0]:
        verdict = NOISE
    else:
        verdict = HOLDS if gains[1] < gains[0] else FAILS
    return tuple(
        Difference(gain, noise, (), verdict) for gain, noise in zip(gains, noises, strict=True)
    )


def overall(differences: Sequence[Difference | None]) -> str:
    """Return the verdict on a claim: every comparison must hold, and one that does not decides."""
    found = [difference.verdict for difference in differences if difference is not None]
    if FAILS in found:
        return FAILS
    if not found or len(found) < len(differences):
        return NOTHING
    return NOISE if NOISE in found else HOLDS


def spread(values: Mapping[int, float]) -> dict[str, Any]:
    """Return mean, standard deviation (None for one seed), values and seeds, for JSON."""
    ordered = [values[seed] for seed in sorted(values)]
    return {
        "mean": float(np.mean(ordered)) if ordered else None,
        "std": float(np.std(ordered, ddof=1)) if len(ordered) > 1 else None,
        "values": ordered,
        "seeds": sorted(values),
    }


def _t(seeds: int) -> float:
    return float(stats.t.ppf((1 + _CONFIDENCE) / 2, seeds - 1))


def _of_one_seed(left: float, right: float, tests: int) -> float:
    """Return the noise that the choice of test images leaves, as if two sets had been drawn."""
    variance = (left * (1 - left) + right * (1 - right)) / tests
    return float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * math.sqrt(variance)


def _close(mean: float, noise: float, margin: float) -> str:
    if abs(mean) + noise <= margin:
        return HOLDS
    return FAILS if abs(mean) - noise > margin else NOISE
