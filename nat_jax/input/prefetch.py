"""Prefetching: grain makes batches in threads or worker processes, one thread converts them.

A worker that hangs or dies ends the run with the name of the record that it was reading.
"""

import multiprocessing
import multiprocessing.connection
import multiprocessing.spawn
import os
import shutil
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

from nat_jax.errors import InputError
from nat_jax.input.bad_records import BadRecordError
from nat_jax.input.work_log import Reading, WorkLog

A = TypeVar("A")
B = TypeVar("B")
T_co = TypeVar("T_co", covariant=True)

_CONVERTED = 2  # batches on the devices or on their way there, besides the one in use
_POLL = 0.2  # seconds between looks at the workers
_START_UP = 120.0  # seconds in which worker processes must start
_CLOSING = 30.0  # seconds in which workers must end once no more batches are wanted
_MIN_SHARED = 2**16  # bytes from which on an array is passed in shared memory: the pixels
_DIED = "terminated unexpectedly"  # part of grain's message
_END: Any = object()


class Steps(Protocol[T_co]):
    """Random access to batches."""

    def __len__(self) -> int: ...

    def __getitem__(self, step: Any) -> T_co: ...


class Stalled(BadRecordError):
    """Reading a record takes too long; if a thread reads it, this process cannot end by itself."""

    leaves_a_thread = True


class WorkerDied(BadRecordError):
    """A worker process was killed or crashed."""


def prefetch_batches(
    steps: Steps[A],
    start: int,
    convert: Callable[[A], B],
    *,
    threads: int,
    workers: int,
    depth: int,
    timeout: float,
    log: WorkLog,
    name_of: Callable[[int], str],
) -> Generator[B, None, None]:
    """Make batches and convert them ahead of time.

    Args:
        steps: makes any batch by its number; picklable if there are workers.
        start: the first batch.
        convert: applied to each batch in one thread, for instance the transfer to the devices.
        threads: batches made at the same time, in all workers; 0 makes them in the thread that
            converts them.
        workers: processes; 0 uses threads of this one.
        depth: batches kept ready to be converted, at least one for each thread.
        timeout: seconds that reading one record may take.
        log: where the workers note what they read.
        name_of: returns a record's name by its index, without reading it.

    Yields:
        convert(steps[start]), convert(steps[start + 1]), ..., in order.

    Raises:
        Stalled: no batch arrived, and one record took longer than `timeout`; or nothing was being
            read for as long, two minutes at least.
        WorkerDied: a worker process was killed or crashed.
    """
    if start >= len(steps):
        return
    batches = _made_by_grain(steps, start, threads=threads, workers=workers, depth=depth)
    pool = ThreadPoolExecutor(1, thread_name_prefix="nat_jax-prefetch")
    closing = weakref.finalize(pool, batches.close)  # at exit too, if the stream was abandoned

    def fetch() -> Any:
        batch = next(batches, _END)
        return _END if batch is _END else convert(batch)

    patience = _CLOSING
    pending = deque(pool.submit(fetch) for _ in range(_CONVERTED))
    try:
        while (batch := _result(pending[0], timeout, log, name_of)) is not _END:
            pending.popleft()
            pending.append(pool.submit(fetch))
            yield batch
    except Stalled:
        log.kill_workers()
        patience = 0.0  # a thread cannot be ended
        raise
    except RuntimeError as error:
        if _DIED not in str(error):
            raise
        message = _cause_of_death(error, log.under_way(), name_of)
        log.kill_workers()
        raise WorkerDied(message) from error
    finally:
        running = [future for future in pending if not future.cancel()]
        pool.shutdown(wait=False)
        if wait(running, patience).not_done:
            closing.detach()
        else:
            closing()


def _made_by_grain(
    steps: Steps[A], start: int, *, threads: int, workers: int, depth: int
) -> Generator[A, None, None]:
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
            flags.FLAGS.mark_as_parsed()  # grain reads flags, in notebooks too
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=_per_worker(depth, workers)
            ),
            worker_init_fn=_end_with_parent,
        )
    batches = iter(dataset)
    try:
        yield from batches
    finally:
        batches.close()


