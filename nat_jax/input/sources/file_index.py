"""The index of a folder or .zip of images: what every record is, in a few packed arrays."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.file_listing import Group, Listing, Stamp, decoded, encoded
from nat_jax.input.sources.source import SPLITS, split_positions

_TEST_FOLDERS = ("test", "val", "validation", "valid")  # in any case; the first that is there
_CHUNK = 2**16


class Files(NamedTuple):
    """The files of one split in order, without a Python object for any.

    A file costs 20 bytes and its name, one more for a NUL: 57 bytes, or 73 MB in all, for the
    1,281,167 of ImageNet's training set, whose names ("train/n01440764/n01440764_10026.JPEG") have
    36. In a .zip it costs 22 more. Where the index is kept these bytes are mapped from a file, so
    the processes of a machine share them, and only what is looked at takes memory.

    Attributes:
        names: uint8[total], the path of each below the root in UTF-8, every one followed by a NUL.
        starts: int64[N + 1], where in `names` each begins, and the end.
        sizes: int64[N], bytes of each.
        labels: int32[N], -1 where unlabelled.
        members: where each lies in a .zip, [N] of `zip_archive.MEMBER`; None in a folder.
    """

    names: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    members: np.ndarray | None

    def name(self, position: int) -> str:
        """Give the path of one file below the root, with "/"."""
        start, end = int(self.starts[position]), int(self.starts[position + 1])
        return decoded(self.names[start : end - 1].tobytes())

    def take(self, chosen: np.ndarray, labels: np.ndarray) -> "Files":
        """Keep some files in their order.

        Args:
            chosen: bool[N].
            labels: int32, of those that are kept.
        """
        lengths = np.diff(self.starts)
        names = self.names[np.repeat(chosen, lengths)]
        members = None if self.members is None else self.members[chosen]
        return Files(names, _starts(lengths[chosen]), self.sizes[chosen], labels, members)


@dataclass(frozen=True)
class SplitIndex:
    """What is known of one split without reading a record.

    Attributes:
        files: its files.
        class_names: see `Source`.
        fingerprint: see `Source`.
    """

    files: Files
    class_names: tuple[str, ...] | None
    fingerprint: str


@dataclass(frozen=True)
class FileIndex:
    """What is known of a folder or .zip without reading a record.

    Attributes:
        splits: by name.
        remarks: what was left out, in words, with {root} for the path.
        stamp: what the root looked like when it was listed.
        kept: the folder of the cache that it lies in; None where it is in memory only.
    """

    splits: Mapping[str, SplitIndex]
    remarks: Sequence[str]
    stamp: Stamp
    kept: Path | None


def build_index(listing: Listing, root: str) -> FileIndex:
    """Sort a listing, divide it into the splits and label it.

    Args:
        listing: all images, of which there is at least one.
        root: what messages call the data.

    Raises:
        ValueError: the layout is not one of those that `open_folder` knows.
    """
    files, group_of = _packed(listing.groups)
    remarks = []
    if listing.others:
        remarks.append(f"left out {listing.others} file(s) of {{root}} that are not images")
    layout = _Layout(listing.groups, root)
    if layout.outside:
        remarks.append(f"left out {layout.outside} image(s) outside train/ and {layout.test}/")
    splits = {}
    for split in SPLITS:
        if layout.test is None:
            chosen = np.zeros(len(group_of), bool)
            chosen[split_positions(len(group_of), split)] = True
        else:
            chosen = layout.belongs(split)[group_of]
        class_names, label_of = layout.classes(split)
        taken = files.take(chosen, label_of[group_of[chosen]])
        splits[split] = SplitIndex(taken, class_names, _fingerprint(split, class_names, taken))
    return FileIndex(splits, remarks, listing.stamp, None)


def _packed(groups: Sequence[Group]) -> tuple[Files, np.ndarray]:
    """Put all files in the order of their paths, unlabelled, and say which group each is of."""
    names, sizes, members, group_of = [], [], [], []
    for number, start, stop in _in_order(groups):
        prefix, inside, all_sizes, all_members = groups[number]
        count = stop - start
        if count < len(all_sizes):
            inside = b"\0".join(inside.split(b"\0")[start:stop])
        front = encoded(prefix)
        names.append(front + inside.replace(b"\0", b"\0" + front) + b"\0")
        sizes.append(all_sizes[start:stop])
        if all_members is not None:
            members.append(all_members[start:stop])
        group_of.append(np.full(count, number, np.int32))
    joined = np.frombuffer(b"".join(names), np.uint8)
    ends = np.flatnonzero(joined == 0) + 1
    starts = np.concatenate([np.zeros(1, np.int64), ends])
    labels = np.full(len(ends), -1, np.int32)
    all_members = np.concatenate(members) if members else None
    files = Files(joined, starts, np.concatenate(sizes), labels, all_members)
    return files, np.concatenate(group_of)


def _in_order(groups: Sequence[Group]) -> Iterator[tuple[int, int, int]]:
    """Yield runs of files, as number of the group, start and stop, in the order of their paths.

    Whole groups are compared by their first paths. Only where a folder has images and folders with
    images, such as "a.jpg", "b/c.jpg" and "d.jpg", its run is cut where those come.
    """
    below: dict[str, set[str]] = {}
    for group in groups:
        prefix = group.prefix
        while prefix:
            parent, slash, _ = prefix[:-1].rpartition("/")
            parent += slash
            child = prefix[len(parent) :]
            known = below.setdefault(parent, set())
            if child in known:
                break
            known.add(child)
            prefix = parent
    runs = []
    for number, group in enumerate(groups):
        front, names, count = encoded(group.prefix), group.names, len(group.sizes)
        inside = [names.partition(b"\0")[0]]
        cuts = {0, count}
        if group.prefix in below:
            inside = names.split(b"\0")
            cuts |= {bisect_left(inside, encoded(child)) for child in below[group.prefix]}
        ordered = sorted(cuts)
        for start, stop in zip(ordered, ordered[1:], strict=False):
            runs.append((front + inside[start], number, start, stop))
    for _, number, start, stop in sorted(runs):
        yield number, start, stop


class _Layout:
    """Splits and classes, as the names of the folders say.

    Attributes:
        test: the folder of the test split; None where it is to be held out.
        outside: how many images are in neither split.
    """

    def __init__(self, groups: Sequence[Group], root: str):
        self._groups = groups
        self._root = root
        self.test: str | None = None
        self.outside = 0
        # Paths without the folders that hold everything.
        self._inner = [g.prefix for g in groups]
        while len(tops := set(map(_top, self._inner))) == 1 and "" not in tops:
            self._inner = [inner.partition("/")[2] for inner in self._inner]
        named = {top.lower(): top for top in sorted(tops, reverse=True)}
        self._train = named.get("train")
        if self._train is not None:
            self.test = next((named[name] for name in _TEST_FOLDERS if name in named), None)
        if self.test is not None:
            inside = self.belongs("train") | self.belongs("test")
            counts = [len(g.sizes) for g in groups]
            self.outside = sum(n for n, known in zip(counts, inside, strict=True) if not known)

    def belongs(self, split: str) -> np.ndarray:
        """Say which groups are of a split that has its own folder: bool[groups]."""
        folder = self._train if split == "train" else self.test
        return np.asarray([_top(inner) == folder for inner in self._inner])

    def classes(self, split: str) -> tuple[tuple[str, ...] | None, np.ndarray]:
        """Give the names of the classes, None where unlabelled, and int32[groups], the labels."""
        if self.test is None:
            own = self._classes(dict(enumerate(self._inner)))
            names = set(own.values())
        else:
            both = {s: self._classes(self._paths_in(s)) for s in SPLITS}
            own = both[split]
            names = set().union(*(found.values() for found in both.values())) if own else set()
        ordered = sorted(names)
        number_of = {name: number for number, name in enumerate(ordered)}
        labels = np.full(len(self._groups), -1, np.int32)
        for group, name in own.items():
            labels[group] = number_of[name]
        return tuple(ordered) or None, labels

    def _paths_in(self, split: str) -> dict[int, str]:
        numbers = np.flatnonzero(self.belongs(split)).tolist()
        return {number: self._inner[number].partition("/")[2] for number in numbers}

    def _classes(self, paths: Mapping[int, str]) -> dict[int, str]:
        """Give the class of each group by its path; nothing for a flat folder."""
        flat = [number for number, path in paths.items() if not path]
        if not flat:
            return {number: path.partition("/")[0] for number, path in paths.items()}
        if len(paths) > 1:
            group = self._groups[flat[0]]
            first = group.prefix + decoded(group.names.partition(b"\0")[0])
            raise InputError(
                f"folder: {self._root} mixes {len(group.sizes)} loose images (such as {first}) "
                "with class folders; put every image into a class folder, or all into one folder "
                "(unlabelled)"
            )
        return {}


def _top(path: str) -> str:
    return path.partition("/")[0]


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _fingerprint(split: str, class_names: tuple[str, ...] | None, files: Files) -> str:
    digest = sha256(f"{split} {class_names}\n".encode())
    for start in range(0, len(files.sizes), _CHUNK):
        end = min(start + _CHUNK, len(files.sizes))
        names = files.names[files.starts[start] : files.starts[end]].tobytes()[:-1].split(b"\0")
        sizes, labels = files.sizes[start:end].tolist(), files.labels[start:end].tolist()
        lines = zip(names, sizes, labels, strict=True)
        digest.update(b"".join(b"%b\0%d\0%d\n" % line for line in lines))
    return digest.hexdigest()
