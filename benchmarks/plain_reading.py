"""What a person reads from a tree of images or from arrays, by "Layouts" in docs/data.md.

Nothing of the program's own reading is used, but for the rule which tenth is held out. Where the
page leaves room, several readings are given; None stands for a refusal.
"""

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nat_jax.input.sources.source import split_positions

SUFFIXES = {
    *("jpg", "jpeg", "jpe", "jfif", "jif", "mpo", "png", "apng", "bmp", "dib", "webp", "gif"),
    *("tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
}
SYSTEM = {
    *("@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"),
}
TRAIN = ("train", "training", "trainval")
TEST = ("test", "testing", "val", "validation", "valid", "dev", "eval", "evaluation")
SPLIT_WORDS = {
    *(*TRAIN, *TEST, "unlabeled", "unlabelled", "extra", "pred", "prediction", "predictions")
}
FILLERS = {"set", "data", "dataset", "image", "images", "img", "imgs"}
JOINED = {word + filler: [word, filler] for word in SPLIT_WORDS for filler in FILLERS}  # "testset"
# Arrays of an .npz: training images, their labels, test images, their labels.
ARRAYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    *(("x", "y", "", ""), ("image", "label", "", ""), ("images", "labels", "", "")),
)
UNSEEN = "?.jpg"  # what may be in a folder that cannot be listed

Paths = Mapping[str, tuple[str, ...]]  # of each record, the parts of its path that are left
Labels = dict[str, str | None]


class Reading(NamedTuple):
    """The records of both splits with the class of each, None where it has none.

    Attributes:
        splits: the names of their folders; () where a tenth is held out.
        beside: how many images are in neither.
    """

    train: Labels
    test: Labels
    splits: tuple[str, ...] = ()
    beside: int = 0


class Refused(Exception):
    """By the page, the start ends."""


def of_tree(
    files: Collection[str], locked: Iterable[str] = (), notes: str = "", *, scored: bool = True
) -> list[Reading | None]:
    """Return the readings of a tree.

    Args:
        files: their paths below the root.
        locked: folders that cannot be listed, each ending in "/".
        notes: the text of val/val_annotations.txt.
        scored: there are probes.
    """
    named = dict(line.split("\t")[:2] for line in notes.splitlines())
    paths = {}
    for path in sorted((*files, *(folder + UNSEEN for folder in locked))):
        *above, last = path.split("/")
        if any(part.startswith(".") for part in (*above, last)) or SYSTEM & {
            *map(str.lower, above)
        }:
            continue
        if last.lower().rpartition(".")[2] in SUFFIXES:
            if named and above[-2:] == ["val", "images"]:
                above[-1] = named[last]
            paths[path] = (*above, last)
    hidden = sum(path.endswith(UNSEEN) for path in paths)
    found: list[Reading | None] = []
    try:
        for reading in _readings(_looked_through(paths)):
            if reading and any(path.endswith(UNSEEN) for path in (*reading.train, *reading.test)):
                reading = None
            reading = reading and reading._replace(beside=reading.beside - hidden)
            found.append(_scored(reading) if scored else reading)
    except Refused:
        found.append(None)
    return found


def of_arrays(
    arrays: Mapping[str, np.ndarray], keys: Sequence[str], *, scored: bool = True
) -> list[Reading | None]:
    """Return the readings of arrays.

    Args:
        arrays: by name.
        keys: the names of training images, their labels, test images, their labels.
        scored: there are probes.
    """
    parts: list[Labels] = []
    for x, y in zip(keys[::2], keys[1::2], strict=True):
        if x in arrays:
            images, labels = arrays[x], arrays.get(y, np.full(len(arrays[x]), -1))
            if images.dtype != np.uint8 or images.shape[3:] not in ((), (1,), (3,), (4,)):
                return [None]
            if labels.dtype.kind not in "iu" or labels.size != len(images) or labels.min() < -1:
                return [None]
            names = (None if label == -1 else str(label) for label in labels.ravel().tolist())
            parts.append({f"{x}[{i}]": name for i, name in enumerate(names)})
    if len(parts) == 1:
        parts = _held_out(parts[0])
    return [_scored(Reading(*parts)) if scored else Reading(*parts)]


def _scored(reading: Reading | None) -> Reading | None:
    """Return a reading if what is to be scored can be learned."""
    if reading is None:
        return None
    learned, asked = ({*part.values()} - {None} for part in reading[:2])
    return None if learned and asked and (len(learned) == 1 or asked - learned) else reading


def _held_out(labels: Labels) -> list[Labels]:
    """Return both splits, where no record is asked for the class of which it is the only one."""
    rows = list(labels.items())
    if len(rows) < 2:
        raise Refused
    train, test = (dict(rows[i] for i in split_positions(len(rows), s)) for s in ("train", "test"))
    learned = {*train.values()}
    return [train, {path: name if name in learned else None for path, name in test.items()}]


