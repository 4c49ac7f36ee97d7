"""The health of a run in sentences, measured against chance level."""

import math
from collections.abc import Mapping

from scipy.special import betaincinv

# Features count as collapsed when their effective rank lies this near to 1, on the way from 1 (all
# coincide) to that of points spread evenly over the sphere.
_COLLAPSED_SHARE = 0.05
_EARLY = 100  # steps before which the features are much as they were without training

# An average cosine this much above chance is more than the noise of one batch.
_ABOVE_CHANCE = 0.02


def chance_cosine(n: int, dim: int) -> float:
    """Return the average cosine that matching reaches between unrelated features and rows.

    The 1 - 1/n quantile of the cosine between a random direction and a fixed one in ``dim``
    dimensions, (1 + cosine) / 2 being Beta((D-1)/2, (D-1)/2): what the best of n rows offers. An
    optimal matching of uniform points comes within a few percent of it. For large D it falls as
    sqrt(2 ln n / D), which exceeds 1 when D is small.

    Args:
        n: images that are matched together, at least 1.
        dim: D, the feature dimension, at least 1.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"chance_cosine: expected n >= 1 and dim >= 1; got n={n}, dim={dim}")
    if n == 1:
        return 0.0
    if dim == 1:
        return 1.0
    half = (dim - 1) / 2
    return float(2 * betaincinv(half, half, 1 - 1 / n) - 1)


def sentences(
    row: Mapping[str, float],
    *,
    n: int,
    dim: int,
    kind: str = "sphere",
    matched_epoch: int | None = None,
    steps: int | None = None,
    scope: str = "batch",
) -> list[str]:
    """Describe the health of a run in sentences; problems begin with "warning:".

    Args:
        row: the latest value of each metric; values that are missing or not finite are left out,
            but a loss that is not finite is reported.
        n: images that are matched together (``assign.block``, the global batch, or all).
        dim: D, the feature dimension.
        kind: of the targets; the chance level is known for "sphere" only.
        matched_epoch: the last epoch that reassigned its batches, or after which all images were
            matched, counted from 0.
        steps: how many were trained; features of fewer than 100 are still those of the start.
        scope: ``assign.scope``.
    """
    finite = {k: v for k, v in row.items() if v is not None and math.isfinite(v)}
    found = []
    if "train/loss" in row and "train/loss" not in finite:
        found.append("warning: the loss is not finite; lower optim.learning_rate")
    spread, collapsed = _feature_health(finite, n, dim, steps)
    if not collapsed:
        found += _matching_health(finite, n, dim, kind, matched_epoch, scope)
    found += spread
    if finite.get("assign/worst_status", 0):
        found.append(
            "warning: the solver did not reach its optimum in every block (rows are still a "
            "permutation); see assign/gap and assign.options"
        )
    return found


def _matching_health(
    row: Mapping[str, float],
    n: int,
    dim: int,
    kind: str,
    matched_epoch: int | None,
    scope: str,
) -> list[str]:
    what, preposition = ("all images", "after") if scope == "dataset" else ("batches", "in")
    if not {"assign/cosine_before", "assign/cosine_after"} <= row.keys():
        never = "all images are re-matched between epochs only: train for more than one (epochs)"
        return [never] if scope == "dataset" else []
    before, after = row["assign/cosine_before"], row["assign/cosine_after"]
    when = "" if matched_epoch is None else f" {preposition} epoch {matched_epoch}"
    text = (
        f"before re-matching{when}, features pointed to the targets that their images already "
        f"owned with cosine {before:.3f} (without learning 0)"
    )
    if matched_epoch == 0:
        found = [f"{what} were re-matched{when} only, which is too early to judge"]
    elif kind != "sphere":
        found = [text]
    elif before < max(_ABOVE_CHANCE, 3 / math.sqrt(n * dim)):
        found = [f"{text}: nothing is learnt yet, which is normal in the first epochs only"]
    else:
        found = [f"{text}: it is learning"]
    if kind == "sphere":
        found.append(
            f"re-matching raised it to {after:.3f}; features without any learning reach about "
            f"{chance_cosine(n, dim):.3f}"
        )
    if after < before - 1e-4:
        found.append("warning: matching lowered the cosine, which no correct matching can do")
    if "assign/moved" in row:
        found.append(
            f"{row['assign/moved']:.0%} of the images took another target; all do at the start, "
            "fewer as the matching settles"
        )
    return found


def _feature_health(
    row: Mapping[str, float], n: int, dim: int, steps: int | None
) -> tuple[list[str], bool]:
    """Return sentences on the features' spread, and whether they collapsed."""
    if "features/effective_rank" not in row:
        return [], False
    rank = row["features/effective_rank"]
    even = 1 / (1 / n + (1 - 1 / n) / dim)
    text = f"effective rank of the features {rank:.1f}, of {even:.1f} when spread evenly"
    if steps is not None and steps < _EARLY:
        return [
            f"{text}, after {steps} steps, which is too early to judge; train longer (epochs), or "
            "in smaller batches (batch_size)"
        ], False
    if rank - 1 < _COLLAPSED_SHARE * (even - 1):
        return [
            f"warning: {text}: the features collapse. Lower optim.learning_rate, or match more "
            "images together (batch_size, assign.block)"
        ], True
    return [text], False
