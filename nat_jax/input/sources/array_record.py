"""Images in array_record files: those of TensorFlow Datasets, of the task `convert`, and others."""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nat_jax.errors import InputError, some_of
from nat_jax.input.sources.examples import Fields, content, guess_fields
from nat_jax.input.sources.metadata import SplitShards, read_metadata
from nat_jax.input.sources.shards import Shards
from nat_jax.input.sources.source import Record, UnreadableRecord, split_positions

_log = logging.getLogger(__name__)

_SUFFIX = re.compile(r"\.(array_record|arrayrecord)(?=$|[.-])")
_NUMBER = re.compile(r"-(\d+)-of-(\d+)")
_TEST_KEYS = ("test", "validation", "val", "valid")
_SHOWN = 3  # names in a message
_TRIED = 16  # records, before a data set counts as unreadable


@dataclasses.dataclass(frozen=True)
class ArrayRecordSource:
    """Encoded images in array_record files.

    Attributes:
        name, split, class_names, labels, fingerprint: see `Source`.
        shards: the files.
        fields: where image, label and name stand in a record.
        key: what the data set calls the split; "" where it has no splits.
        positions: int64[N], the records of the files that belong to this split; None: all.
    """

    name: str
    split: str
    class_names: tuple[str, ...] | None
    labels: np.ndarray | None
    fingerprint: str
    shards: Shards
    fields: Fields
    key: str
    positions: np.ndarray | None

    @property
    def num_classes(self) -> int | None:
        return None if self.class_names is None else len(self.class_names)

    def __len__(self) -> int:
        return len(self.shards) if self.positions is None else len(self.positions)

    def __getitem__(self, index: int) -> Record:
        position = self._position(index)
        try:
            image, label, name = content(self.shards.read(position), self.fields)
        except (RuntimeError, ValueError) as error:
            label = -1 if self.labels is None else int(self.labels[index])
            raise UnreadableRecord(self.record_name(index), label, str(error)) from error
        if name is None:
            name = self.record_name(index)
        if not image:
            raise UnreadableRecord(name, label, "empty; its file was unreadable or empty")
        return {"index": index, "name": name, "label": label, "image": image}

    def record_name(self, index: int) -> str:
        return f"{self.name} {self.key}[{self._position(index)}]"

    def _position(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self.name}, which has {len(self)}")
        return int(index if self.positions is None else self.positions[index])


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
    directory = found[0].parent if len({file.parent for file in found}) == 1 else None
    fields, known = (directory and read_metadata(directory, name)) or (None, {})
    splits = {key: s for key, s in known.items() if not set(found).isdisjoint(s.paths)}
    if splits and path.is_dir():
        splits = known
    elif not splits or not all(set(found).issuperset(s.paths) for s in splits.values()):
        # Other files than the metadata is about, or some shards of a split only.
        fields = fields if splits else None
        class_names = next((s.class_names for s in splits.values()), None)
        splits = _split_by_names(found, name, class_names)
    num_used = sum(len(set(found).intersection(s.paths)) for s in splits.values())
    if num_used < len(found):
        _log.info("%s: left out %d file(s) of no split", name, len(found) - num_used)
    return open_split(name, split, splits, fields, may_hold_out=True)


def _find(path: Path) -> list[Path]:
    """Find files by a pattern, a file's name or a folder's; where some are shards, only those."""
    if path.is_file():
        return [path]
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(f for f in found if f.is_file() and not f.name.startswith("."))
    shards = [file for file in files if _SUFFIX.search(file.name)]
    return shards if shards or path.is_dir() else files


def open_split(
    name: str,
    split: str,
    splits: Mapping[str, SplitShards],
    fields: Fields | None,
    *,
    may_hold_out: bool,
) -> ArrayRecordSource:
    """Open one split of a data set.

    Args:
        name: the specification, for messages.
        split: "train" or "test".
        splits: what is known of the data set's splits.
        fields: how records are written; None where the first one has to tell.
        may_hold_out: a tenth may become the test split.

    Raises:
        ValueError: the split or a shard is missing or damaged, or the records have no image.
    """
    tests = [key for key in _TEST_KEYS if key in splits]
    held_out = may_hold_out and not tests
    if split == "test" and tests:
        # The second one where the labels of the first are withheld, as imagenet2012's are.
        keys = tests[: 2 if tests[0] == "test" else 1]
    elif "train" in splits and (split == "train" or held_out):
        keys = ["train"]
    elif held_out and len(splits) == 1:
        keys = list(splits)
    else:
        wanted = "train" if split == "train" else "test or validation"
        there = ", ".join(key or "shards without a name of a split" for key in splits)
        raise InputError(f"{name}: no {wanted} split; prepared: {there or 'none'}")
    for key in keys:
        shards, found, label = _open_shards(name, splits[key], fields)
        if found.label is None or label >= 0:
            break
    known = splits[key]
    class_names = known.class_names
    if class_names is None:  # a label is worth nothing where the number of classes is not known
        found = found._replace(label=None)
    fingerprint, labels, positions = known.fingerprint, known.labels, None
    if held_out:
        positions = split_positions(len(shards), split)
        labels = None if labels is None else labels[positions]
    if fingerprint is None or held_out:
        identity = [fingerprint or shards.identity(), key, *([split] if held_out else [])]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return ArrayRecordSource(
        name, split, class_names, labels, fingerprint, shards, found, key, positions
    )


