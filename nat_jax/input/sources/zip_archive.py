"""A .zip of images, read in place by any number of threads and processes.

`zipfile` lists the archive once, and the index keeps where each member lies. A record is then two
reads at known offsets: no lock, and nothing in a worker that grows with the number of members.
"""

import contextlib
import io
import os
import stat
import struct
import sys
import time
import weakref
import zipfile

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.file_listing import (
    File,
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
    numbers: dict[str, int] = {}
    files, others = [], 0
    for member in members:
        parts = member.filename.split("/")
        if any(map(is_hidden, parts)):
            continue
        if not is_image(parts[-1]):
            others += 1
            continue
        folder = numbers.setdefault(member.filename[: -len(parts[-1])], len(numbers))
        found = last[member.filename]
        row = (found.header_offset, found.compress_size, found.CRC, found.compress_type)
        if max(row) >= 2**63:
            raise InputError(f"folder: {path} is damaged: {member.filename} lies at {row[0]}")
        files.append(File(encoded(member.filename), member.file_size, folder, row))
    times = times_of(status)
    unsettled = None if is_settled(now, times) else path
    return Listing(list(numbers), files, others, Stamp({"": times}, {}, status.st_size, unsettled))


def _hint(path: str) -> str:
    """Return what may be wrong with a file that is no .zip, by its first bytes."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            return " It begins like one: is it complete? Copy or download it again"
        return f" To train on the images of a folder, name the folder: {os.path.dirname(path)}"
    return ""


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
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise InputError(f"folder: cannot open {path}: {error}") from error
        # Not at the end of the program, when threads may still be reading.
        weakref.finalize(self, os.close, self._file).atexit = False
        if self._changed():
            raise InputError(f"folder: {path} was changed after it was listed; start again")

    def read(self, name: str, member: np.void) -> bytes:
        """Read one member.

        Args:
            name: its path in the archive, for messages.
            member: its row of `MEMBER`.

        Raises:
            zipfile.BadZipFile: it is damaged, or compressed by a method that Python lacks.
        """
        info = zipfile.ZipInfo(name)
        offset, info.compress_size, info.CRC, info.compress_type = member.item()
        info.file_size = sys.maxsize  # all there is: a damaged directory may claim any size
        try:
            header = self._bytes(offset, _LOCAL_HEADER.size)
            signature, *lengths = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\3\4":
                raise zipfile.BadZipFile(f"no file begins at byte {offset} of the .zip")
            data = self._bytes(offset + len(header) + sum(lengths), info.compress_size)
            with zipfile.ZipExtFile(io.BytesIO(data), "r", info) as file:
                return file.read()
        except Exception as error:  # each method of compression has exceptions of its own
            reason = str(error) or "its data are cut off"
            if self._changed():
                reason += f"; {self._path} was changed after it was listed, start again"
            raise zipfile.BadZipFile(reason) from error

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