def _per_worker(depth: int, workers: int) -> int:
    return max(1, depth // workers)


def check_main_program() -> None:
    """Check that workers can import the main program, as they do when they start.

    Raises:
        InputError: it was read from standard input.
    """
    file = multiprocessing.spawn.get_preparation_data("").get("init_main_from_path")
    if file is not None and not os.path.exists(file):
        raise InputError(
            "data.workers: worker processes import the main program, and code that was read from "
            f"standard input ({os.path.basename(file)}) cannot be imported. Save it as a file, or "
            "set data.workers=0 for threads"
        )


def check_shared_memory(
    workers: int, depth: int, batch_bytes: int, place: str = "/dev/shm"
) -> None:
    """Check that the batches of workers fit into the shared memory that passes them on.

    Otherwise a worker would die in the middle of a write.

    Raises:
        ValueError: less is free than they need.
    """
    if not os.path.isdir(place):
        return
    # Those that wait in each worker, one that it writes, and those that are in use.
    needed = (workers * (_per_worker(depth, workers) + 1) + 4) * batch_bytes
    free = shutil.disk_usage(place).free
    if needed > free:
        raise InputError(
            f"data.workers: batches wait in {place}; expected {needed / 1e6:.0f} MB free, for "
            f"{workers} workers and data.prefetch = {depth}; got {free / 1e6:.0f} MB. Enlarge it "
            "(docker run --shm-size=...), lower data.prefetch or data.workers, or set "
            "data.workers=0 for threads"
        )


def _result(future: Future[B], timeout: float, log: WorkLog, name_of: Callable[[int], str]) -> B:
    """Wait for a batch; raise Stalled if its workers make no progress."""
    # Seconds are counted by waits, so that time in which the process is suspended does not count.
    waited, stuck = 0.0, dict[Reading, float]()
    while not wait([future], _POLL).done:
        waited += _POLL
        stuck = {reading: stuck.get(reading, 0.0) + _POLL for reading in log.under_way()}
        late = [reading for reading, seconds in stuck.items() if seconds > timeout]
        if late:
            raise Stalled(
                f"{_named(late, name_of)}: reading it has taken more than {timeout:g} s. Look at "
                "the disk, or raise data.timeout; then the same line goes on. (A file that is "
                "replaced by one of another size is other data, and needs another --workdir)"
            )
        if not stuck and waited > max(timeout, _START_UP):
            raise Stalled(
                f"no batch has come for {waited:.0f} s, and no record is being read: the data "
                "workers are gone, or a device does not take its data. Start again; with "
                "data.workers=0 the workers are threads"
            )
    return future.result()


def _cause_of_death(
    error: Exception, under_way: list[Reading], name_of: Callable[[int], str]
) -> str:
    code = str(error).partition("exit code ")[2].partition(".")[0]
    alive = {os.getpid(), *(child.pid for child in multiprocessing.active_children())}
    readings = [reading for reading in under_way if reading.process not in alive]
    message = f"a data worker died with exit code {code}"
    if readings:
        message += f" while it read {_named(readings, name_of)}"
    if code == f"-{signal.SIGKILL.value}":
        message += "; the system may have been short of memory: lower data.workers or data.prefetch"
    elif code == f"-{signal.SIGBUS.value}":
        message += (
            "; /dev/shm may be full: enlarge it (docker run --shm-size=4g), or lower data.prefetch"
        )
    elif not code.startswith("-") and not readings:
        message += " before it read anything; it says why above"
        if hasattr(sys.modules["__main__"], "__file__"):  # not in a notebook
            message += (
                '. A script of yours that asks for workers needs `if __name__ == "__main__":`'
            )
    return message


def _named(readings: list[Reading], name_of: Callable[[int], str]) -> str:
    return ", ".join(f"record {r.record} ({name_of(r.record)})" for r in readings[:3])


def _keep_signals_from_workers() -> None:
    """Block Ctrl-C in this thread, so that the processes it starts ignore it.

    A terminal sends it to all processes, and workers must go on until the run has made its last
    step.
    """
    resource_tracker.ensure_running()  # starting it later would lift the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))


def _end_with_parent(worker: int, count: int) -> None:
    """End a worker process when its parent was killed; it would wait for it for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent.sentinel,), daemon=True).start()


def _wait_and_end(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
