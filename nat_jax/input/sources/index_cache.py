"""The index of a folder or .zip of images: what every record is, in a few packed arrays.

The index of large data is kept on disk, one file for each path. The file is mapped into memory, so
the processes of a machine share it, and opening it takes the same time for a million files as for a
few. It has a prefix, a header in JSON, and the arrays.
"""

import functools
import hashlib
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.file_kinds import IMAGE_SUFFIXES, advice, count_text
from nat_jax.input.sources.file_listing import (
    File,
    Listing,
    Stamp,
    decoded,
    list_folder,
    times_of,
)
from nat_jax.input.sources.folder_layout import OTHER_SPLIT, read_layout
from nat_jax.input.sources.source import SPLITS, hold_out
from nat_jax.input.sources.zip_archive import MEMBER, list_zip, read_member
from nat_jax.runtime import atomic_files, cache_dir

_log = logging.getLogger(__name__)

KEPT_FROM = 10_000  # files; fewer are listed in less time than a person notices
_PATIENCE = 2.0  # seconds of listing before a bar is shown
# The name of the format (to be changed with any change of the file, or of what is listed in which
# order), CRC-32 of all that follows (it starts from the third entry), and bytes of the header.
_PREFIX = struct.Struct("<8sII")
_FORMAT = b"natidx5\0"
_ALIGN = 8
_CHUNK = 2**16  # bytes
_COLUMNS: dict[str, np.dtype[Any]] = {
    "names": np.dtype("<u1"),
    "starts": np.dtype("<i8"),
    "sizes": np.dtype("<i8"),
    "labels": np.dtype("<i4"),
    "members": MEMBER,
}


class SplitIndex(NamedTuple):
    """The records of one split in order, without a Python object for any.

    A file costs 21 bytes and its name: 57 bytes, or 73 MB in all, for the 1,281,167 of ImageNet's
    training set, whose names ("train/n01440764/n01440764_10026.JPEG") have 36. In a .zip it costs
    22 more.

    Attributes:
        names: uint8[total], the path of each below the root in UTF-8, every one followed by a NUL.
        starts: int64[N + 1], where in `names` each begins, and the end.
        sizes: int64[N], bytes of each.
        labels: int32[N], -1 where unlabelled.
        members: where each lies in a .zip, [N] of `MEMBER`; empty for a folder.
        class_names: see `Source`.
        fingerprint: see `Source`.
    """

    names: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    members: np.ndarray
    class_names: tuple[str, ...] | None
    fingerprint: str

    def name(self, position: int) -> str:
        """Return the path of one file below the root, with "/"."""
        start, end = int(self.starts[position]), int(self.starts[position + 1])
        return decoded(self.names[start : end - 1].tobytes())


class FileIndex(NamedTuple):
    """What is known of a folder or .zip without reading a record.

    Attributes:
        splits: by name.
        remarks: what was left out.
        stamp: what the root looked like when it was listed.
        kept: the file that holds the arrays; None where they are in memory only.
    """

    splits: Mapping[str, SplitIndex]
    remarks: Sequence[str]
    stamp: Stamp
    kept: Path | None = None


_recent: dict[str, FileIndex] = {}  # the last one, by real path: train and test are opened in turn


def open_index(root: str) -> FileIndex:
    """Return the index of a folder or .zip: the last one opened, the kept one, or a new one.

    Raises:
        ValueError: there is no image, or it cannot be listed or divided.
    """
    real = os.path.realpath(root)
    index = _recent.get(real)
    if index is None or not index.stamp.holds(root):
        digest = hashlib.sha256(real.encode("utf-8", "surrogateescape")).hexdigest()
        cache = cache_dir.place("file_index")
        path = cache and cache / digest[:32]
        index = (path and _kept(path, root)) or _list(root, real, path)
        if real not in _recent or _recent[real].remarks != index.remarks:
            for remark in index.remarks:
                _log.info("folder: %s: %s", root, remark)
    _recent.clear()
    _recent[real] = index
    return index


def _kept(path: Path, root: str) -> FileIndex | None:
    """Return the kept index, if it still holds."""
    if not os.path.isfile(path):
        return None
    try:
        index = _load(path)
    except (OSError, ValueError, LookupError, struct.error) as error:
        _log.warning("folder: the index in %s cannot be used (%s)", path, error)
        return None
    return index if index.stamp.holds(root) else None


