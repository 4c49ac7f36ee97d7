"""Feature sets: what the probes read, and how they are cut out of a network's layers."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Apply = Callable[[np.ndarray], Mapping[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of some records and their labels.

    Attributes:
        features: float32[N, F].
        labels: int32[N]; -1 for a record without a label.
    """

    features: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise ValueError(
                f"features: expected [N, F], got shape {self.features.shape}; flatten each record"
            )
        if self.labels.shape != self.features.shape[:1]:
            raise ValueError(
                f"labels: expected one per row of features, [{len(self.features)}], "
                f"got shape {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.features)


def check_finite(features: np.ndarray, name: str) -> None:
    """Raise ValueError, naming how many, when float[N, F] holds NaN or infinite values."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(features.sum(axis=1)).all():  # one number per row decides the usual case
            return
    bad = ~np.isfinite(features)
    if bad.any():
        raise ValueError(
            f"{name} features: expected finite values, got {bad.sum()} that are NaN or infinite, "
            f"in {bad.any(axis=1).sum()} of {len(features)} rows; has training diverged?"
        )


def check_sets(train: FeatureSet, test: FeatureSet, num_classes: int) -> None:
    """Check what every probe needs of its two sets.

    Raises:
        ValueError: an empty set, feature dimensions that differ, fewer than two classes, labels
            outside [0, num_classes), or features that are not finite.
    """
    for name, data in (("train", train), ("test", test)):
        if not len(data):
            raise ValueError(f"{name} set: expected at least one record, got none")
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(
            "expected train and test features of one dimension, got "
            f"{train.features.shape[1]} and {test.features.shape[1]}; use the same layer for both"
        )
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    for name, data in (("train", train), ("test", test)):
        outside = int(np.sum((data.labels < 0) | (data.labels >= num_classes)))
        if outside:
            raise ValueError(
                f"{name} labels: expected 0..{num_classes - 1}, got {outside} of {len(data)} "
                f"outside ({data.labels.min()}..{data.labels.max()}; -1 means unlabelled)"
            )
        check_finite(data.features, name)
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"train labels: expected at least 2 classes, got only class {train.labels[0]}"
        )


def extract(apply: Apply, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, FeatureSet]:
    """Run a network over batches and collect the features of every layer it returns.

    Args:
        apply: jitted function of uint8[B, H, W, 3] that gives {layer: float[B, ...]}.
        batches: with "image", "label" int32[B] and "weight" float32[B]; rows of weight 0 are
            dropped.

    Returns:
        {layer: FeatureSet}, each record flattened to float32[F], in the order of the batches.

    Raises:
        ValueError: no record is left.
    """
    rows: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []

    def collect(output: Mapping[str, jax.Array], batch: Mapping[str, np.ndarray]) -> None:
        keep = np.asarray(batch["weight"]) > 0
        labels.append(np.asarray(batch["label"], np.int32)[keep])
        for layer, values in output.items():
            flat = np.asarray(values, np.float32).reshape(len(keep), -1)
            rows.setdefault(layer, []).append(flat[keep])

    pending = None  # one batch computes on the device while the previous one is copied
    for batch in batches:
        output = apply(batch["image"])
        if pending is not None:
            collect(*pending)
        pending = output, batch
    if pending is not None:
        collect(*pending)
    if not sum(map(len, labels)):
        raise ValueError("no features to extract: the batches hold no record of weight 1")
    all_labels = np.concatenate(labels)
    # Popping frees each layer's pieces before the next one is joined.
    return {layer: FeatureSet(np.concatenate(rows.pop(layer)), all_labels) for layer in list(rows)}


def pool(x: jax.Array, max_features: int) -> jax.Array:
    """Average-pool feature maps until a record has at most `max_features` values.

    The map shrinks to the largest grid of about its own aspect ratio that fits; each cell is the
    mean over the pixels that it touches (adaptive pooling). Zhang et al. (ECCV 2016) probe maps of
    about 9,000 values, resized, e.g. 5 x 5 x 384 = 9600. Maps that fit stay as they are; a map of
    more than `max_features` channels becomes 1 x 1.

    Args:
        x: float[B, h, w, c].
        max_features: largest h' * w' * c of the result.

    Returns:
        float[B, h', w', c].
    """
    if x.ndim != 4:
        raise ValueError(f"pool: expected feature maps [B, h, w, c], got shape {x.shape}")
    if max_features < 1:
        raise ValueError(f"pool: expected max_features of at least 1, got {max_features}")
    height, width, channels = x.shape[1:]
    longer = max(height, width)
    for side in range(longer, 0, -1):
        rows, cols = (max(1, round(side * size / longer)) for size in (height, width))
        if rows * cols * channels <= max_features:
            break
    if (rows, cols) == (height, width):
        return x
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("bhwc,rh->brwc", x, _windows(rows, height), precision=exact)
    return jnp.einsum("brwc,sw->brsc", x, _windows(cols, width), precision=exact)


def _windows(cells: int, size: int) -> np.ndarray:
    """Return float32[cells, size]: row i averages pixels floor(i s/c) .. ceil((i+1) s/c)."""
    first = np.arange(cells)[:, None] * size // cells
    last = -(-(np.arange(cells)[:, None] + 1) * size // cells)
    inside = (np.arange(size) >= first) & (np.arange(size) < last)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def raw_pixels(images: np.ndarray | jax.Array, max_features: int) -> jax.Array:
    """Return uint8[B, H, W, 3] as values in [0, 1], pooled as feature maps are: the baseline.

    Returns:
        float32[B, h, w, 3] with h * w * 3 <= max_features.
    """
    return pool(jnp.asarray(images).astype(jnp.float32) / 255.0, max_features)


def subset_per_class(data: FeatureSet, per_class: int, seed: int) -> FeatureSet:
    """Draw `per_class` records of every class, the same ones for equal labels and seed.

    Raises:
        ValueError: a class that occurs has fewer records, or records are unlabelled.
    """
    if per_class < 1:
        raise ValueError(f"per_class: expected at least 1, got {per_class}")
    classes, counts = np.unique(data.labels, return_counts=True)
    if len(classes) and classes[0] < 0:
        raise ValueError(
            f"a subset per class needs labels; {counts[0]} of {len(data)} records have none"
        )
    if len(counts) and counts.min() < per_class:
        raise ValueError(
            f"expected at least {per_class} records of every class, got {counts.min()} of class "
            f"{classes[counts.argmin()]}; ask for fewer labels per class"
        )
    rng = np.random.default_rng(seed)
    chosen = [
        rng.choice(np.flatnonzero(data.labels == label), per_class, replace=False)
        for label in classes
    ]
    rows = np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
    return FeatureSet(data.features[rows], data.labels[rows])


def padded_length(rows: int) -> int:
    """Round up to one of few lengths (four per octave, at least 128).

    Probes pad their sets to it with rows that count for nothing, so that sets of similar size
    share a compiled program; at most a quarter is added beyond 128.
    """
    if rows <= 128:
        return 128
    step = 1 << (rows - 1).bit_length() - 3
    return -(-rows // step) * step


def padded_rows(array: np.ndarray, length: int) -> np.ndarray:
    """Append rows of zeros up to `length`."""
    if len(array) == length:
        return array
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])
