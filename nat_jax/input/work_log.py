"""Which record each worker is reading; readable after the worker crashes."""

import contextlib
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
from typing import Any, NamedTuple

_ENTRY = struct.Struct("<dq")  # when reading began, and the record's index plus 1; 0: none


class Reading(NamedTuple):
    """A record that a thread is reading, or was reading when its process died."""

    begun: float  # by the reader's clock: tells two readings of one record apart
    record: int
    process: int


class WorkLog:
    """A folder with a small memory-mapped file for each thread, shared by pickling its path.

    Entries outlive a worker that is killed, and a worker that hangs need not respond. Writing takes
    about a microsecond.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="nat_jax-work-"))
        self._local = threading.local()
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Note that this thread reads a record, until the block ends."""
        if not hasattr(self._local, "entry"):
            with (self._folder / f"{os.getpid()}-{threading.get_ident()}").open("w+b") as file:
                file.truncate(_ENTRY.size)
                self._local.entry = mmap.mmap(file.fileno(), _ENTRY.size)
        _ENTRY.pack_into(self._local.entry, 0, time.monotonic(), index + 1)
        try:
            yield
        finally:
            _ENTRY.pack_into(self._local.entry, 0, 0.0, 0)

    def under_way(self) -> list[Reading]:
        """Return what is being read, or was being read when its worker died; longest first."""
        found = []
        for path in self._folder.iterdir():
            data = path.read_bytes()
            if len(data) == _ENTRY.size:
                begun, number = _ENTRY.unpack(data)
                found.append(Reading(begun, number - 1, _process(path)))
        return sorted(reading for reading in found if reading.record >= 0)

    def kill_workers(self) -> None:
        """Kill the other processes that have read records."""
        for process in {_process(path) for path in self._folder.iterdir()} - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def _process(path: Path) -> int:
    return int(path.name.partition("-")[0])
