"""Batches of uint8 images: shuffled every epoch for training, in order for evaluation.

What a step holds is a function of (seed, step) alone: an epoch's order is a permutation that can be
looked up anywhere, and every image draws its augmentation from a hash of (seed, epoch, index). So
the state of the stream is the step, for any number of threads and processes. grain makes steps
ahead of time, in threads or in worker processes; `nat_jax.input.prefetch` moves
them to the devices and watches over the workers.
"""

import logging
import math
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input import counter_random
from nat_jax.input.bad_records import BadRecordError, BadRecords
from nat_jax.input.prefetch import check_shared_memory, made_ahead, prefetched
from nat_jax.input.reader import GREY, Batch, ImageCache, ImageReader
from nat_jax.input.sources import Source
from nat_jax.input.transforms import Transform
from nat_jax.input.work_log import WorkLog

_log = logging.getLogger(__name__)

T = TypeVar("T")

ON_BAD_RECORD = ("grey", "error")
_ORDER, _AUGMENTATION = 0, 1  # independent streams of chance
_MOST_RECORDS = 2**31 - 1
_CONVERTED = 2  # batches on their way to the devices, or there: one is used while one is moved


def _unchanged(batch: Batch) -> Any:
    return batch


class _TrainSteps:
    """Random access to the batches of training, by step: what grain reads from."""

    def __init__(
        self,
        reader: ImageReader,
        batch_size: int,
        rows: range,
        seed: int,
        num_steps: int,
        pixels: bool,
    ):
        self._read = reader.batch if pixels else reader.moves
        self._reader = reader
        self._count = len(reader.source)
        self._steps_per_epoch = steps_per_epoch(self._count, batch_size)
        self._batch_size = batch_size
        self._rows = np.asarray(rows)
        self._seed = seed
        self._num_steps = num_steps

    @property
    def source(self) -> Source:
        return self._reader.source

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: Any) -> Batch:
        epoch, step_in_epoch = divmod(int(step), self._steps_per_epoch)
        positions = step_in_epoch * self._batch_size + self._rows
        order = counter_random.stream(self._seed, epoch, _ORDER)
        indices = counter_random.shuffled(positions, self._count, order)
        draws = self._reader.transform.draws
        uniform = [
            counter_random.uniform(self._augmentation(epoch, view), indices, draws)
            for view in range(self._reader.views)
        ]
        batch = self._read(indices, np.stack(uniform))
        del batch["name"]
        return batch

    def _augmentation(self, epoch: int, view: int) -> np.ndarray:
        further = (view,) if view else ()  # the first is what there was before there were views
        return counter_random.stream(self._seed, epoch, _AUGMENTATION, *further)