def _open_shards(
    name: str, split: SplitShards, fields: Fields | None
) -> tuple[Shards, Fields, int]:
    """Open and check a split's shards; return them, how records are written, and a label."""
    sets = {_set_of(path): path for path in reversed(split.paths)}
    complete = {*split.paths, *itertools.chain(*map(_complete_set, sets.values()))}
    missing = sorted(path for path in complete if not path.exists())
    if missing:
        shown = some_of((path.name for path in missing), _SHOWN)
        raise InputError(
            f"{name}: {len(missing)} of {len(complete)} shards are missing in "
            f"{missing[0].parent}: {shown}. Copy or make them once more"
        )
    shards = Shards(split.paths)
    stated = split.lengths or shards.lengths
    for path, length, expected in zip(shards.paths, shards.lengths, stated, strict=True):
        if length != expected:
            raise InputError(
                f"{name}: {path} has {length} records; dataset_info.json says {expected}. Copy or "
                "prepare the data once more"
            )
    if not len(shards):
        raise InputError(
            f"{name}: no records in {some_of((path.name for path in shards.paths), _SHOWN)}"
        )
    try:
        first = _first_readable(shards)
        fields = fields or guess_fields(first)
        return shards, fields, content(first, fields)[1]
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{name}: {shards.paths[0].name}: {error}") from error


def _first_readable(shards: Shards) -> bytes:
    """Return one of the first records; a few damaged ones do not make a data set unusable."""
    for position in range(min(len(shards), _TRIED) - 1):
        with contextlib.suppress(RuntimeError):
            return shards.read(position)
    return shards.read(min(len(shards), _TRIED) - 1)


def _split_by_names(
    paths: Sequence[Path], name: str, class_names: tuple[str, ...] | None
) -> dict[str, SplitShards]:
    """Group shards by their names; those that name no split are one called ""."""
    sets: dict[tuple[Path, str], list[Path]] = {}
    for path in paths:
        sets.setdefault(_set_of(path), []).append(path)
    splits: dict[str, list[Path]] = {}
    for (_, stem), members in sorted(sets.items()):
        totals = {total for _, total in map(_number, members)}
        if len(totals) > 1:
            raise InputError(
                f"{name}: shards of several sets: {', '.join(map(str, sorted(totals)))} shards "
                f"of {stem} in all; choose one by a pattern, such as '*-of-{max(totals):05}*'"
            )
        last = re.split(r"[-_.]", stem)[-1]
        key = last if last in ("train", *_TEST_KEYS) else ""
        splits.setdefault(key, []).extend(sorted(members, key=_number))
    if len(splits) > 1:
        splits.pop("", None)
    return {key: SplitShards(tuple(s), class_names=class_names) for key, s in splits.items()}


def _set_of(path: Path) -> tuple[Path, str]:
    """Return a shard's folder and its name without number and suffix, the same for its set."""
    return path.parent, _NUMBER.sub("", _SUFFIX.sub("", path.name))


def _number(path: Path) -> tuple[int, int]:
    """Return a shard's number and how many there are by its name; (0, 1) for a single file."""
    match = _NUMBER.search(path.name)
    return (int(match[1]), int(match[2])) if match else (0, 1)


def _complete_set(path: Path) -> Sequence[Path]:
    """Return the paths of all shards of the set that one belongs to."""
    match = _NUMBER.search(path.name)
    if match is None:
        return [path]
    numbers = (f"-{i:0{len(match[1])}}-of-{match[2]}" for i in range(int(match[2])))
    return [path.with_name(path.name.replace(match[0], number, 1)) for number in numbers]
