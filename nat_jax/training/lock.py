"""The lock of a workdir, so that one run at a time writes to it.

The lock is a file, ``lock-1.json``. Its owner changes a counter in it every few seconds. Where the
process is known to be gone, or the counter stands still for a minute of the reader's own clock, the
lock is stale, and the reader creates ``lock-2.json``. A name can be created once only, on network
file systems too, so of several readers one takes over, and removes the older file. An owner that
was suspended meanwhile sees that its file is gone, and ends.
"""

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from nat_jax.errors import InputError, UserError
from nat_jax.runtime import atomic_files, consistency

logger = logging.getLogger(__name__)

_BEAT = 10.0  # seconds between two changes of the counter
_STALE = 60.0  # seconds without a change after which an owner counts as gone
_POLL = 0.5  # seconds between two looks at the lock of another


class WorkdirInUse(UserError, RuntimeError):
    """Another run uses the workdir."""


class WorkdirLost(UserError, RuntimeError):
    """The lock was removed, or another run took over the workdir."""


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[Callable[[], None]]:
    """Own a workdir inside; of several processes of a run the first one does, for all of them.

    Args:
        workdir: created if it is missing. If the owner of its lock cannot be seen from here, its
            counter is watched, for a minute at most.

    Yields:
        A function that raises WorkdirLost if the workdir is no longer this run's, to be called
        by all processes before something is written.

    Raises:
        WorkdirInUse: another run uses the workdir.
        InputError: the lock cannot be written.
    """
    lock: _Lock | None = None
    refusal: UserError | None = None
    try:
        if jax.process_index() == 0:
            try:
                lock = _take(workdir)
            except UserError as error:
                refusal = error
        if not consistency.all_true(refusal is None):
            raise refusal or WorkdirInUse(f"process 0 cannot use {workdir}; its output says why")

        def check() -> None:
            if not consistency.all_true(lock is None or lock.is_there()):
                raise WorkdirLost(
                    f"{workdir}: the lock of this run was removed, or another run took over. This "
                    "one ends and writes nothing more; the same command line goes on from the "
                    "last checkpoint"
                )

        yield check
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    """A lock of this process, whose counter a thread changes."""

    def __init__(self, path: Path):
        """Create the file.

        Raises:
            FileExistsError: another process has created it.
        """
        self._path, self._count = path, 0
        self._about = {
            "run": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "kernel": _kernel(),
            "started": _start_of(os.getpid()),
            "thread": threading.get_ident(),
        }
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._ended = threading.Event()
        try:
            self._write()
        except OSError:
            os.close(self._file)
            path.unlink(missing_ok=True)
            raise
        threading.Thread(target=self._beat, name="lock of the workdir", daemon=True).start()

    def _write(self) -> None:
        """Write the file in place: if it was removed, a new one of the same name stays as it is."""
        about = {**self._about, "count": f"{self._count:012}"}  # always of one length
        os.pwrite(self._file, atomic_files.as_json(about), 0)
        os.fsync(self._file)

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT):
            self._count += 1
            with contextlib.suppress(OSError):  # whether it is still there, is_there finds out
                self._write()
        os.close(self._file)  # not in another thread, where its number could be given to a new file

    def is_there(self) -> bool:
        """Return whether the file is still this lock's."""
        with contextlib.suppress(OSError):
            return _owner(self._path.read_bytes()).get("run") == self._about["run"]
        return False

    def release(self) -> None:
        """Remove the file if it is still this lock's."""
        self._ended.set()
        if self.is_there():
            self._path.unlink(missing_ok=True)


def _take(workdir: Path) -> _Lock:
    """Create the lock of a workdir, after a stale one if there is one."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        while True:
            last = max(_numbers(workdir), default=0)
            before = _path(workdir, last)
            try:
                if last:
                    _wait_until_stale(before, workdir)
                lock = _Lock(_path(workdir, last + 1))
            except (FileExistsError, FileNotFoundError):
                time.sleep(_POLL)  # another was faster; a network file system may show it late
                continue
            if last and not before.exists():  # its owner was alive after all, and has ended
                lock.release()
                continue
            for number in _numbers(workdir):
                if number <= last:
                    _path(workdir, number).unlink(missing_ok=True)
            return lock
    except OSError as error:
        raise InputError(f"--workdir: cannot use {workdir}: {error}. Choose another") from error


def _path(workdir: Path, number: int) -> Path:
    return workdir / f"lock-{number}.json"


def _numbers(workdir: Path) -> list[int]:
    """Return the numbers of the locks of a workdir."""
    found = (re.fullmatch(r"lock-(\d+)\.json", name) for name in os.listdir(workdir))
    return [int(match[1]) for match in found if match]


def _wait_until_stale(path: Path, workdir: Path) -> None:
    """Return when the owner of a lock is gone, at once where that can be seen.

    Raises:
        WorkdirInUse: the owner lives.
        FileNotFoundError: the lock was removed.
    """
    seen, began = path.read_bytes(), time.monotonic()
    owner = _owner(seen)
    if _is_gone(owner):
        return
    who = "process {pid} on {host}, since {since}".format_map({**_UNKNOWN, **owner})
    sign = f"waiting up to {_STALE:.0f} s for a sign of life"
    logger.warning("%s: another run uses it (%s); %s", workdir, who, sign)
    while time.monotonic() - began < _STALE:
        time.sleep(_POLL)
        if path.read_bytes() != seen:
            raise WorkdirInUse(
                f"--workdir: another run uses {workdir} ({who}). Let it end, or choose another "
                "folder with --workdir=..."
            )
    logger.warning("%s: no sign of life; this run takes over", workdir)


_UNKNOWN = dict.fromkeys(("pid", "host", "since"), "?")
_KNOWN = {"run", "host", "pid", "since", "kernel", "started", "thread"}


def _owner(data: bytes) -> dict[str, Any]:
    """Return what a lock says of its owner; nothing if it was not written to its end."""
    with contextlib.suppress(ValueError):
        found = json.loads(data)
        if isinstance(found, dict) and found.keys() >= _KNOWN:
            return found
    return {}


def _is_gone(owner: dict[str, Any]) -> bool:
    """Return whether an owner ran under this kernel, where it can be seen, and has ended."""
    if not owner or owner["kernel"] is None or owner["kernel"] != _kernel():
        return False
    if owner["started"] != _start_of(owner["pid"]):
        return True
    # This process itself, after an interrupt that came in the way of the release.
    others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
    return owner["pid"] == os.getpid() and owner["thread"] not in others


def _kernel() -> list[Any] | None:
    """Return what processes have in common that see each other by number; None if not known.

    These are host, boot, the container's numbering of processes, and the user.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [socket.gethostname(), boot, os.readlink("/proc/self/ns/pid"), os.getuid()]
    except OSError:
        return None


def _start_of(process: int) -> int | None:
    """Return when a process started, in ticks since the boot; None if there is none."""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])  # see proc(5): fields 3 and 22