def _list(root: str, real: str, path: Path | None) -> FileIndex:
    """List the data, and keep the index in `path` where it is large."""
    from tqdm import tqdm

    start = time.perf_counter()
    with tqdm(
        desc=f"listing {root}",
        unit=" files",
        unit_scale=True,
        disable=None,
        delay=_PATIENCE,
        leave=False,
        nrows=2,  # a terminal that does not tell its height would be taken to have no line for it
    ) as bar:
        listing = list_folder(root, bar.update) if os.path.isdir(root) else list_zip(root)
    if not listing.files:
        raise InputError(_no_images(listing, root))
    index = _build(listing, root)
    count = listing.others.total() + len(listing.files)
    if count < KEPT_FROM:
        return index
    try:
        if listing.stamp.unsettled is not None:
            raise OSError(
                f"{listing.stamp.unsettled} changed within the last seconds or is dated in the "
                "future"
            )
        if path is None:
            raise OSError("there is no home folder")
        if Path(real) in path.parents:
            raise OSError(f"{path} lies inside the data, which it would change")
        atomic_files.write(path, _encode(index))
        index, outcome = _load(path), f"its index is kept in {path}"
    except OSError as error:
        outcome = (
            f"its index cannot be kept ({error}): it is listed again at every start; "
            "NAT_JAX_CACHE names a folder for it that can be written"
        )
    seconds = time.perf_counter() - start
    rate = f"{count:,} files of {root} in {seconds:.1f} s ({count / seconds:,.0f} per second)"
    _log.info("folder: listed %s; %s", rate, outcome)
    return index


def _build(listing: Listing, root: str) -> FileIndex:
    """Sort a listing, divide it into the splits and label it."""
    listing = _annotated(listing, root)
    # With those that could not be listed, in which there may be records.
    layout = read_layout([*listing.folders, *listing.refused], root)
    for number, (path, error) in enumerate(listing.refused.items(), len(listing.folders)):
        if any(labels[number] != OTHER_SPLIT for labels in layout.labels.values()):
            raise InputError(
                f"folder: cannot list {os.path.join(root, path)}: {error}. It may hold records: "
                f"allow reading it, or move it out of {root}"
            )
    files = sorted(listing.files)
    folder = np.fromiter((file.folder for file in files), np.int32, len(files))
    if layout.loose is not None:
        loose = np.flatnonzero(folder == layout.loose)
        raise InputError(
            f"folder: {root} mixes {len(loose)} loose images (such as "
            f"{decoded(files[loose[0]].path)}) with class folders; put every image into a class "
            "folder, or all into one folder (unlabelled)"
        )
    remarks = layout.remarks + _left_out(listing)
    splits, outside = {}, len(files)
    for split in SPLITS:
        labels = layout.labels[split][folder]
        if layout.splits is None:
            positions, labels, alone = hold_out(labels, split)
            if alone:
                remarks.append(
                    f"{alone} held-out image(s) are of classes without another image: "
                    "probes leave them out"
                )
        else:
            positions = np.flatnonzero(labels != OTHER_SPLIT)
            labels = labels[positions]
        outside -= len(positions)
        chosen = [files[i] for i in positions.tolist()]
        names = layout.class_names[split] if (labels >= 0).any() else None
        splits[split] = _packed(chosen, labels, split, names)
    if outside and layout.splits is not None:
        remarks.append(f"left out {outside} image(s) outside {'/ and '.join(layout.splits)}/")
    return FileIndex(splits, remarks, listing.stamp)


def _left_out(listing: Listing) -> list[str]:
    """Return what was seen and is not used, a sentence for each kind of reason."""
    remarks = []
    if listing.others:
        hint = advice(listing.others)
        remarks.append(f"left out by suffix: {count_text(listing.others)}{hint and '; '}{hint}")
    if listing.system:
        remarks.append(f"left out system folders: {', '.join(sorted(listing.system))}")
    if listing.refused:
        path, error = next(iter(sorted(listing.refused.items())))
        count = len(listing.refused)
        remarks.append(f"left out {count} folder(s) that cannot be listed, such as {path}: {error}")
    if listing.repeated:
        remarks.append(f"{listing.repeated} member(s) have the name of a later one, which counts")
    return remarks


def _no_images(listing: Listing, root: str) -> str:
    """Return the message about a listing without an image."""
    remarks = _left_out(listing) or ["it holds no other files, or hidden ones"]
    if listing.others[""]:
        remarks.append("files without a suffix need that of their format")
    return (
        f"folder: no images in {root}: {'; '.join(remarks)}. "
        f"Expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
    )


