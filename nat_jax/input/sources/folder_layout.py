"""Splits and classes of a folder tree, from the names of its folders."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nat_jax.input.sources.source import SPLITS

_TEST_FOLDERS = ("test", "val", "validation", "valid")  # in any case; the first one found counts
OTHER_SPLIT = -2


class Layout(NamedTuple):
    """The labels, class names and test split that follow from the names of the folders.

    Attributes:
        labels: for each split int32[folders]: the class of each folder, -1 where the split is
            unlabelled, `OTHER_SPLIT` where the folder does not belong to it.
        class_names: for each split, see `Source`.
        test: the folder of the test split; None where records have to be held out.
        loose: the number of a folder whose images stand next to class folders; None where every
            image has a class, or none has.
    """

    labels: dict[str, np.ndarray]
    class_names: dict[str, tuple[str, ...] | None]
    test: str | None
    loose: int | None


def read_layout(folders: Sequence[str]) -> Layout:
    """Find splits and classes.

    Args:
        folders: the paths of the folders that hold images, each ending in "/"; "" is the root.
    """
    inner = list(folders)  # without the folders that hold everything
    while len(tops := {path.partition("/")[0] for path in inner}) == 1 and "" not in tops:
        inner = [path.partition("/")[2] for path in inner]
    named = {top.lower(): top for top in sorted(tops, reverse=True)}
    train = named.get("train")
    test = next((named[name] for name in _TEST_FOLDERS if name in named), None)
    if train is None or test is None:
        test = None
        paths = dict.fromkeys(SPLITS, dict(enumerate(inner)))
    else:
        parts = [path.partition("/") for path in inner]
        paths = {
            split: {i: rest for i, (top, _, rest) in enumerate(parts) if top == own}
            for split, own in zip(SPLITS, (train, test), strict=True)
        }
    classes = {s: {i: p.partition("/")[0] for i, p in found.items()} for s, found in paths.items()}
    names = sorted({name for found in classes.values() for name in found.values() if name})
    numbers = {name: number for number, name in enumerate(names)} | {"": -1}
    layout = Layout({}, {}, test, None)
    for split, found in classes.items():
        labels = np.full(len(folders), OTHER_SPLIT, np.int32)
        labels[list(found)] = [numbers[name] for name in found.values()]
        layout.labels[split] = labels
        # A flat test folder is unlabelled, whatever classes the training folder has.
        layout.class_names[split] = tuple(names) if any(found.values()) else None
        loose = next((i for i, name in found.items() if not name), None)
        if loose is not None and len(found) > 1:
            layout = layout._replace(loose=loose)
    return layout
