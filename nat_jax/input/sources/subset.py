"""Some records of a source: the first of each class, or any others."""

import hashlib

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.source import Record, Source


class Subset:
    """Some records of a source, renumbered from 0.

    Args:
        source: where they come from.
        rows: int[n], their numbers there.
        labels: int32[n], their classes, if the source does not know them without reading.
        fingerprint: of these records; the source's if None.
    """

    def __init__(
        self,
        source: Source,
        rows: np.ndarray,
        *,
        labels: np.ndarray | None = None,
        fingerprint: str | None = None,
    ):
        self._source, self._rows = source, rows
        self.name, self.split = source.name, source.split
        self.class_names, self.num_classes = source.class_names, source.num_classes
        self.fingerprint = fingerprint or source.fingerprint
        known = None if source.labels is None else source.labels[rows]
        self.labels: np.ndarray | None = known if labels is None else labels

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return {**self._source[int(self._rows[index])], "index": index}

    def record_name(self, index: int) -> str:
        return self._source.record_name(int(self._rows[index]))


def first_of_class(source: Source, per_class: int) -> Subset:
    """Return the first records of each class of a source, in the source's order.

    Labels that the source does not know without reading are read, one record after the other.

    Args:
        source: where they come from.
        per_class: how many of each class, at least 1.

    Raises:
        InputError: the source has no classes, or fewer records of one.
    """
    if source.num_classes is None:
        raise InputError(
            f"data.per_class: expected labelled records; {source.name} has no classes. Set "
            "--config.data.per_class=0 for all of them"
        )
    labels = source.labels
    if labels is None:
        labels = np.asarray([source[i]["label"] for i in range(len(source))])
    rows = _first(labels, source, per_class)
    text = f"{source.fingerprint} first {per_class} of each class"
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Subset(source, rows, labels=labels[rows], fingerprint=fingerprint)


def _first(labels: np.ndarray, source: Source, per_class: int) -> np.ndarray:
    """Return int64[num_classes * per_class], the ascending positions of the first of each class."""
    names = source.class_names or ()
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    if counts.min() < per_class:
        raise InputError(
            f"data.per_class: expected at most {counts.min()}, the records of class "
            f"{names[counts.argmin()]} of {source.name}; got {per_class}"
        )
    chosen = [np.flatnonzero(labels == c)[:per_class] for c in range(len(names))]
    return np.sort(np.concatenate(chosen))
