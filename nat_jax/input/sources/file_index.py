"""The index of a folder or .zip of images: what every record is, in a few packed arrays.

It is one block of bytes: a prefix, a header in JSON, and the arrays. A file that holds the block is
mapped into memory, so the processes of a machine share it, and opening it takes the same time for a
million files as for a few.
"""

import functools
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nat_jax.errors import InputError, UserError
from nat_jax.input.sources.file_listing import File, Listing, Stamp, decoded
from nat_jax.input.sources.folder_layout import OTHER_SPLIT, read_layout
from nat_jax.input.sources.source import SPLITS, split_positions
from nat_jax.input.sources.zip_archive import MEMBER

# The name of the format (to be changed with any change of the block, or of what is listed in which
# order), CRC-32 of all that follows (it starts from the third entry), and bytes of the header.
_PREFIX = struct.Struct("<8sII")
_FORMAT = b"natidx2\0"
_ALIGN = 8
_CHUNK = 2**16
_COLUMNS: dict[str, np.dtype[Any]] = {
    "names": np.dtype("<u1"),
    "starts": np.dtype("<i8"),
    "sizes": np.dtype("<i8"),
    "labels": np.dtype("<i4"),
    "members": MEMBER,
}


class DamagedIndex(UserError):
    """An index that is not as it was written; the message tells what is wrong."""


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


@dataclass(frozen=True)
class FileIndex:
    """What is known of a folder or .zip without reading a record.

    Attributes:
        splits: by name.
        remarks: what was left out, with {root} for the path.
        stamp: what the root looked like when it was listed.
        block: uint8, the index as bytes.
        kept: the file that holds these bytes; None where they are in memory only.
    """

    splits: Mapping[str, SplitIndex]
    remarks: Sequence[str]
    stamp: Stamp
    block: np.ndarray
    kept: Path | None


def build_index(listing: Listing, root: str) -> FileIndex:
    """Sort a listing, divide it into the splits and label it.

    Args:
        listing: all images, of which there is at least one.
        root: what messages call the data.

    Raises:
        ValueError: loose images stand next to class folders, or there is one image only.
    """
    layout = read_layout(listing.folders)
    files = sorted(listing.files)
    folder = np.fromiter((file.folder for file in files), np.int32, len(files))
    if layout.loose is not None:
        loose = np.flatnonzero(folder == layout.loose)
        raise InputError(
            f"folder: {root} mixes {len(loose)} loose images (such as "
            f"{decoded(files[loose[0]].path)}) with class folders; put every image into a class "
            "folder, or all into one folder (unlabelled)"
        )
    remarks = []
    if listing.others:
        remarks.append(f"left out {listing.others} file(s) of {{root}} that are not images")
    splits, outside = {}, len(files)
    for split in SPLITS:
        labels = layout.labels[split][folder]
        if layout.test is None:
            positions = split_positions(len(files), split)
        else:
            positions = np.flatnonzero(labels != OTHER_SPLIT)
        outside -= len(positions)
        chosen, names = [files[i] for i in positions.tolist()], layout.class_names[split]
        splits[split] = _packed(chosen, labels[positions], split, names)
    if outside:
        remarks.append(f"left out {outside} image(s) outside train/ and {layout.test}/")
    return decode_index(_encode(splits, remarks, listing.stamp))


def _packed(
    files: Sequence[File], labels: np.ndarray, split: str, class_names: tuple[str, ...] | None
) -> SplitIndex:
    names = np.frombuffer(b"\0".join([file.path for file in files]) + b"\0", np.uint8)
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(names == 0) + 1])
    digest = sha256(f"{split} {class_names}\n".encode())
    for file, label in zip(files, labels.tolist(), strict=True):
        digest.update(b"%b\0%d\0%d\n" % (file.path, file.size, label))
    sizes = np.fromiter((file.size for file in files), np.int64, len(files))
    members = np.asarray([file.member for file in files if file.member], MEMBER)
    return SplitIndex(names, starts, sizes, labels, members, class_names, digest.hexdigest())


def _encode(splits: Mapping[str, SplitIndex], remarks: Sequence[str], stamp: Stamp) -> bytes:
    parts: list[Any] = []
    size, about = 0, {}
    for split, index in splits.items():
        places = {}
        for column, dtype in _COLUMNS.items():
            data = getattr(index, column).astype(dtype, copy=False)
            places[column] = size, len(data)
            padding = bytes(-data.nbytes % _ALIGN)
            parts += [data.view(np.uint8), padding]
            size += data.nbytes + len(padding)
        about[split] = {
            "columns": places,
            "class_names": index.class_names,
            "fingerprint": index.fingerprint,
        }
    header = json.dumps({"splits": about, "remarks": remarks, "stamp": stamp}).encode()
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    parts = [header, *parts]
    checksum = functools.reduce(lambda value, part: zlib.crc32(part, value), parts, len(header))
    return b"".join([_PREFIX.pack(_FORMAT, checksum, len(header)), *parts])


def load_index(path: Path) -> FileIndex:
    """Map a kept index into memory, whatever its data look like now.

    Raises:
        DamagedIndex: it is missing, damaged, or of another version.
    """
    try:
        with path.open("rb", buffering=0) as file:  # pages of a mapping would count as memory used
            _, expected, checksum = _PREFIX.unpack(file.read(_PREFIX.size))
            while chunk := file.read(_CHUNK):
                checksum = zlib.crc32(chunk, checksum)
        if checksum != expected:
            raise DamagedIndex("its checksum is wrong")
        return decode_index(np.asarray(np.memmap(path, np.uint8, "r")), path)
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise DamagedIndex(f"{type(error).__name__}: {error}") from error


def decode_index(block: bytes | np.ndarray, kept: Path | None = None) -> FileIndex:
    """Read the bytes of an index; the arrays of the result are views of them.

    Raises:
        DamagedIndex: they are of another version.
    """
    data = np.frombuffer(block, np.uint8)
    name, _, length = _PREFIX.unpack(data[: _PREFIX.size].tobytes())
    if name != _FORMAT:
        raise DamagedIndex("it is of another version")
    start = _PREFIX.size + length
    header = json.loads(data[_PREFIX.size : start].tobytes())
    splits = {}
    for split, about in header["splits"].items():
        columns = {
            column: np.frombuffer(data, _COLUMNS[column], count, start + at)
            for column, (at, count) in about["columns"].items()
        }
        names = about["class_names"]
        splits[split] = SplitIndex(
            **columns,
            class_names=None if names is None else tuple(names),
            fingerprint=about["fingerprint"],
        )
    return FileIndex(splits, header["remarks"], Stamp(*header["stamp"]), data, kept)
