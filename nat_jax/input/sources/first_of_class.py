"""The first records of each class of a source: a small run on the data of a large one."""

import hashlib

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.source import Record, Source


class FirstOfClass:
    """The first records of each class of a source, in the source's order.

    Labels that the source does not know without reading are read, one record after the other.

    Args:
        source: where they come from.
        per_class: how many of each class, at least 1.

    Raises:
        ValueError: the source has no classes, or fewer records of one.
    """

    def __init__(self, source: Source, per_class: int):
        if source.num_classes is None:
            raise InputError(
                f"data.per_class: expected labelled records; {source.name} has no classes. Set "
                "--config.data.per_class=0 for all of them"
            )
        labels = source.labels
        if labels is None:
            labels = np.asarray([source[i]["label"] for i in range(len(source))])
        self._positions = _first(labels, source.num_classes, per_class, source.name)
        self._source = source
        self.name, self.split = source.name, source.split
        self.class_names, self.num_classes = source.class_names, source.num_classes
        self.labels: np.ndarray | None = labels[self._positions]
        identity = f"{source.fingerprint} first {per_class} of each class"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Record:
        return {**self._source[int(self._positions[index])], "index": index}

    def record_name(self, index: int) -> str:
        return self._source.record_name(int(self._positions[index]))


def _first(labels: np.ndarray, num_classes: int, per_class: int, name: str) -> np.ndarray:
    """Return int64[num_classes * per_class], the ascending positions of the first of each class."""
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    if counts.min() < per_class:
        raise InputError(
            f"data.per_class: expected at most {counts.min()}, the records of class "
            f"{counts.argmin()} of {name}; got {per_class}"
        )
    return np.sort(
        np.concatenate([np.flatnonzero(labels == c)[:per_class] for c in range(num_classes)])
    )