def _packed(
    files: Sequence[File], labels: np.ndarray, split: str, class_names: tuple[str, ...] | None
) -> SplitIndex:
    names = np.frombuffer(b"\0".join([file.path for file in files]) + b"\0", np.uint8)
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(names == 0) + 1])
    digest = hashlib.sha256(f"{split} {class_names}\n".encode())
    for file, label in zip(files, labels.tolist(), strict=True):
        digest.update(b"%b\0%d\0%d\n" % (file.path, file.size, label))
    sizes = np.fromiter((file.size for file in files), np.int64, len(files))
    members = np.asarray([file.member for file in files if file.member], MEMBER)
    return SplitIndex(names, starts, sizes, labels, members, class_names, digest.hexdigest())


def _annotated(listing: Listing, root: str) -> Listing:
    """Move the images of Tiny-ImageNet's val/images/ to folders of their classes.

    Raises:
        InputError: val_annotations.txt lacks one of them, or cannot be read.
    """
    places = [folder.removesuffix("images/") for folder in listing.folders]
    flat = [number for number, place in enumerate(places) if f"/{place}".lower().endswith("/val/")]
    if len(flat) != 1:
        return listing
    number, place = flat[0], places[flat[0]]
    notes = f"{place}val_annotations.txt"
    try:
        if os.path.isdir(root):
            listing.stamp.times[notes] = times_of(os.stat(os.path.join(root, notes)))
            data = Path(root, notes).read_bytes()
        else:
            data = read_member(root, notes)
    except FileNotFoundError:
        return listing
    except Exception as error:  # a damaged .zip has many
        raise InputError(f"folder: cannot read {notes} in {root}: {error}") from error
    lines = [line.split("\t") for line in data.decode("utf-8-sig", "surrogateescape").splitlines()]
    classes = {fields[0]: fields[1] for fields in lines if len(fields) > 1}
    files, folders = [], list(listing.folders)
    numbers: dict[str, int] = {}
    for file in listing.files:
        if file.folder == number:
            path = decoded(file.path)
            name = classes.get(os.path.basename(path))
            if name is None:
                raise InputError(
                    f"folder: {notes} in {root} has no class for {path}; copy it again, or delete "
                    "it and move the images into a folder for each class"
                )
            file = file._replace(folder=numbers.setdefault(name, len(folders) + len(numbers)))
            folders[number] = f"{place}{name}/"  # as no image is left there
        files.append(file)
    folders += [f"{place}{name}/" for name in numbers]
    return listing._replace(files=files, folders=folders)


def _encode(index: FileIndex) -> bytes:
    parts: list[Any] = []
    size, about = 0, {}
    for split, known in index.splits.items():
        places = {}
        for column, dtype in _COLUMNS.items():
            data = getattr(known, column).astype(dtype, copy=False)
            places[column] = size, len(data)
            padding = bytes(-data.nbytes % _ALIGN)
            parts += [data.view(np.uint8), padding]
            size += data.nbytes + len(padding)
        about[split] = {
            "columns": places,
            "class_names": known.class_names,
            "fingerprint": known.fingerprint,
        }
    whole = {"splits": about, "remarks": index.remarks, "stamp": index.stamp}
    header = json.dumps(whole).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    parts = [header, *parts]
    checksum = functools.reduce(lambda value, part: zlib.crc32(part, value), parts, len(header))
    return b"".join([_PREFIX.pack(_FORMAT, checksum, len(header)), *parts])


def _load(path: Path) -> FileIndex:
    """Map a kept index into memory, whatever the data look like now."""
    with path.open("rb", buffering=0) as file:  # pages of a mapping would count as memory used
        name, expected, length = _PREFIX.unpack(file.read(_PREFIX.size))
        if name != _FORMAT:
            raise ValueError("it is of another version")
        header = file.read(length)
        checksum = zlib.crc32(header, length)
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    if checksum != expected:
        raise ValueError("its checksum is wrong")
    about = json.loads(header)
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    splits = {}
    for split, known in about["splits"].items():
        columns = {
            column: np.frombuffer(data, _COLUMNS[column], count, _PREFIX.size + length + at)
            for column, (at, count) in known["columns"].items()
        }
        names = known["class_names"]
        names = None if names is None else tuple(names)
        splits[split] = SplitIndex(**columns, class_names=names, fingerprint=known["fingerprint"])
    return FileIndex(splits, about["remarks"], Stamp(*about["stamp"]), path)
