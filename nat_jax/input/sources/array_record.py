"""Images in array_record files: those of TensorFlow Datasets, of the task `convert`, and others."""

import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.metadata import (
    FEATURES,
    INFO,
    Metadata,
    SplitMetadata,
    class_names_file,
    read_class_names,
    read_metadata,
)
from nat_jax.input.sources.shards import Fields, Shards, content, guess_fields
from nat_jax.input.sources.source import Record, UnreadableRecord, split_positions

_log = logging.getLogger(__name__)

_SUFFIX = re.compile(r"\.(array_record|arrayrecord)(?=$|[.-])")
_NUMBER = re.compile(r"-(\d+)-of-(\d+)")
_TEST_KEYS = ("test", "validation", "val", "valid")
_SHOWN = 3  # names in a message
_TRIED = 16  # records, before a data set counts as unreadable


class _Group(NamedTuple):
    """The shards of one split: those to read, and those that have to be there."""

    paths: tuple[Path, ...]
    expected: tuple[Path, ...]


_Groups = dict[str, _Group]


class ArrayRecordSource:
    """Encoded images in array_record files.

    Args:
        name: the specification it was opened with.
        split: "train" or "test".
        shards: the files.
        fields: where image, label and name stand in a record.
        key: what the data set calls the split; "" where it has no splits.
        positions: int64[N], the records of the files that belong to this split; None: all.
        fingerprint: see `Source`.
        class_names: see `Source`.
        labels: see `Source`.
    """

    def __init__(
        self,
        name: str,
        split: str,
        shards: Shards,
        fields: Fields,
        *,
        key: str,
        positions: np.ndarray | None,
        fingerprint: str,
        class_names: tuple[str, ...] | None,
        labels: np.ndarray | None,
    ):
        self.name = name
        self.split = split
        self.fingerprint = fingerprint
        self.class_names = class_names
        self.num_classes = None if class_names is None else len(class_names)
        self.labels = labels
        self._shards = shards
        self._fields = fields
        self._key = key
        self._positions = positions

    def __len__(self) -> int:
        return len(self._shards) if self._positions is None else len(self._positions)

    def __getitem__(self, index: int) -> Record:
        position = self._position(index)
        try:
            found = content(self._shards.read(position), self._fields)
        except (RuntimeError, ValueError) as error:
            label = -1 if self.labels is None else int(self.labels[index])
            raise UnreadableRecord(self.record_name(index), label, str(error)) from error
        name = self.record_name(index) if found.name is None else found.name
        if not found.image:
            raise UnreadableRecord(name, found.label, "empty; its file was unreadable or empty")
        return {"index": index, "name": name, "label": found.label, "image": found.image}

    def record_name(self, index: int) -> str:
        return f"{self.name} {self._key}[{self._position(index)}]"

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        return int(index if self._positions is None else self._positions[index])


def open_array_record(argument: str, split: str) -> ArrayRecordSource:
    """Open `arrayrecord:GLOB`: shards by a pattern, one file, or a folder of them.

    Names tell the splits, as in NAME-train.array_record-00000-of-00008, which TensorFlow Datasets
    writes, or train-00000-of-00008.array_record. Where there is no `test` with labels, `validation`
    or `val` is the test split; where there is neither, a tenth by index hash is held out. A
    record's index is its position over the shards of its split in order.

    Raises:
        ValueError: nothing is there, a shard is missing or damaged, or the records have no image.
    """
    name = f"arrayrecord:{argument}"
    path = Path(argument).expanduser().absolute()  # notebooks change their folder
    found = _find(path)
    if not found:
        raise InputError(
            f"{name}: no such file, and no file matches; expected a pattern, a file, or a folder "
            "with *.array_record* files. To make them from a folder or a .zip of images: "
            "--config.task=convert --config.data.source=folder:PATH --config.convert.to=DIR"
        )
    parents = {file.parent for file in found}
    directory = parents.pop() if len(parents) == 1 else None
    metadata = None if directory is None else read_metadata(directory, name)
    groups: _Groups = {}
    if metadata is not None:
        groups = _group_by_metadata(found, metadata, name, whole=path.is_dir())
    if not groups:
        metadata = None
        groups = _group_by_names(found, name)
    layout = _Layout(name, groups, metadata, directory)
    return _open_split(layout, split, may_hold_out=True)


