"""Atomic file writes (temporary file, fsync, rename), checksums and locks of folders."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError, UserError

_log = logging.getLogger(__name__)


class CannotWrite(UserError, OSError):
    """A file cannot be written: the disk is full or read-only, for instance."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of the system inside as CannotWrite, whose message names a path."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = ". Make room, and the same command line goes on" if full else ""
        raise CannotWrite(f"cannot write {path}: {error.strerror or error}{advice}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file or folder replaces ``path`` at the end.

    If the process is killed, ``path`` has its old content or the new one, or, if it is a folder,
    is missing for the moment between two renames. After an exception it has the old content.

    Raises:
        CannotWrite: the system refuses to write.
    """
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}{end}") for end in ("", ".old"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
        try:
            yield partial
            for file in partial.rglob("*"):
                sync(file)
            sync(partial)
            if path.is_dir():
                path.replace(old)
            publish(partial, path)
        finally:
            if old.exists() and not path.exists():
                old.replace(path)
            _remove(partial)
            _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write a file atomically, and its folder if that is missing."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(partial: Path, path: Path) -> None:
    """Rename a finished file or folder to its final name, and flush the name to the disk."""
    partial.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def locked_folder(folder: Path, key: str, busy: str) -> Iterator[None]:
    """Create a folder and lock it for this process; the lock ends with the process.

    Args:
        folder: to lock.
        key: config key that names the folder, for the messages.
        busy: message if another process holds the lock.

    Raises:
        InputError: it cannot be created, or another process holds the lock.
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


def sha256(path: Path) -> str:
    """Return a file's checksum in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_text(sums: dict[str, str]) -> bytes:
    """Return the input of `sha256sum -c`, from checksums by file name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def as_json(value: Any) -> bytes:
    """Return a value as the bytes of a JSON file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def size_text(count: float) -> str:
    """Return a number of bytes with three digits and its unit, such as "1.39 MB"."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} GB" if count >= 100 else f"{count:.3g} GB"
