"""Batches of uint8 images: shuffled every epoch for training, in order for evaluation.

A training batch is a function of (seed, step) alone: an epoch's order is a permutation that can be
evaluated at any position, and every image draws its augmentation from a hash of (seed, epoch,
index). So the state of the stream is the step, for any number of threads and processes.
"""

import logging
import math
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input import counter_random
from nat_jax.input.bad_records import BadRecordError, BadRecords
from nat_jax.input.prefetch import check_main_program, check_shared_memory, prefetch_batches
from nat_jax.input.reader import GREY, Batch, ImageCache, ImageReader
from nat_jax.input.sources import Source
from nat_jax.input.transforms import Transform

_log = logging.getLogger(__name__)

T = TypeVar("T")

ON_BAD_RECORD = ("grey", "error")
_ORDER, _AUGMENTATION = 0, 1  # independent streams of random numbers
_MOST_RECORDS = 2**31 - 1
_PADDING = {"image": GREY, "index": -1, "label": -1, "weight": 0}


def _unchanged(batch: Batch) -> Any:
    return batch


class _TrainSteps:
    """Random access to the batches of training by step, for grain."""

    def __init__(
        self,
        reader: ImageReader,
        batch_size: int,
        rows: range,
        seed: int,
        num_steps: int,
        pixels: bool,
    ):
        self.reader = reader
        self.rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._num_steps = num_steps
        self._pixels = pixels

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: Any) -> Batch:
        reader, count = self.reader, len(self.reader.source)
        epoch, step_in_epoch = divmod(int(step), steps_per_epoch(count, self._batch_size))
        positions = step_in_epoch * self._batch_size + np.asarray(self.rows)
        order = counter_random.stream(self._seed, epoch, _ORDER)
        indices = counter_random.shuffled(positions, count, order)
        uniform = [
            counter_random.uniform(self._augmentation(epoch, view), indices, reader.transform.draws)
            for view in range(reader.views)
        ]
        batch = reader.batch(indices, np.stack(uniform), pixels=self._pixels)
        del batch["name"]
        return batch

    def _augmentation(self, epoch: int, view: int) -> np.ndarray:
        further = (view,) if view else ()  # the first view is the same whatever their number
        return counter_random.stream(self._seed, epoch, _AUGMENTATION, *further)


class _EvalSteps:
    """Random access to the batches of one pass in order, the last one padded."""

    def __init__(self, reader: ImageReader, batch_size: int, rows: range):
        self.reader = reader
        self.rows = rows
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.reader.source) // self._batch_size)

    def __getitem__(self, step: Any) -> Batch:
        wanted = int(step) * self._batch_size + np.asarray(self.rows)
        indices = wanted[wanted < len(self.reader.source)]
        batch = self.reader.batch(indices, np.empty((1, len(indices), 0)))
        if missing := len(wanted) - len(indices):
            for key, value in _PADDING.items():
                filler = np.full((missing, *batch[key].shape[1:]), value, batch[key].dtype)
                batch[key] = np.concatenate([batch[key], filler])
            batch["name"] += [""] * missing
        return batch