def _readings(paths: Paths) -> Iterator[Reading | None]:
    if not paths:
        raise Refused
    tops = _tops(paths)
    pairs = _splits(tops)
    for train, tests in pairs:
        yield from _divided(paths, train, tests)
    if len(pairs) > 1:
        yield None
    if pairs:
        return
    for top in tops:
        inner = _tops(_looked_through(_below(paths, top)))
        if all(any(name.lower() in words for name in inner) for words in (TRAIN, TEST)):
            raise Refused
        if any(map(_word, inner)):
            yield None
    labels = _classes(paths)
    same = _same([labels.values()])
    yield Reading(*_held_out({path: same[name] for path, name in labels.items()}))


def _splits(tops: Collection[str]) -> list[tuple[str, list[str]]]:
    """Return the folder for training and those for testing, of each pair that may be meant."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for top in filter(_word, tops):
        alike.setdefault(_rest(top), []).append(top)
    plain = [top for top in tops if top.lower() == _word(top)]
    groups = [plain] if all(_sides(plain)) else [*alike.values()]
    pairs = [sides for sides in map(_sides, groups) if all(sides)]
    if any(len(train) > 1 for train, _ in pairs):
        raise Refused
    if not pairs and 2 * len([*filter(_word, tops)]) > len(tops):
        raise Refused
    return [(train, tests) for [train], tests in pairs]


def _sides(tops: Iterable[str]) -> tuple[list[str], list[str]]:
    words = {top: _word(top) for top in sorted(tops)}
    return [t for t in words if words[t] in TRAIN], [t for t in words if words[t] in TEST]


def _divided(paths: Paths, train: str, tests: list[str]) -> Iterator[Reading | None]:
    """Yield the readings with a training split and one of several test splits."""
    ranks = [TEST.index(_word(top)) for top in tests]
    if len({*ranks}) < len(ranks):  # of two for the same purpose either may be meant
        yield None
    learned = _within(_below(paths, train), train, set())
    if learned is None:
        raise Refused
    names = _folds(learned)
    for order in itertools.permutations(tests):
        if [TEST.index(_word(top)) for top in order] != sorted(ranks):
            continue
        parts = [_within(_below(paths, top), top, names) for top in order]
        if None in parts:
            yield None
        top, asked = next(
            (p for p in zip(order, parts, strict=True) if names & _folds(p[1])),
            (order[0], parts[0]),
        )
        if asked is not None:
            same = _same([learned.values(), asked.values()])
            both = ({p: same[name] for p, name in part.items()} for part in (learned, asked))
            yield Reading(*both, (train, top), len(paths) - len(learned) - len(asked))


def _folds(labels: Labels | None) -> set[str]:
    return {_folded(name) for name in (labels or {}).values() if name}


def _within(paths: Paths, split: str, known: Collection[str]) -> Labels | None:
    """Return the labels of a split; None where images are loose beside folders."""
    top = _only_top(paths)
    try:
        labels = _classes(paths)
    except Refused:
        return None
    if top is None or _folded(top) in known or (top != split and (not _words(top) or _rest(top))):
        return labels
    return _within(_below(paths, top), split, known)


def _classes(paths: Paths) -> Labels:
    if len({len(parts) > 1 for parts in paths.values()}) > 1:
        raise Refused
    return {path: parts[0] if len(parts) > 1 else None for path, parts in paths.items()}


def _same(splits: Iterable[Iterable[str | None]]) -> dict[str | None, str | None]:
    """Return the class that each name stands for, spelled as in the first split that has it."""
    found = [sorted({name for name in names if name}) for names in splits]
    cased = set()  # names that one split has in several cases
    for names in found:
        spelled = [_folded(name) for name in {*map(_composed, names)}]
        cased |= {name for name in spelled if spelled.count(name) > 1}
    first: dict[str, str] = {}
    same: dict[str | None, str | None] = {None: None}
    for name in itertools.chain(*found):
        key = _composed(name) if _folded(name) in cased else _folded(name)
        same[name] = first.setdefault(key, _composed(name))
    return same


def _looked_through(paths: Paths) -> Paths:
    while (top := _only_top(paths)) is not None:
        paths = _below(paths, top)
    return paths


def _only_top(paths: Paths) -> str | None:
    tops = {parts[0] if len(parts) > 1 else None for parts in paths.values()}
    return tops.pop() if len(tops) == 1 else None


def _tops(paths: Paths) -> list[str]:
    return sorted({parts[0] for parts in paths.values() if len(parts) > 1})


def _below(paths: Paths, top: str) -> Paths:
    return {p: parts[1:] for p, parts in paths.items() if len(parts) > 1 and parts[0] == top}


def _words(name: str) -> list[str]:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W\d_]+", " ", _composed(name)).lower().split()
    return [part for word in words for part in JOINED.get(word, [word])]


def _word(name: str) -> str:
    """Return the first word of a name that tells a split, or ""."""
    return next((word for word in _words(name) if word in SPLIT_WORDS), "")


def _rest(name: str) -> tuple[str, ...]:
    return tuple(word for word in _words(name) if word not in SPLIT_WORDS | FILLERS)


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _folded(name: str) -> str:
    return _composed(name).casefold()