def _find(path: Path) -> list[Path]:
    """Find files by a pattern, a file's name or a folder's; where some are shards, only those."""
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(f for f in found if f.is_file() and not f.name.startswith("."))
    shards = [file for file in files if _SUFFIX.search(file.name)]
    return shards if shards or path.is_dir() else files


def open_prepared(directory: Path, split: str, name: str) -> ArrayRecordSource:
    """Open a folder that TensorFlow Datasets prepared, with the splits that it has.

    Args:
        directory: the folder, which holds dataset_info.json and features.json.
        split: "train" or "test".
        name: the specification, for messages.

    Raises:
        ValueError: a split or a shard is missing or damaged, or the records have no image.
    """
    metadata = read_metadata(directory, name)
    if metadata is None:
        raise InputError(f"{name}: no {INFO} and {FEATURES} in {directory}")
    groups = {key: _Group(known.paths, known.paths) for key, known in metadata.splits.items()}
    return _open_split(_Layout(name, groups, metadata, directory), split, may_hold_out=False)


class _Layout(NamedTuple):
    """Shards by the name of their split, and what is known of them."""

    name: str
    groups: _Groups
    metadata: Metadata | None
    directory: Path | None

    def known(self, key: str) -> SplitMetadata | None:
        """Give what is known of a split of which all shards are used."""
        known = None if self.metadata is None else self.metadata.splits[key]
        return known if known is not None and known.paths == self.groups[key].paths else None

    def open(self, key: str) -> tuple[Shards, Fields]:
        """Open a split's shards; compare them with what is known, and look at the first record.

        Raises:
            ValueError: a shard is damaged, or a record is not one that can be used.
        """
        _check_missing(self.groups[key].expected, self.name)
        shards = Shards(self.groups[key].paths)
        if self.metadata is not None:
            declared = self.metadata.splits[key]
            expected = dict(zip(declared.paths, declared.lengths, strict=True))
            for path, length in zip(shards.paths, shards.lengths, strict=True):
                if length != expected[path]:
                    raise InputError(
                        f"{self.name}: {path} has {length} records; dataset_info.json says "
                        f"{expected[path]}. Copy or prepare the data once more"
                    )
        if not len(shards):
            raise InputError(f"{self.name}: no records in {_some(shards.paths)}")
        fields = None if self.metadata is None else self.metadata.fields
        try:
            first = _first_readable(shards)
            fields = guess_fields(first) if fields is None else fields
            content(first, fields)
        except ValueError as error:
            raise InputError(f"{self.name}: {shards.paths[0].name}: {error}") from error
        return shards, fields

    def class_names(self, key: str, fields: Fields) -> tuple[str, ...] | None:
        """Name the classes of a split, from the metadata or from a list beside the shards."""
        if self.metadata is not None:
            return self.metadata.splits[key].class_names
        if fields.label is None or self.directory is None:
            return None
        names = read_class_names(self.directory, fields.label)
        if names is None:
            _log.info(
                "%s: labels are left out, because nothing says how many classes there are (neither "
                "%s nor %s, one name a line, stands beside the shards)",
                self.name,
                FEATURES,
                class_names_file(self.directory, fields.label).name,
            )
        return names


def _first_readable(shards: Shards) -> bytes:
    """Give one of the first records; a few damaged ones do not make a data set unusable.

    Raises:
        ValueError: none of them can be read.
    """
    problem: Exception | None = None
    for position in range(min(len(shards), _TRIED)):
        try:
            return shards.read(position)
        except RuntimeError as error:
            problem = problem or error
    raise InputError(f"none of the first records can be read: {problem}") from problem


def _open_split(layout: _Layout, split: str, *, may_hold_out: bool) -> ArrayRecordSource:
    key, held_out = _choose(layout, split, may_hold_out)
    shards, fields = layout.open(key)
    known = layout.known(key)
    class_names = layout.class_names(key, fields)
    positions = split_positions(len(shards), split) if held_out else None
    labels = None if known is None else known.labels
    if known is not None and positions is None:
        fingerprint = known.fingerprint
    else:
        identity = [shards.identity() if known is None else known.fingerprint, key]
        identity += [split] if held_out else []
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return ArrayRecordSource(
        layout.name,
        split,
        shards,
        # A label is worth nothing where the number of classes is not known.
        fields if class_names is not None else fields._replace(label=None),
        key=key,
        positions=positions,
        fingerprint=fingerprint,
        class_names=class_names,
        labels=labels if labels is None or positions is None else labels[positions],
    )


