"""Which record every thread of every data worker is at, told even of workers that died or hang."""

import contextlib
import dataclasses
import mmap
import os
import shutil
import signal
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The record's index plus 1, 0 while there is none, as in a new file; then when it was begun. An
# entry may be read while it is written: so the time is written first, and read last.
_NUMBER, _BEGUN = struct.Struct("<q"), struct.Struct("<d")
_SIZE = _NUMBER.size + _BEGUN.size
_PREFIX = "nat_jax-work-"  # then the process and something random


@dataclasses.dataclass(frozen=True)
class Reading:
    """A record that is being read.

    Attributes:
        index: its number.
        seconds: for how long.
        process: id of the process that reads it.
    """

    index: int
    seconds: float
    process: int


class WorkLog:
    """A folder with a tiny memory-mapped file for each thread, shared by pickling its path.

    A worker that is killed leaves its entries behind, and one that hangs need not be asked. Writing
    costs about a microsecond, and nothing reaches a disk unless the system is short of memory.
    """

    def __init__(self) -> None:
        _sweep()
        self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
        self._local = threading.local()
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Note that this thread reads a record, until the block ends."""
        try:
            entry = self._local.entry
        except AttributeError:
            entry = self._local.entry = self._new_entry()
        _BEGUN.pack_into(entry, _NUMBER.size, time.monotonic())
        _NUMBER.pack_into(entry, 0, index + 1)
        try:
            yield
        finally:
            _NUMBER.pack_into(entry, 0, 0)

    def _new_entry(self) -> mmap.mmap:
        path = self._folder / f"{os.getpid()}-{threading.get_ident()}"
        with path.open("w+b") as file:
            file.truncate(_SIZE)
            entry = mmap.mmap(file.fileno(), _SIZE)
        return entry

    def under_way(self) -> list[Reading]:
        """Give the records that are being read, or were when their worker died; longest first."""
        now = time.monotonic()  # the same clock in all processes of a machine
        found = []
        for path in self._folder.iterdir():
            data = path.read_bytes()
            if len(data) == _SIZE and (number := _NUMBER.unpack_from(data)[0]):
                (begun,) = _BEGUN.unpack_from(data, _NUMBER.size)
                process = int(path.name.partition("-")[0])
                found.append(Reading(number - 1, now - begun, process))
        return sorted(found, key=lambda reading: -reading.seconds)

    def end_workers(self) -> None:
        """Kill the other processes that have read records."""
        for process in {int(path.name.partition("-")[0]) for path in self._folder.iterdir()}:
            if process != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def is_alive(process: int) -> bool:
    """Say whether there is a process of that number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _sweep() -> None:
    """Remove what killed processes left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(folder, ignore_errors=True)
