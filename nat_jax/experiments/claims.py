"""The paper's claims, and the rule that decides whether runs confirm them (``RULE``)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

HOLDS, NOISE, FAILS, NOTHING = "trend holds", "within noise", "does not hold", "no result"

# The rule for readers of the result; networks of one seed see the same images in the same order.
RULE = (
    "Networks of the same seed are compared. The noise of a mean difference is the half-width of "
    "its 95 % interval by Student's t over the seeds; with one seed it is the sampling error of "
    "the test images. A trend holds if the difference exceeds its noise, and does not hold if it "
    "is below minus its noise. A claim with several comparisons holds if all of them do, and does "
    "not hold if one of them does not. 'About as good' holds if the difference and its noise "
    "together stay within 2 points. 'Settles' holds if the gain of the first half of training "
    "exceeds its noise and the gain of the second half."
)

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison: the accuracies of an experiment's networks.

    Attributes:
        name: in tables.
        experiment: a file of configs/paper.
        value: of a sweep; "" if the experiment is none.
        trained: False for the same networks before training.
    """

    name: str
    experiment: str
    value: str = ""
    trained: bool = True


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper about one arm or several.

    Attributes:
        place: where in the paper.
        text: the claim, in one sentence.
        paper: the paper's numbers, in words.
        left: the arm that the claim is about.
        rights: the arms that it is compared with.
        probe: "own", the networks' own decisions, or a probe of the last convolution.
        rule: "above": left is more accurate than every right; "close": it is within ``margin``;
            "settles": it rises during training and then flattens.
        margin: in [0, 1], for "close".
    """

    place: str
    text: str
    paper: str
    left: Arm
    rights: tuple[Arm, ...]
    probe: str = "mlp_probe"
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
    nat, three = Arm("NAT", "table3_imagenet"), Arm("every 3", "fig2_period", "3")
    soft, square = Arm("softmax", "table1_softmax"), Arm("square", "table1_square")
    clean, high = Arm("clean", "table2_clean"), Arm("high-pass", "table2_highpass")
    return (
        Claim(
            "table 3",
            "NAT's last convolution is far better than an untrained one.",
            "36.0 against 12.0",
            nat,
            (Arm("untrained", "table3_imagenet", trained=False),),
        ),
        Claim(
            "text",
            "Noise is a better target than k one-hot rows.",
            "33.5 against 19 for the best k",
            nat,
            tuple(Arm(f"k = {k}", "discrete_targets", k) for k in ks),
        ),
        Claim(
            "figure 2, left",
            "Re-matching every 3 epochs is best.",
            "a figure; every period is above 30",
            three,
            tuple(Arm(f"every {p}", "fig2_period", p) for p in periods if p not in ("3", "0")),
        ),
        Claim(
            "figure 2, left",
            "Re-matching beats leaving every image its first random target.",
            "not in the paper",
            three,
            (Arm("never", "fig2_period", "0"),),
        ),
        Claim(
            "figure 2, right",
            "Accuracy rises along training and then settles.",
            "a figure; settled after about 100 epochs",
            Arm("NAT, constant rate", "fig2_epochs"),
            (),
            rule="settles",
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
            (Arm("Sobel", "table2_sobel"),),
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
    """Compare two arms on the seeds that both have.

    Args:
        left: accuracies in [0, 1] by seed.
        right: the same of the other arm.
        tests: number of test images behind each accuracy.
        rule: see ``Claim``.
        margin: for "close".

    Returns:
        "above" holds if the mean difference exceeds its noise, and does not hold if it is below
        minus the noise. "close" holds if the entire interval lies within the margin, and does not
        hold if it lies outside. Everything else is within noise. None without a shared seed.

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
    differences = np.asarray([left[seed] - right[seed] for seed in seeds])
    mean = float(differences.mean())
    if len(seeds) > 1:
        t = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(seeds) - 1))
        noise = t * float(differences.std(ddof=1)) / math.sqrt(len(seeds))
    else:
        noise = _sampling_error(left[seeds[0]], right[seeds[0]], tests)
    if rule == "above":
        verdict = HOLDS if mean > noise else FAILS if mean < -noise else NOISE
    elif abs(mean) + noise <= margin:
        verdict = HOLDS
    else:
        verdict = FAILS if abs(mean) - noise > margin else NOISE
    return Difference(mean, noise, seeds, verdict)


def settles(curve: Sequence[tuple[float, float]], *, tests: int) -> tuple[Difference, ...]:
    """Decide whether accuracy rises during training and then flattens.

    Args:
        curve: (epoch, accuracy) in the order of epochs, with the untrained network as epoch 0.
        tests: number of test images behind each accuracy.

    Returns:
        The gains of the first half and of the second, both with the same verdict: it holds if the
        first exceeds its noise and the second is smaller; it is within noise if the first does not
        exceed its noise; otherwise it does not hold. Empty for fewer than three points.
    """
    if len(curve) < 3:
        return ()
    half = curve[-1][0] / 2
    middle = min(curve[1:-1], key=lambda point: abs(point[0] - half))[1]
    first, last = curve[0][1], curve[-1][1]
    gains = (middle - first, last - middle)
    noises = (_sampling_error(first, middle, tests), _sampling_error(middle, last, tests))
    if abs(gains[0]) <= noises[0]:
        verdict = NOISE
    else:
        verdict = HOLDS if gains[0] > 0 and gains[1] < gains[0] else FAILS
    return tuple(
        Difference(gain, noise, (), verdict) for gain, noise in zip(gains, noises, strict=True)
    )


def _sampling_error(left: float, right: float, tests: int) -> float:
    """Return the half-width of the interval of left - right over draws of the test images."""
    variance = (left * (1 - left) + right * (1 - right)) / tests
    return float(stats.norm.ppf((1 + _CONFIDENCE) / 2)) * math.sqrt(variance)


def overall(differences: Sequence[Difference | None]) -> str:
    """Return the verdict on a claim: all comparisons must hold, and a failed one decides."""
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
