"""A .zip of images, read in place by any number of threads and processes.

The directory of the archive is parsed once, by `zipfile`. From then on a record is two reads at
known positions: no lock, and nothing for a worker process to parse again.
"""

import contextlib
import os
import stat
import struct
import threading
import time
import weakref
import zipfile
import zlib

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.file_listing import (
    Group,
    Listing,
    Stamp,
    encoded,
    is_hidden,
    is_image,
    is_settled,
    times_of,
)

# Where a member's local header lies in the file, its compressed bytes, CRC-32 and method.
MEMBER = np.dtype([("offset", "<i8"), ("stored", "<i8"), ("crc", "<u4"), ("method", "<u2")])
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., bytes of the name, of the extra field
_MOST_INFLATED = 1032  # bytes that one byte of deflated data can stand for


def _hint(path: str) -> str:
    """Say what may be wrong with a file that is no .zip, by its first bytes."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return " It begins like one: is it complete? Copy or download it again"
        return f" To train on the images of a folder, name the folder: {os.path.dirname(path)}"
    return ""


def list_zip(path: str) -> Listing:
    """List the images of a .zip.

    Raises:
        ValueError: it is not a .zip that can be read, or it is protected by a password.
    """
    now = time.time_ns()
    try:
        status = os.stat(path)
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            last = archive.NameToInfo  # where a name stands twice, the later content counts
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(
            f"folder: {path} is neither a folder nor a readable .zip: {error}.{_hint(path)}"
        ) from error
    if any(m.flag_bits & 1 for m in members):
        raise InputError(f"folder: {path} is protected by a password; give one without")
    by_folder: dict[str, list[zipfile.ZipInfo]] = {}
    for member in members:
        folder, slash, _ = member.filename.rpartition("/")
        by_folder.setdefault(folder + slash, []).append(member)
    del members
    groups, others = [], 0
    for prefix in tuple(by_folder):
        inside = by_folder.pop(prefix)
        if any(is_hidden(part) for part in prefix.split("/")):
            continue
        visible = [m for m in inside if not is_hidden(m.filename[len(prefix) :])]
        images = [m for m in visible if is_image(m.filename[len(prefix) :])]
        others += len(visible) - len(images)
        if images:
            images.sort(key=lambda m: (m.filename, m.file_size))
            try:
                groups.append(_group(prefix, images, last))
            except OverflowError as error:
                raise InputError(f"folder: {path} is damaged: {error}") from error
    stamp = Stamp({"": times_of(status)}, {}, status.st_size)
    return Listing(groups, others, stamp, None if is_settled(now, stamp.times[""]) else path)


def _group(prefix: str, images: list[zipfile.ZipInfo], last: dict[str, zipfile.ZipInfo]) -> Group:
    found = [last[m.filename] for m in images]
    rows = [(m.header_offset, m.compress_size, m.CRC, m.compress_type) for m in found]
    return Group(
        prefix,
        encoded("\0".join(m.filename[len(prefix) :] for m in images)),
        np.asarray([m.file_size for m in images], np.int64),
        np.asarray(rows, MEMBER),
    )


class ZipReader:
    """The bytes of an archive's members. The file stays open, and pickling opens it again.

    Args:
        path: the .zip.
        size: its bytes when it was listed.
        modified: its st_mtime_ns when it was listed.

    Raises:
        ValueError: it cannot be opened, or is another file than was listed.
    """

    def __init__(self, path: str, size: int, modified: int):
        self._path = path
        self._state = size, modified
        self._lock = threading.Lock()
        self._other: zipfile.ZipFile | None = None
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise InputError(f"folder: cannot open {path}: {error}") from error
        # Not at the end of the program, where threads may still be reading.
        weakref.finalize(self, os.close, self._file).atexit = False
        if self._changed():
            raise InputError(f"folder: {path} was changed after it was listed; start again")

    def read(self, name: str, size: int, member: np.void) -> bytes:
        """Read one member.

        Args:
            name: its path in the archive.
            size: its bytes, or about as many.
            member: its row of `MEMBER`.

        Raises:
            OSError, zipfile.BadZipFile, zlib.error: it is damaged, or compressed in a way that
                Python cannot undo.
        """
        try:
            return self._read(name, size, member)
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            if self._changed():
                raise OSError(
                    f"{error}; {self._path} was changed after it was listed, start again"
                ) from error
            raise

    def _read(self, name: str, size: int, member: np.void) -> bytes:
        offset, stored, crc, method = member.item()
        if method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            header = self._bytes(offset, _LOCAL_HEADER.size)
            signature, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\3\4":
                raise zipfile.BadZipFile(f"no file begins at byte {offset} of the .zip")
            data = self._bytes(offset + len(header) + name_length + extra_length, stored)
            if method == zipfile.ZIP_DEFLATED:
                # A damaged directory may claim any size.
                room = min(size, _MOST_INFLATED * stored)
                data = zlib.decompress(data, -zlib.MAX_WBITS, max(1, room))
        else:
            data = self._read_otherwise(name)
        if zlib.crc32(data) != crc:
            raise zipfile.BadZipFile(f"Bad CRC-32 for file {name!r}")
        return data

    def _read_otherwise(self, name: str) -> bytes:
        """Read what is compressed by a method that hardly any .zip has, one at a time."""
        with self._lock:
            if self._other is None:
                self._other = zipfile.ZipFile(self._path)
            try:
                return self._other.read(name)
            except Exception as error:  # each method has exceptions of its own
                raise zipfile.BadZipFile(str(error)) from error

    def _bytes(self, start: int, count: int) -> bytes:
        size, _ = self._state
        data = os.pread(self._file, count, start) if start + count <= size else b""
        if len(data) != count:
            raise zipfile.BadZipFile(f"{count} bytes at {start} lie beyond the end of the .zip")
        return data

    def _changed(self) -> bool:
        status = os.fstat(self._file)
        return not stat.S_ISREG(status.st_mode) or self._state != (
            status.st_size,
            status.st_mtime_ns,
        )

    def __reduce__(self) -> tuple[type["ZipReader"], tuple[str, int, int]]:
        return type(self), (self._path, *self._state)
