"""Splits and classes of a folder tree, from the names of its folders: see docs/data.md."""

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.source import SPLITS

# Words in the names of splits; of several test splits the one whose word is first here counts.
_TRAIN = ("train", "training", "trainval")
_TEST = ("test", "testing", "val", "validation", "valid", "dev", "eval", "evaluation")
_NEITHER = ("unlabeled", "unlabelled", "extra", "pred", "prediction", "predictions")
_SPLIT_WORDS = frozenset((*_TRAIN, *_TEST, *_NEITHER))
_FILLERS = frozenset(("set", "data", "dataset", "image", "images", "img", "imgs"))
_JOINED = re.compile(f"({'|'.join(_SPLIT_WORDS)})({'|'.join(_FILLERS)})")  # such as testset
_WORD = re.compile(r"[A-Z]*[^\W\d_A-Z]+|[A-Z]+")  # ends at a capital, a digit or a sign
OTHER_SPLIT = -2

Paths = dict[int, str]  # of folders, by their numbers; each ends in "/", except for "", the root


class Layout(NamedTuple):
    """The labels, class names and splits that follow from the names of the folders.

    Attributes:
        labels: for each split int32[folders]: the class of each folder, -1 where the split is
            unlabelled, `OTHER_SPLIT` where the folder does not belong to it.
        class_names: for each split, see `Source`.
        splits: the folders of the training and of the test split; None where records have to be
            held out.
        loose: the number of a folder whose images stand next to class folders; None where every
            image has a class, or none has.
        remarks: what a start should log.
    """

    labels: dict[str, np.ndarray]
    class_names: dict[str, tuple[str, ...] | None]
    splits: tuple[str, str] | None
    loose: int | None
    remarks: list[str]


def read_layout(folders: Sequence[str], root: str) -> Layout:
    """Find splits and classes.

    Args:
        folders: the paths of the folders that hold images, each ending in "/"; "" is the root.
        root: where they are, for messages.

    Raises:
        InputError: folders look like splits, but it is not clear which one is which.
    """
    inner = dict(enumerate(folders))
    place = f"{root}/"
    while top := _only_top(inner):  # a folder that holds everything
        inner, place = _below(inner, top), f"{place}{top}/"
    paths, splits, remarks = _divide(inner, place)
    classes = {split: {i: _top(path) for i, path in part.items()} for split, part in paths.items()}
    shown, alike = _shown_names([sorted({*found.values()} - {""}) for found in classes.values()])
    names = sorted({*shown.values()})
    numbers = {name: number for number, name in enumerate(names)}
    layout = Layout({}, {}, splits, None, [*remarks, *alike])
    for split, found in classes.items():
        labels = np.full(len(folders), OTHER_SPLIT, np.int32)
        labels[list(found)] = [numbers[shown[name]] if name else -1 for name in found.values()]
        layout.labels[split] = labels
        # A flat test folder is unlabelled, whatever classes the training folder has.
        layout.class_names[split] = tuple(names) if any(found.values()) else None
        loose = next((i for i, name in found.items() if not name), None)
        if loose is not None and len(found) > 1:
            layout = layout._replace(loose=loose)
    return layout


def _top(path: str) -> str:
    return path.partition("/")[0]


def _only_top(paths: Paths) -> str:
    """Return the folder that holds all others; "" where there is none."""
    tops = {_top(path) for path in paths.values()}
    return tops.pop() if len(tops) == 1 else ""


def _below(paths: Paths, top: str) -> Paths:
    front = f"{top}/"
    return {i: path.removeprefix(front) for i, path in paths.items() if path.startswith(front)}


def _divide(paths: Paths, place: str) -> tuple[dict[str, Paths], tuple[str, str] | None, list[str]]:
    """Return the paths of each split below its folder, these folders, and what to log of them."""
    parts: dict[str, Paths] = {}
    for i, path in paths.items():
        top, _, rest = path.partition("/")
        parts.setdefault(top, {})[i] = rest
    found = _find_splits(parts, place)
    if found is None:
        _check_no_splits_below(parts, place)
        return dict.fromkeys(SPLITS, paths), None, ["no splits, so a tenth is held out for testing"]
    train, tests = found
    learned = _split_paths(parts[train], train, ())
    known = {_folded(_top(path)) for path in learned.values()} - {""}
    held_out = {test: _split_paths(parts[test], test, known) for test in tests}
    shared = (t for t in tests if any(_folded(_top(p)) in known for p in held_out[t].values()))
    test = next(shared, tests[0])
    if len(same := [t for t in tests if _Name(t).word == _Name(test).word]) > 1:
        raise _unclear(same, place)
    remark = f"{train}/ is the training split, {test}/ the test split"
    if test != tests[0]:
        remark += f", as {tests[0]}/ has no class of {train}/"
    splits = dict(zip(SPLITS, (learned, held_out[test]), strict=True))
    return splits, (train, test), [] if (train, test) == SPLITS else [remark]


