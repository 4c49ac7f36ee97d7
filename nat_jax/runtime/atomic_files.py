"""Files that are whole or not there: written beside their place, synced, checked and renamed."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError, UserError

_log = logging.getLogger(__name__)

_PARTIAL = ".partial"  # suffix of a file that is being written; its name begins with a dot
# Images are compressed already: on 1,920 JPEGs (10.5 KB each) zstd saves 1 %, and makes writing
# three times and reading one and a half times as long.
_OPTIONS = "group_size:1,uncompressed"


class ConversionError(UserError, RuntimeError):
    """A conversion cannot go on; the message says why, and what is kept."""


class RecordWriter:
    """Writes an array_record file; where that fails, removes it and raises a ConversionError."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = path
        self._writer = ArrayRecordWriter(str(path), _OPTIONS)

    def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
        except RuntimeError as error:
            raise _cannot_write(self._path, error) from error

    def close(self) -> None:
        """Finish the file, and see that it has reached the disk."""
        try:
            self._writer.close()
            sync(self._path)
        except (OSError, RuntimeError) as error:
            raise _cannot_write(self._path, error) from error


def _cannot_write(partial: Path, error: Exception) -> ConversionError:
    partial.unlink(missing_ok=True)
    return ConversionError(
        f"cannot write {partial}: {error}. Finished shards are kept: put right what is wrong (make "
        "room, for instance), and run the same command again"
    )


def partial_path(path: Path) -> Path:
    """Give where a file is written before it is published."""
    return path.with_name(f".{path.name}{_PARTIAL}")


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed was writing."""
    for leftover in folder.glob(f".*{_PARTIAL}"):
        leftover.unlink()


def put(path: Path, data: bytes) -> None:
    """Make a file hold bytes; whenever the process dies, it has the old ones or the new ones."""
    if path.exists() and path.read_bytes() == data:
        return
    partial = partial_path(path)
    try:
        partial.write_bytes(data)
        sync(partial)
        publish(partial, path)
    except OSError as error:
        raise _cannot_write(partial, error) from error


def publish(partial: Path, path: Path) -> None:
    """Put a finished file in its place, instead of what is there."""
    partial.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def kept_for_us(folder: Path, key: str, busy: str) -> Iterator[None]:
    """Make a folder, and keep it for this process; a killed one gives it back.

    Args:
        folder: where.
        key: of the config, which names the folder, for the messages.
        busy: what the message says where another process has it.

    Raises:
        ValueError: it cannot be made, or another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{key}: cannot use {folder}: {error}. Choose another") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{key}: {busy}") from error
        except OSError as error:
            _log.info("%s cannot be locked (%s); start no second process", folder, error)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Give a file's checksum in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(sums: dict[str, str]) -> bytes:
    """Give what `sha256sum -c` reads, from checksums by the names of their files."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def as_json(value: Any) -> bytes:
    """Give a value as the bytes of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()