def steps_per_epoch(num_records: int, batch_size: int) -> int:
    """Count the complete batches of an epoch; the remainder is dropped, other records each time.

    Raises:
        ValueError: there is not one complete batch.
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
    """Return the batches of training steps start_step, ..., num_steps - 1.

    Each epoch visits every record at most once, in an order that depends on (seed, epoch) alone.
    The rows of all processes, concatenated, are the batch of a single process.

    Args:
        source: the records.
        transform: applied to each image.
        batch_size: records in the global batch, over all processes.
        seed: of order and augmentation, in [0, 2**32).
        start_step: first step, 0 for a new run; the only state of the stream.
        num_steps: steps of the complete run, counted from 0.
        views: independently augmented images of each record; the first is the same whatever their
            number.
        pixels: False leaves the images to `device_images.DeviceImages`: batches have
            corner int32 [b, views, 2] and mirrored bool [b, views] (see `transforms.ShiftFlip`)
            instead of image. Needs a `cache` that holds all images.
        on_bad_record: "grey" keeps the place of a bad record with pixels 128 and weight 0; "error"
            stops at the first.
        bad_records: counts them; None starts a new count.
        cache: keeps decoded images; None decodes in each epoch.
        process_index: part of each batch that this process reads, in [0, process_count).
        process_count: number of parts of a batch.
        threads: batches made at the same time, in all workers; 0 makes them one by one.
        workers: processes that make them, for hosts with many cores; 0 uses threads of this one, as
            do images that are cached. A script that uses workers needs
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
    reader = ImageReader(source, transform, views=views, cache=cache)
    if not pixels and not reader.cached:
        raise InputError(f"{source.name}: its images are not kept in memory, so pixels are needed")
    if workers and reader.cached:
        _log.info("%s is kept in memory: data.workers is not used", source.name)
    return _stream(
        _TrainSteps(reader, batch_size, rows, seed, num_steps, pixels),
        start_step,
        convert,
        bad_records=bad_records,
        stop_at_bad=on_bad_record == "error",
        threads=threads,
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
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
    """Return every record exactly once, in order.

    The last batch is padded with rows of index -1, label -1 and weight 0. Every process gets the
    same number of batches.

    Args:
        source: the records.
        transform: applied to each image; without randomness.
        batch_size: rows in the global batch, over all processes; may exceed the data.
        bad_records: counts bad records, which have pixels 128 and weight 0; None starts a new
            count.
        cache: keeps decoded images for other passes; None decodes in each pass.
        process_index: as in `train_batches`, like all that follow.
        process_count: number of parts of a batch.
        threads: batches made at the same time.
        workers: processes that make them.
        prefetch: batches kept ready.
        timeout: seconds that reading one record may take.

    Returns:
        Batches as in `train_batches`, image [b, count, H, W, 3] if the transform makes several
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
        raise InputError(f"evaluation must not be random, got the transform {transform}")
    rows = _rows(batch_size, process_index, process_count)
    return _stream(
        _EvalSteps(ImageReader(source, transform, cache=cache), batch_size, rows),
        0,
        _unchanged,
        bad_records=bad_records,
        stop_at_bad=False,
        threads=threads,
        workers=workers,
        prefetch=prefetch,
        timeout=timeout,
    )


def read_all(
    source: Source, transform: Transform, cache: ImageCache, *, threads: int, timeout: float
) -> np.ndarray | None:
    """Read all images of a source into a cache.

    Args:
        source: the records.
        transform: its crop is applied, its shift, flip and jitter are not.
        cache: where they are kept.
        threads: batches read at the same time.
        timeout: seconds that reading one record may take.

    Returns:
        uint8 [N, size, size, 3], the cache's own memory; None if the cache cannot keep them.
    """
    store = cache.store(source, transform)
    if store is None:
        return None
    still = Transform(transform.crop, white=transform.white)
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


def _stream(
    steps: _TrainSteps | _EvalSteps,
    start: int,
    convert: Callable[[Batch], T],
    *,
    bad_records: BadRecords | None,
    stop_at_bad: bool,
    threads: int,
    workers: int,
    prefetch: int,
    timeout: float,
) -> Generator[T, None, None]:
    reader = steps.reader
    workers = 0 if reader.cached else workers  # the cache is this process's
    if workers:
        check_main_program()
        check_shared_memory(workers, prefetch, len(steps.rows) * math.prod(reader.image_shape))
    counted = BadRecords(len(reader.source)) if bad_records is None else bad_records

    def checked(batch: Batch) -> T:
        for bad in batch.pop("bad"):
            if stop_at_bad:
                raise BadRecordError(f"bad record {bad.index} ({bad.name}): {bad.reason}")
            counted.add(bad)
        return convert(batch)

    return prefetch_batches(
        steps,
        start,
        checked,
        threads=threads,
        workers=workers,
        depth=prefetch,
        timeout=timeout,
        log=reader.log,
        name_of=reader.source.record_name,
    )