def _split_paths(paths: Paths, split: str, classes: Collection[str]) -> Paths:
    """Return the paths below a split, without folders as in train/images/ or seg_test/seg_test/."""
    while (top := _only_top(paths)) and _folded(top) not in classes:
        if top != split and (not _Name(top).words or _Name(top).rest):
            break
        paths = _below(paths, top)
    return paths


class _Name:
    """What the name of a folder says about splits.

    Attributes:
        words: its words, in small letters.
        word: the first one that tells a split; "" if there is none.
        rest: the words by which data sets, not splits, differ.
        plain: it is one word, which tells a split.
    """

    def __init__(self, name: str):
        found = _WORD.findall(unicodedata.normalize("NFC", name))
        words = [word.lower() for word in found]
        joined = ((word, _JOINED.fullmatch(word)) for word in words)
        self.words = [part for word, m in joined for part in (m.groups() if m else (word,))]
        self.word = next((word for word in self.words if word in _SPLIT_WORDS), "")
        self.rest = tuple(word for word in self.words if word not in _SPLIT_WORDS | _FILLERS)
        self.plain = name.lower() == self.word


def _find_splits(tops: Collection[str], place: str) -> tuple[str, list[str]] | None:
    """Return the folder of the training split and those of test splits; None where none is one.

    Raises:
        InputError: the folders look like splits, but it is not clear which one is which.
    """
    named = {top: name for top in tops if (name := _Name(top)).word}
    alike: dict[tuple[str, ...], list[str]] = {}  # seg_train and seg_test are
    for top, name in named.items():
        alike.setdefault(name.rest, []).append(top)
    plain = [top for top, name in named.items() if name.plain]
    for group in (plain, alike.get((), [])):
        if all(found := _by_word(group)):
            break
    else:
        pairs = [found for group in alike.values() if all(found := _by_word(group))]
        if not pairs and 2 * len(named) <= len(tops):
            return None  # classes, one of them perhaps called "train"
        if len(pairs) != 1:
            raise _unclear(named, place)
        found = pairs[0]
    train, test = found
    if len(train) > 1:
        raise _unclear(train, place)
    return train[0], test


def _by_word(tops: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the folders of training splits and those of test splits, the preferred ones first."""
    words = {top: _Name(top).word for top in tops}
    train, test = (
        sorted((top for top in words if words[top] in known), key=lambda t: known.index(words[t]))
        for known in (_TRAIN, _TEST)
    )
    return train, test


def _unclear(tops: Iterable[str], place: str) -> InputError:
    names = ", ".join(f"{top}/" for top in sorted(tops))
    return InputError(
        f"folder: {names} in {place} look like splits, but it is not clear which one is for "
        "training and which one for testing; expected one train/ and one test/ or val/, or names "
        "such as seg_train/ and seg_test/. Rename them, or move what is not meant elsewhere; if "
        "they are classes, give them names without these words"
    )


def _check_no_splits_below(parts: Mapping[str, Paths], place: str) -> None:
    """Check that no folder beside others has a train/ and a test/ of its own."""
    for name, inner in sorted(parts.items()):
        while only := _only_top(inner):
            inner, name = _below(inner, only), f"{name}/{only}"
        if all(_by_word(top for top in map(_top, inner.values()) if top and _Name(top).plain)):
            raise InputError(
                f"folder: {place}{name}/ has splits of its own, beside other folders with images. "
                f"Name the folder that is meant, as in folder:{place}{name}, or move all training "
                "images into one train/ and all test images into one test/, each with a folder "
                "for every class"
            )


def _shown_names(splits: Iterable[Sequence[str]]) -> tuple[dict[str, str], list[str]]:
    """Return the class name that is shown for each folder's name, and what to log of them.

    Names that differ in Unicode normalisation are of one class, and so are those that differ in
    case, unless they stand in one split, as "A" and "a" do for letters.

    Args:
        splits: the names in each split; the name in the first one is shown.
    """
    cased: dict[str, set[str]] = {}
    for names in splits:
        spellings: dict[str, set[str]] = {}
        for name in names:
            spellings.setdefault(_folded(name), set()).add(unicodedata.normalize("NFC", name))
        cased |= {folded: found for folded, found in spellings.items() if len(found) > 1}
    first: dict[str, str] = {}
    shown = {}
    for name in itertools.chain(*splits):
        folded = _folded(name)
        key = unicodedata.normalize("NFC", name) if folded in cased else folded
        shown[name] = first.setdefault(key, name)
    alike = "; ".join(", ".join(sorted(found)) for found in cased.values())
    return shown, [f"classes whose names differ in case only: {alike}"] if alike else []


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