def _choose(layout: _Layout, split: str, may_hold_out: bool) -> tuple[str, bool]:
    """Choose the split's name among those that are there; say whether a tenth is held out of it."""
    tests = [key for key in _TEST_KEYS if key in layout.groups]
    if split == "test" and tests:
        if tests[0] == "test" and len(tests) > 1:
            # imagenet2012's test images have the label -1: not known.
            shards, fields = layout.open("test")
            if fields.label is not None and content(_first_readable(shards), fields).label < 0:
                return tests[1], False
        return tests[0], False
    if "train" in layout.groups and (split == "train" or may_hold_out):
        return "train", may_hold_out and not tests
    if may_hold_out and not tests and len(layout.groups) == 1:
        return next(iter(layout.groups)), True
    wanted = "train" if split == "train" else "test or validation"
    found = ", ".join(key or "shards without a name of a split" for key in layout.groups)
    raise InputError(f"{layout.name}: no {wanted} split; prepared: {found or 'none'}")


def _group_by_metadata(
    paths: Sequence[Path], metadata: Metadata, name: str, *, whole: bool
) -> _Groups:
    """Group shards as dataset_info.json says; give nothing where it speaks of other files.

    Args:
        paths: what was found.
        metadata: what stands beside them.
        name: for messages.
        whole: all of the data set is wanted, rather than the splits that a pattern chose.
    """
    given, groups = set(paths), {}
    for key, known in metadata.splits.items():
        chosen = tuple(path for path in known.paths if path in given)
        if chosen or whole:
            groups[key] = _Group(known.paths if whole else chosen, known.paths)
        if chosen and not whole and len(chosen) < len(known.paths):
            _log.info("%s: %d of %d shards of %s", name, len(chosen), len(known.paths), key)
    used = {path for group in groups.values() for path in group.paths}
    if not used & given:
        return {}
    if given - used:
        count = len(given - used)
        _log.info("%s: left out %d file(s) that are not in dataset_info.json", name, count)
    return groups


def _group_by_names(paths: Sequence[Path], name: str) -> _Groups:
    """Group shards by their names; those that name no split are a group called ""."""
    sets: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        stem = _NUMBER.sub("", _SUFFIX.sub("", path.name))
        sets.setdefault((path.parent, stem), []).append(path)
    groups: _Groups = {}
    for (_, stem), members in sorted(sets.items()):
        members.sort(key=_number)
        totals = {total for _, total in map(_number, members)}
        if len(totals) > 1:
            raise InputError(
                f"{name}: shards of several sets: {', '.join(map(str, sorted(totals)))} shards "
                f"of {stem} in all; choose one by a pattern, such as '*-of-{max(totals):05}*'"
            )
        last = re.split(r"[-_.]", stem)[-1]
        key = last if last in ("train", *_TEST_KEYS) else ""
        before = groups.get(key, _Group((), ()))
        groups[key] = _Group((*before.paths, *members), (*before.expected, *_whole_set(members[0])))
    if "" in groups and len(groups) > 1:
        _log.info(
            "%s: left out %d file(s) whose names tell no split, such as %s",
            name,
            len(groups[""].paths),
            groups[""].paths[0].name,
        )
        del groups[""]
    return groups


def _number(path: Path) -> tuple[int, int]:
    """Give a shard's number and how many its name says there are; (0, 1) for a single file."""
    match = _NUMBER.search(path.name)
    return (int(match[1]), int(match[2])) if match else (0, 1)


def _whole_set(path: Path) -> Sequence[Path]:
    """Give the paths of all shards of the set that one belongs to."""
    match = _NUMBER.search(path.name)
    if match is None:
        return (path,)
    before, after = path.name[: match.start(1)], path.name[match.end(1) :]
    width = len(match[1])
    return [path.with_name(f"{before}{i:0{width}}{after}") for i in range(int(match[2]))]


def _check_missing(paths: Sequence[Path], name: str) -> None:
    there = {directory: set(os.listdir(directory)) for directory in {p.parent for p in paths}}
    missing = [path for path in paths if path.name not in there[path.parent]]
    if missing:
        raise InputError(
            f"{name}: {len(missing)} of {len(paths)} shards are missing in {missing[0].parent}: "
            f"{_some(missing)}. Copy or make them once more"
        )


def _some(paths: Sequence[Path]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(path.name for path in paths[:_SHOWN]) + more
