"""The protocol of a source of images, and the rule for a held-out test split."""

from collections.abc import Callable
from typing import Protocol, TypedDict

import numpy as np

from nat_jax.errors import InputError, UserError
from nat_jax.input.counter_random import hash64

SPLITS = ("train", "test")
_HELD_OUT_SHARE = 10  # one record in ten is kept for the probes where the data has no test split


class Record(TypedDict):
    """One image and what travels with it.

    Attributes:
        index: the record's stable number in its source and split, in [0, len(source)).
        name: for messages, such as a file name.
        label: class number, or -1 where it has none.
        image: encoded bytes of an image file, or uint8 [H, W] or [H, W, 1|3|4].
    """

    index: int
    name: str
    label: int
    image: "bytes | np.ndarray"


class Source(Protocol):
    """A finite, ordered, picklable collection of records that several threads may read at once.

    Attributes:
        name: the specification it was opened with, such as "folder:PATH".
        split: "train" or "test".
        class_names: names of the classes in the order of their labels; None when unlabelled.
        num_classes: how many classes there are; None when unlabelled.
        labels: integers [N], -1 for a record without one, where they are known without reading the
            records; None otherwise.
        fingerprint: sha256 in hex over what identifies the records, their order and the split;
            the same on every machine.
    """

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    @property
    def num_classes(self) -> int | None: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def record_name(self, index: int) -> str:
        """Return a record's name without reading the record."""
        ...


Opener = Callable[[str, str], Source]


class UnreadableRecord(UserError):
    """A record whose bytes could not be read, with its name and label (-1 if unknown)."""

    def __init__(self, name: str, label: int, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.label = label
        self.reason = reason


def split_positions(count: int, split: str) -> np.ndarray:
    """Return the positions of one split of `count` records that come without a test split.

    A tenth (rounded down, at least one) is held out for testing: the records whose positions have
    the smallest hashes, so that sorted or grouped data is held out evenly.

    Args:
        count: number of records in all.
        split: "train" or "test".

    Returns:
        int64[M], ascending positions.

    Raises:
        ValueError: there is nothing to hold out.
    """
    if count < 2:
        raise InputError(
            f"{count} image: too few to hold one out for testing; "
            "give at least 2, or a train/ and a test/ folder"
        )
    order = np.argsort(hash64(np.arange(count, dtype=np.uint64)), kind="stable")
    held_out = max(1, count // _HELD_OUT_SHARE)
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return np.sort(chosen)


def hold_out(labels: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Return one split of records that come without a test split, see `split_positions`.

    Nobody can learn the class of a test record that is the only one of its class, so its label
    becomes -1, and probes leave it out.

    Args:
        labels: int[N], of all records.
        split: "train" or "test".

    Returns:
        The positions int64[M], their labels int[M], and how many of them became -1.
    """
    positions = split_positions(len(labels), split)
    chosen = labels[positions]
    alone = np.zeros(len(chosen), bool)
    if split == "test":
        alone = (chosen >= 0) & ~np.isin(chosen, np.delete(labels, positions))
    return positions, np.where(alone, -1, chosen), int(alone.sum())
