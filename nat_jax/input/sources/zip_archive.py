"""A .zip of images, read in place by any number of threads and processes.

`zipfile` lists the archive once, and the index keeps where each member lies. A record is then two
reads at known offsets: no lock, and nothing in a worker that grows with the number of members.
"""

import io
import os
import posixpath
import re
import stat
import struct
import sys
import time
import weakref
import zipfile
from collections import Counter

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.file_kinds import IMAGE_SUFFIXES, is_split_zip, kind_of_file, suffix_of
from nat_jax.input.sources.file_listing import (
    File,
    Listing,
    Stamp,
    encoded,
    is_hidden,
    is_settled,
    is_system,
    times_of,
)

# Where a member's local header lies in the file, its compressed bytes, CRC-32 and method.
MEMBER = np.dtype([("offset", "<i8"), ("stored", "<i8"), ("crc", "<u4"), ("method", "<u2")])
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., bytes of the name, of the extra field


def list_zip(path: str) -> Listing:
    """List the images of a .zip.

    Names of members are normalised as by programs that unpack: "./" and repeated slashes go, and
    backslashes become slashes. Of a name that stands twice the later content counts.

    Raises:
        ValueError: it is not a .zip that can be read, it is protected by a password, or a name
            leads out of it.
    """
    now = time.time_ns()
    try:
        status = os.stat(path)
        if is_split_zip(path):
            raise zipfile.BadZipFile("it is one of several parts")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    # NotImplementedError: of a version that Python cannot read; ValueError: a damaged directory.
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise InputError(_no_zip(path, error)) from error
    members: dict[str, zipfile.ZipInfo] = {}
    count = 0
    for entry in entries:
        name = _plain_name(entry.filename, path)
        if not entry.filename.endswith(("/", "\\")):
            count += 1
            members[name] = entry
    if any(m.flag_bits & 1 for m in members.values()):
        raise InputError(f"folder: {path} is protected by a password; give one without")
    numbers: dict[str, int] = {}
    files: list[File] = []
    others: Counter[str] = Counter()
    system: set[str] = set()
    for name, member in members.items():
        *above, last = name.split("/")
        if any(map(is_hidden, (*above, last))):
            continue
        if inside := set(filter(is_system, above)):
            system |= inside
            continue
        if (suffix := suffix_of(last)) not in IMAGE_SUFFIXES:
            others[suffix] += 1
            continue
        folder = numbers.setdefault(name[: -len(last)], len(numbers))
        row = (member.header_offset, member.compress_size, member.CRC, member.compress_type)
        if max(row) >= 2**63:
            raise InputError(f"folder: {path} is damaged: {name} lies at {row[0]}")
        files.append(File(encoded(name), member.file_size, folder, row))
    times = times_of(status)
    stamp = Stamp({"": times}, {}, status.st_size, None if is_settled(now, times) else path)
    return Listing(list(numbers), files, others, system, {}, count - len(members), stamp)


def read_member(path: str, name: str) -> bytes:
    """Read a member of a .zip by its normalised name.

    Raises:
        FileNotFoundError: there is none of this name.
    """
    with zipfile.ZipFile(path) as archive:
        found = [m for m in archive.infolist() if _plain_name(m.filename, path) == name]
        if not found:
            raise FileNotFoundError(name)
        return archive.read(found[-1])


def _plain_name(name: str, path: str) -> str:
    """Return the path of a member below the root, with "/".

    Raises:
        ValueError: it is absolute, or leads out of the archive.
    """
    plain = posixpath.normpath(name.replace("\\", "/"))
    if plain.startswith("/") or f"{plain}/".startswith("../") or re.match("[A-Za-z]:/", plain):
        raise InputError(
            f"folder: {path} has a member that would be unpacked outside: {name!r}. Make the .zip "
            "once more with names relative to its root, or unpack it and name the folder"
        )
    return plain


def _no_zip(path: str, error: Exception) -> str:
    """Return the message about a file that is no .zip, or not all of one."""
    try:
        split, kind = is_split_zip(path), kind_of_file(path)
    except OSError:
        return f"folder: {path} is neither a folder nor a readable .zip: {error}"
    if split or re.fullmatch(r"\.(z?\d+)", suffix_of(path)):
        return (
            f"folder: {path} is one part of a .zip that was split; join the parts, of .z01, ..., "
            ".zip by `zip -s 0 NAME.zip --out WHOLE.zip`, of .zip.001, ... by `cat NAME.zip.* > "
            "WHOLE.zip`, and name the whole one"
        )
    text = f"folder: {path} is neither a folder nor a readable .zip: it"
    if kind.endswith(".zip archive"):
        return f"{text} begins like one; is it complete? Copy or download it again ({error})"
    if kind.endswith(" image") or suffix_of(path) in IMAGE_SUFFIXES:
        kind += f". To train on the images of a folder, name the folder: {os.path.dirname(path)}"
    return f"{text} is {kind}"


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
