"""Feature sets: what the probes read, and how they are cut out of a network's layers."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.errors import InputError
from nat_jax.models.pooling import pool

LABEL, INDEX = "label", "index"

Batch = Mapping[str, Any]  # "image", "label", "weight", "index" and "name" of some records
Columns = dict[
    str, np.ndarray
]  # of some records: {layer: float32[n, F]}, "label", "index" int32[n]
Apply = Callable[[np.ndarray], Mapping[str, jax.Array]]  # from images to features by layer

_CHECK_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Features of some records and their labels.

    Attributes:
        features: float32[N, F]; may be mapped from a file.
        labels: int32[N]; -1 for a record without a label.
        index: int32[N], the number of each record in its source; None if unknown.
    """

    features: np.ndarray
    labels: np.ndarray
    index: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise InputError(
                f"features: expected [N, F], got shape {self.features.shape}; flatten each record"
            )
        if self.labels.shape != self.features.shape[:1]:
            raise InputError(
                f"labels: expected one per row of features, [{len(self.features)}], "
                f"got shape {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.features)

    def of(self, rows: np.ndarray) -> "FeatureSet":
        """Return some of the records: rows int[n]."""
        index = None if self.index is None else self.index[rows]
        return FeatureSet(self.features[rows], self.labels[rows], index)


class FeatureBatch(NamedTuple):
    """A batch of features, for probes that learn from a stream.

    Attributes:
        features: {layer: float[B, F]}; for a test [B, F], or [B, V, F] for V views of each record.
        labels: int[B].
        weight: float[B], 0 for records that do not count (padding, bad images). They still enter
            batch statistics, as they do in training.
    """

    features: Mapping[str, jax.Array | np.ndarray]
    labels: np.ndarray
    weight: np.ndarray


# The batches of an epoch, counted from 0; with a length, the remaining time can be estimated.
TrainEpoch = Callable[[int], Iterable[FeatureBatch]]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The batches of an epoch as they are computed, and how many they are."""

    batches: Iterator[FeatureBatch]
    steps: int

    def __iter__(self) -> Iterator[FeatureBatch]:
        return self.batches

    def __len__(self) -> int:
        return self.steps


def featured(apply: Apply, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[FeatureBatch]:
    """Run a frozen network over batches of images as they come.

    Args:
        apply: jitted function of uint8[n, H, W, 3] that returns {layer: float[n, ...]}.
        batches: with "image" uint8[B, H, W, 3] or, for V views, [B, V, H, W, 3]; "label" int32[B];
            "weight" float32[B].

    Returns:
        Features flattened to [B, F], or [B, V, F]; still being computed, on the device.
    """
    for batch in batches:
        images = batch["image"]
        shape = images.shape[:-3]
        outputs = apply(images.reshape(-1, *images.shape[-3:]))
        yield FeatureBatch(
            {layer: values.reshape(*shape, -1) for layer, values in outputs.items()},
            batch["label"],
            batch["weight"],
        )


def check_finite(features: np.ndarray, name: str) -> None:
    """Raise ValueError, naming how many, when float[N, F] holds NaN or infinite values."""
    values = rows = 0
    for part in row_chunks(features, _CHECK_BYTES):
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(part.sum(axis=1)).all():  # one number per row decides the usual case
                continue
        bad = ~np.isfinite(part)
        values, rows = values + int(bad.sum()), rows + int(bad.any(axis=1).sum())
    if values:
        raise InputError(
            f"{name} features: expected finite values, got {values} that are NaN or infinite, "
            f"in {rows} of {len(features)} rows; has training diverged?"
        )


def row_chunks(array: np.ndarray, most_bytes: int) -> Iterator[np.ndarray]:
    """Yield views of consecutive rows [n, F] of an array, mapped ones included, in order.

    Args:
        array: [N, F].
        most_bytes: size of a chunk as float32, unless one row is larger.
    """
    step = max(1, most_bytes // (4 * max(1, array.shape[1])))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def check_sets(train: FeatureSet, test: FeatureSet, num_classes: int) -> None:
    """Check what every probe needs of its two sets.

    Raises:
        InputError: an empty set, feature dimensions that differ, fewer than two classes, labels
            outside [0, num_classes), or features that are not finite.
    """
    for name, data in (("train", train), ("test", test)):
        if not len(data):
            raise InputError(f"{name} set: expected at least one record, got none")
    if train.features.shape[1] != test.features.shape[1]:
        raise InputError(
            "expected train and test features of one dimension, got "
            f"{train.features.shape[1]} and {test.features.shape[1]}; use the same layer for both"
        )
    if num_classes < 2:
        raise InputError(f"num_classes: expected at least 2, got {num_classes}")
    for name, data in (("train", train), ("test", test)):
        check_labels(data.labels, num_classes, name)
        check_finite(data.features, name)
    if len(np.unique(train.labels)) < 2:
        raise InputError(
            f"train labels: expected at least 2 classes, got only class {train.labels[0]}"
        )


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raise ValueError when int[n] holds anything but 0 .. num_classes - 1; -1 means no label."""
    if unlabelled := int(np.sum(labels == -1)):
        raise InputError(
            f"{name} labels: expected one for every record, {unlabelled} of {len(labels)} have "
            "none (-1); leave these out, or give a source with labels"
        )
    if outside := int(np.sum((labels < 0) | (labels >= num_classes))):
        raise InputError(
            f"{name} labels: expected 0..{num_classes - 1} for {num_classes} classes, got "
            f"{outside} of {len(labels)} outside ({labels.min()}..{labels.max()})"
        )


def inverse_deviation(mean: jax.Array | np.ndarray, variance: jax.Array | np.ndarray) -> jax.Array:
    """Return one over each feature's standard deviation, float32[F]; 0 for a constant feature."""
    # What rounding alone leaves of a constant feature is no variance.
    varies = variance > 1e-10 * jnp.square(mean)
    return jnp.where(varies, 1.0 / jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)


def joined(parts: Iterable[Columns]) -> dict[str, FeatureSet]:
    """Join the columns that `extracted` yields, in memory.

    Raises:
        InputError: no record is left.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, values in part.items():
            columns.setdefault(name, []).append(values)
    labels = np.concatenate(columns.pop(LABEL, [np.zeros(0, np.int32)]))
    if not len(labels):
        raise InputError("no features to extract: the batches hold no record of weight 1")
    index = np.concatenate(columns.pop(INDEX)) if INDEX in columns else None
    # Popping frees each layer's pieces before the next one is joined.
    return {
        layer: FeatureSet(np.concatenate(columns.pop(layer)), labels, index)
        for layer in list(columns)
    }


def extracted(
    apply: Apply, batches: Iterable[Batch], *, unreadable: float | None = None
) -> Iterator[tuple[Batch, Columns]]:
    """Run a network over batches and return the features of their records.

    Args:
        apply: jitted function of uint8[B, H, W, 3] that returns {layer: float[B, ...]}.
        batches: with "image", "label" int32[B] and "weight" float32[B]; with "index", which is -1
            in rows of padding, it becomes a column.
        unreadable: features of records of weight 0 other than padding; None drops these records.

    Yields:
        Each batch, and the columns of its records, flattened to float32[n, F].
    """

    def columns(batch: Batch, output: Mapping[str, jax.Array]) -> Columns:
        good = np.asarray(batch["weight"]) > 0
        keep = good if unreadable is None else np.asarray(batch[INDEX]) >= 0
        found: Columns = {
            name: np.asarray(batch[name], np.int32)[keep]
            for name in (LABEL, INDEX)
            if name in batch
        }
        for layer, values in output.items():
            found[layer] = np.asarray(values, np.float32).reshape(len(keep), -1)[keep]
            if unreadable is not None:
                found[layer] = np.where(good[keep, None], found[layer], np.float32(unreadable))
        return found

    outputs = ((batch, apply(batch["image"])) for batch in batches)
    # One batch is computed while the previous one is copied.
    for (batch, output), _ in itertools.pairwise(itertools.chain(outputs, [({}, {})])):
        yield batch, columns(batch, output)


def raw_pixels(images: np.ndarray | jax.Array, max_features: int) -> jax.Array:
    """Return uint8[B, H, W, 3] as values in [0, 1], pooled as feature maps are: the baseline.

    Returns:
        float32[B, h, w, 3] with h * w * 3 <= max_features.
    """
    return pool(jnp.asarray(images).astype(jnp.float32) / 255.0, max_features)


def few_labels(
    labels: np.ndarray, amount: int | float, *, seed: int, names: Sequence[str] | None = None
) -> np.ndarray:
    """Choose the records of a split with few labels, class by class: a fixed split for its seed.

    Each class keeps the records whose names, hashed with the seed, come first. So a split follows
    from the names alone, in whatever order the records stand, and smaller splits lie inside larger
    ones.

    Args:
        labels: int[N].
        amount: an integer for that many records of every class; a fraction in (0, 1) for that share
            of each, rounded, and one at least: 0.01 and 0.1 are the usual splits of ImageNet.
        seed: of the split.
        names: of the records, each once; their row numbers when left out.

    Returns:
        int64[n], rows in rising order.

    Raises:
        InputError: the amount is neither; a class that occurs has fewer records; records are
            unlabelled; names are not one per record.
    """
    share = 0 < amount < 1
    if not share and (amount < 1 or amount != int(amount)):
        raise InputError(
            f"labels: expected a number per class or a fraction in (0, 1), got {amount}"
        )
    if names is None:
        names = [str(row) for row in range(len(labels))]
    if len(names) != len(labels) or len(set(names)) != len(names):
        raise InputError(
            f"names: expected {len(labels)} different ones, got {len(names)}, "
            f"{len(set(names))} of them different"
        )
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) and classes[0] < 0:
        raise InputError(
            f"a subset per class needs labels; {counts[0]} of {len(labels)} records have none"
        )
    if not share and len(counts) and counts.min() < amount:
        raise InputError(
            f"expected at least {int(amount)} records of every class, got {counts.min()} of class "
            f"{classes[counts.argmin()]}; ask for fewer labels per class"
        )
    rank = np.array([_digest(seed, name) for name in names], "S16")
    chosen = [np.zeros(0, np.int64)]
    for label, count in zip(classes, counts, strict=True):
        rows = np.flatnonzero(labels == label)
        kept = max(1, round(amount * int(count))) if share else int(amount)
        chosen.append(rows[np.argsort(rank[rows], kind="stable")[:kept]])
    return np.sort(np.concatenate(chosen))


def _digest(seed: int, name: str) -> bytes:
    # Hexadecimal, as NumPy takes zeros off the end of bytes.
    return hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).hexdigest().encode()


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