class _EvalSteps:
    """Random access to the batches of one pass in order, the last one padded."""

    def __init__(self, reader: ImageReader, batch_size: int, rows: range):
        self._reader = reader
        self._batch_size = batch_size
        self._rows = rows

    @property
    def source(self) -> Source:
        return self._reader.source

    def __len__(self) -> int:
        return -(-len(self._reader.source) // self._batch_size)

    def __getitem__(self, step: Any) -> Batch:
        start = int(step) * self._batch_size
        wanted = np.arange(start + self._rows.start, start + self._rows.stop)
        indices = wanted[wanted < len(self._reader.source)]
        missing = len(wanted) - len(indices)
        batch: Batch = {
            "image": np.empty((0, *self._reader.image_shape), np.uint8),
            "index": np.empty(0, np.int32),
            "label": np.empty(0, np.int32),
            "weight": np.empty(0, np.float32),
            "name": [],
            "bad": [],
        }
        if len(indices):
            batch = self._reader.batch(indices, np.empty((1, len(indices), 0)))
        if missing:
            padding = {"image": GREY, "index": -1, "label": -1, "weight": 0}
            for key, value in padding.items():
                shape = (missing, *batch[key].shape[1:])
                filler = np.full(shape, value, batch[key].dtype)
                batch[key] = np.concatenate([batch[key], filler])
            batch["name"] += [""] * missing
        return batch


def steps_per_epoch(num_records: int, batch_size: int) -> int:
    """Count the whole batches in one epoch; what is left over is dropped, other records each time.

    Raises:
        ValueError: there is not one whole batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if num_records > _MOST_RECORDS:
        raise InputError(
            f"the data has {num_records} records; expected at most {_MOST_RECORDS}, as their "
            "numbers are int32. Train on a part of it"
        )
    if batch_size > num_records:
        raise InputError(
            f"batch_size={batch_size} is larger than the training data, which has {num_records} "
            f"records; give at most {num_records}, for instance --config.batch_size="
            f"{2 ** (num_records.bit_length() - 1)}"
        )
    return num_records // batch_size


def train_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    views: int = 1,
    pixels: bool = True,
    on_bad_record: str = "grey",
    bad_records: BadRecords | None = None,
    cache: ImageCache | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    workers: int = 0,
    prefetch: int = 8,
    timeout: float = 300.0,
    convert: Callable[[Batch], T] = _unchanged,
) -> Generator[T, None, None]:
    """Give the batches of training steps start_step, ..., num_steps - 1.

    Each epoch visits every record at most once, in an order that depends on (seed, epoch) alone.
    The processes' rows, put one after the other, are the batch that a single process would get.

    Args:
        source: the records.
        transform: what becomes of each image.
        batch_size: records in the global batch, over all processes.
        seed: in [0, 2**32); order and augmentation.
        start_step: first step to give, 0 for a new run: the whole state of the stream.
        num_steps: steps of the whole run, counted from 0.
        views: images made of each record, by independent chance; the first is the same whatever
            their number.
        pixels: False leaves the images to `device_images.DeviceImages`, and gives corner int32
            [b, views, 2] and mirrored bool [b, views] instead (see `preprocess.Moves`). Needs
            `cache` to hold all images.
        on_bad_record: "grey" keeps the place of a bad record with pixels 128 and weight 0; "error"
            stops at the first.
        bad_records: counts them; a new count when left out.
        cache: keeps decoded images; None decodes anew in each epoch.
        process_index: which part of each batch this process gets, in [0, process_count).
        process_count: into how many parts batches are divided.
        threads: batches made at the same time, in all workers; 0 makes them where they are asked
            for.
        workers: processes that make them, for hosts with many cores; 0 uses threads of this one.
            Images that are cached are always made by threads. A script that asks for workers needs
            `if __name__ == "__main__":`, as they import it.
        prefetch: batches kept ready, at least one for each thread.
        timeout: seconds that reading one record may take.
        convert: applied to each batch ahead of time, for instance the transfer to the devices.

    Returns:
        `convert` of batches of b = batch_size // process_count rows: image uint8 [b, H, W, 3], or
        [b, views, H, W, 3] with several views; index int32 [b], label int32 [b] (-1: none), weight
        float32 [b] (0: bad record).

    Raises:
        ValueError: the arguments do not fit together or the data, at once.
        BadRecordError: while iterating, with the name of the record that stops the run.
    """
    steps_per_epoch(len(source), batch_size)
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be in [0, 2**32), got {seed}")
    if start_step < 0:
        raise InputError(f"start_step must be 0 or more, got {start_step}")
    if views < 1:
        raise InputError(f"views must be at least 1, got {views}")
    if on_bad_record not in ON_BAD_RECORD:
        known = ", ".join(ON_BAD_RECORD)
        raise InputError(f"unknown on_bad_record {on_bad_record!r}; known: {known}")
    rows = _rows(batch_size, process_index, process_count)
    log = WorkLog()
    reader = ImageReader(source, transform, views=views, cache=cache, log=log)
    if not pixels and not reader.cached:
        raise InputError(f"{source.name}: its images are not kept in memory, so pixels are needed")
    if workers and reader.cached:
        _log.info("%s is kept in memory: data.workers is not used", source.name)
        workers = 0
    if workers:
        check_shared_memory(workers, prefetch, len(rows) * math.prod(reader.image_shape))
    return _iterate(
        _TrainSteps(reader, batch_size, rows, seed, num_steps, pixels),
        start_step,
        threads=threads,
        workers=workers,
        depth=prefetch,
        timeout=timeout,
        log=log,
        bad_records=BadRecords(len(source)) if bad_records is None else bad_records,
        stop_at_bad=on_bad_record == "error",
        convert=convert,
    )


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    bad_records: BadRecords | None = None,
    cache: ImageCache | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    workers: int = 0,
    prefetch: int = 8,
    timeout: float = 300.0,
) -> Generator[Batch, None, None]:
    """Give every record exactly once, in order.

    The last batch is padded with rows of index -1, label -1 and weight 0. Every process gets the
    same number of batches.

    Args:
        source: the records.
        transform: what becomes of each image, without randomness.
        batch_size: rows in the global batch, over all processes; may exceed the data.
        bad_records: counts bad records, which come grey and with weight 0; a new count when left
            out.
        cache: keeps decoded images for other passes; None decodes anew.
        process_index: which part of each batch this process gets, in [0, process_count).
        process_count: into how many parts batches are divided.
        threads: batches made at the same time, in all workers; 0 makes them where they are asked
            for.
        workers: processes that make them; 0 uses threads of this one.
        prefetch: batches kept ready, at least one for each thread.
        timeout: seconds that reading one record may take.

    Returns:
        Batches as in `train_batches`, image [b, count, H, W, 3] where the transform gives several
        images, with "name", the list of the records' names ("" for padding). Close the generator to
        end its threads early.

    Raises:
        ValueError: the arguments do not fit together or the data, at once.
        BadRecordError: while iterating, with the name of the record that stops the run.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if not len(source):
        raise InputError(f"{source.name} has no records in its {source.split} split")
    if transform.draws:
        raise InputError(f"evaluation must not depend on chance, got the transform {transform}")
    rows = _rows(batch_size, process_index, process_count)
    log = WorkLog()
    reader = ImageReader(source, transform, cache=cache, log=log)
    workers = 0 if reader.cached else workers
    if workers:
        check_shared_memory(workers, prefetch, len(rows) * math.prod(reader.image_shape))
    return _iterate(
        _EvalSteps(reader, batch_size, rows),
        0,
        threads=threads,
        workers=workers,
        depth=prefetch,
        timeout=timeout,
        log=log,
        bad_records=BadRecords(len(source)) if bad_records is None else bad_records,
        stop_at_bad=False,
        convert=_unchanged,
    )


def read_all(
    source: Source, transform: Transform, cache: ImageCache, *, threads: int, timeout: float
) -> np.ndarray | None:
    """Read all images of a source into a cache.

    Args:
        source: the records.
        transform: whose crop is kept; what moves images is not applied.
        cache: where they are kept.
        threads: batches read at the same time.
        timeout: seconds that reading one record may take.

    Returns:
        uint8 [N, size, size, 3], the cache's own memory; None where the cache cannot keep them.
    """
    store = cache.store(source, transform.crop)
    if store is None:
        return None
    still = Transform(transform.crop)
    for _ in eval_batches(
        source, still, batch_size=256, cache=cache, threads=threads, timeout=timeout
    ):
        pass
    return store.images


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index={process_index} is not in [0, {process_count})")
    if batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} is not divisible by the {process_count} processes"
        )
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


def _iterate(
    steps: _TrainSteps | _EvalSteps,
    start: int,
    *,
    threads: int,
    workers: int,
    depth: int,
    timeout: float,
    log: WorkLog,
    bad_records: BadRecords,
    stop_at_bad: bool,
    convert: Callable[[Batch], T],
) -> Generator[T, None, None]:
    if start >= len(steps):
        return

    def checked(batch: Batch) -> T:
        for bad in batch.pop("bad"):
            if stop_at_bad:
                raise BadRecordError(f"bad record {bad.index} ({bad.name}): {bad.reason}")
            bad_records.add(bad)
        return convert(batch)

    yield from prefetched(
        made_ahead(steps, start, threads=threads, workers=workers, depth=depth),
        checked,
        depth=_CONVERTED,
        timeout=timeout,
        log=log,
        name_of=steps.source.record_name,
    )
