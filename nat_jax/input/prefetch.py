"""Batches before they are asked for: made by grain, then fetched and moved to the devices.

Threads or worker processes make them; one more thread fetches and converts them while others are
being used. A worker that hangs or dies ends the run with the name of the record it was at, within a
bound.
"""

import math
import multiprocessing.connection
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

from nat_jax.errors import InputError
from nat_jax.input.bad_records import BadRecordError
from nat_jax.input.work_log import Reading, WorkLog, is_alive

A = TypeVar("A")
B = TypeVar("B")
T_co = TypeVar("T_co", covariant=True)

_POLL = 0.2  # seconds between looks at the workers
_START_UP = 120.0  # seconds that worker processes have to start in
_GOODBYE = 30.0  # seconds that workers have to end when nobody wants their batches any more
_MIN_SHARED = 2**16  # bytes of an array from which on shared memory pays: pixels
_PAUSE = 5.0  # seconds between two looks that say that this process was suspended
_DIED = "terminated unexpectedly"  # in grain's words


class Steps(Protocol[T_co]):
    """Random access to batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: Any) -> T_co: ...


class Stalled(BadRecordError):
    """A worker has been at one record for too long; if it is a thread, this process cannot end."""

    leaves_a_thread = True


class WorkerDied(BadRecordError):
    """A worker process ended without a word."""


def made_ahead(
    steps: Steps[A], start: int, *, threads: int, workers: int, depth: int
) -> Generator[A, None, None]:
    """Have grain make batches ahead of time, in threads of this process or of workers.

    Args:
        steps: gives any batch by its number; picklable if there are workers.
        start: the first to give.
        threads: batches made at the same time, in all workers; 0 makes each where it is asked for.
        workers: processes; 0 for threads of this one.
        depth: batches kept ready, at least one for each thread.

    Yields:
        steps[start], steps[start + 1], ..., in order.
    """
    import grain
    from absl import flags

    each = -(-threads // max(workers, 1))
    ready = each if workers else max(depth, threads)
    options = grain.ReadOptions(num_threads=each, prefetch_buffer_size=ready if threads else 0)
    dataset = grain.MapDataset.source(steps)[start:].to_iter_dataset(options)
    if workers:
        _keep_signals_from_workers()
        small = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, small)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads flags there, in notebooks too
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=per_worker(depth, workers)
            ),
            worker_init_fn=_end_with_parent,
        )
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()


def per_worker(depth: int, workers: int) -> int:
    """Return how many batches each worker keeps ready."""
    return max(1, depth // workers)


def check_shared_memory(
    workers: int, depth: int, batch_bytes: int, place: str = "/dev/shm"
) -> None:
    """Check that the batches of workers fit into shared memory, through which they come.

    Where they do not, a worker dies in the middle of a write.

    Raises:
        ValueError: there is less free than they need.
    """
    if not os.path.isdir(place):
        return
    # Each worker's ready ones, one that it writes, and those that are being used.
    needed = (workers * (per_worker(depth, workers) + 1) + 4) * batch_bytes
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"data.workers: batches wait in {place}; expected {needed / 1e6:.0f} MB free, for "
            f"{workers} workers and data.prefetch = {depth}; got {free / 1e6:.0f} MB. Enlarge it "
            "(docker run --shm-size=...), lower data.prefetch or data.workers, or set "
            "data.workers=0 for threads"
        )


def prefetched(
    batches: Generator[A, None, None],
    convert: Callable[[A], B],
    *,
    depth: int,
    timeout: float,
    log: WorkLog,
    name_of: Callable[[int], str],
) -> Generator[B, None, None]:
    """Give converted batches, fetched and converted ahead of time in a thread of their own.

    Args:
        batches: what to fetch from; closed at the end, in that thread.
        convert: applied to each, for instance the transfer to the devices.
        depth: converted batches kept ready.
        timeout: seconds that a single record may take.
        log: where the workers note what they read.
        name_of: gives a record's name by its index, without reading it.

    Yields:
        What `convert` returned, in order.

    Raises:
        Stalled: no batch came, and one record took longer than `timeout`; or nothing was being read
            for as long, two minutes at least.
        WorkerDied: a worker process was killed or crashed.
    """
    fetcher = _Fetcher(batches, convert, depth)
    waiting_since = looked = time.monotonic()
    resumed, patience = -math.inf, _GOODBYE
    try:
        for item in fetcher:
            now = time.monotonic()
            if item is None:
                if now - looked > _PAUSE:
                    waiting_since = resumed = now  # suspended, and the workers with it
                if now - resumed > timeout:
                    _check(log.under_way(), now - waiting_since, timeout, name_of)
                looked = now
                continue
            yield item
            waiting_since = looked = time.monotonic()
    except Stalled:
        log.end_workers()
        patience = 0.0  # a thread cannot be ended
        raise
    except RuntimeError as error:
        if _DIED not in str(error):
            raise
        obituary = _obituary(error, log.under_way(), name_of)
        log.end_workers()
        raise WorkerDied(obituary) from error
    finally:
        fetcher.close(patience)


class _Fetcher:
    """The thread, and what it hands over."""

    def __init__(self, batches: Generator[A, None, None], convert: Callable[[A], B], depth: int):
        self._batches, self._convert = batches, convert
        self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nat_jax-prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for batch in self._batches:
                if not self._hand_over(self._convert(batch), None):
                    return
            self._hand_over(None, StopIteration())
        except BaseException as error:
            self._hand_over(None, error)
        finally:
            self._batches.close()

    def _hand_over(self, item: Any, error: BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put((item, error), timeout=_POLL)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        """Give what is ready; None after each interval in which nothing was."""
        while True:
            try:
                item, error = self._ready.get(timeout=_POLL)
            except queue.Empty:
                yield None
                continue
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item

    def close(self, patience: float) -> None:
        self._stop.set()
        self._thread.join(patience)


def _check(
    under_way: list[Reading], waited: float, timeout: float, name_of: Callable[[int], str]
) -> None:
    """Raise Stalled if a wait has gone on for too long."""
    late = [reading for reading in under_way if reading.seconds > timeout]
    if late:
        raise Stalled(
            f"{_named(late, name_of)}: reading it has taken more than {timeout:g} s. Look at the "
            "disk, or raise data.timeout; then the same line goes on. (A file that is replaced by "
            "one of another size is other data, and needs another --workdir)"
        )
    if not under_way and waited > max(timeout, _START_UP):
        raise Stalled(
            f"no batch has come for {waited:.0f} s, and no record is being read: the data workers "
            "are gone, or a device does not take its data. Start again; with data.workers=0 the "
            "workers are threads"
        )


def _obituary(error: Exception, under_way: list[Reading], name_of: Callable[[int], str]) -> str:
    code = str(error).partition("exit code ")[2].partition(".")[0]
    readings = [reading for reading in under_way if not is_alive(reading.process)]
    said = f"a data worker died with exit code {code}"
    if readings:
        said += f" while it read {_named(readings, name_of)}"
    if code == f"-{signal.SIGKILL.value}":
        said += "; the system may have been short of memory: lower data.workers or data.prefetch"
    elif code == f"-{signal.SIGBUS.value}":
        said += (
            "; /dev/shm may be full: enlarge it (docker run --shm-size=4g), or lower data.prefetch"
        )
    elif not code.startswith("-") and not readings:
        said += (
            " before it read anything; it says why above. A script of yours that asks for workers "
            'needs `if __name__ == "__main__":`'
        )
    return said


def _named(readings: list[Reading], name_of: Callable[[int], str]) -> str:
    return ", ".join(f"record {r.index} ({name_of(r.index)})" for r in readings[:3])


def _keep_signals_from_workers() -> None:
    """Let the processes that this thread starts ignore Ctrl-C, which reaches a terminal's all.

    They inherit its mask, and shall go on until the run has made its last step.
    """
    resource_tracker.ensure_running()  # starting it would lift the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _end_with_parent(worker: int, count: int) -> None:
    """Let a worker process end when the one that started it was killed, for whom it would wait."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent.sentinel,), daemon=True).start()


def _wait_and_end(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
