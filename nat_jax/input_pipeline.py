"""Batches of uint8 images: shuffled every epoch for training, in order for evaluation.

What a step holds is a function of (seed, step) alone: an epoch's order is a permutation that can be
looked up anywhere, and every image draws its augmentation from a hash of (seed, epoch, index). So
the state of the stream is the step, for any number of threads and processes. grain makes steps
ahead of time, in threads.
"""

from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from nat_jax import host_random, preprocess
from nat_jax.image_reader import (
    GREY,
    BadRecordError,
    BadRecords,
    Batch,
    ImageCache,
    ImageReader,
    TooManyBadRecords,
)
from nat_jax.preprocess import Transform
from nat_jax.records import Source

__all__ = [
    "BadRecordError",
    "BadRecords",
    "Batch",
    "ImageCache",
    "TooManyBadRecords",
    "eval_batches",
    "steps_per_epoch",
    "train_batches",
]

_ON_BAD_RECORD = ("grey", "error")
_ORDER, _AUGMENTATION = 0, 1  # independent streams of chance


class _TrainSteps:
    """Random access to the batches of training, by step: what grain reads from."""

    def __init__(
        self, reader: ImageReader, batch_size: int, rows: range, seed: int, num_steps: int
    ):
        self._reader = reader
        self._count = len(reader.source)
        self._steps_per_epoch = steps_per_epoch(self._count, batch_size)
        self._batch_size = batch_size
        self._rows = np.asarray(rows)
        self._seed = seed
        self._num_steps = num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: Any) -> Batch:
        epoch, step_in_epoch = divmod(int(step), self._steps_per_epoch)
        positions = step_in_epoch * self._batch_size + self._rows
        order = host_random.stream(self._seed, epoch, _ORDER)
        indices = host_random.shuffled(positions, self._count, order)
        augmentation = host_random.stream(self._seed, epoch, _AUGMENTATION)
        uniform = host_random.uniform(augmentation, indices, self._reader.draws)
        return self._reader.batch(indices, uniform)[0]


class _EvalSteps:
    """Random access to the batches of one pass in order, the last one padded."""

    def __init__(self, reader: ImageReader, batch_size: int, rows: range, with_names: bool):
        self._reader = reader
        self._batch_size = batch_size
        self._rows = rows
        self._with_names = with_names

    def __len__(self) -> int:
        return -(-len(self._reader.source) // self._batch_size)

    def __getitem__(self, step: Any) -> Batch:
        start = int(step) * self._batch_size
        wanted = np.arange(start + self._rows.start, start + self._rows.stop)
        indices = wanted[wanted < len(self._reader.source)]
        missing = len(wanted) - len(indices)
        size = self._reader.size
        batch: Batch = {
            "image": np.empty((0, size, size, 3), np.uint8),
            "index": np.empty(0, np.int32),
            "label": np.empty(0, np.int32),
            "weight": np.empty(0, np.float32),
        }
        names: list[str] = []
        if len(indices):
            batch, names = self._reader.batch(indices, np.empty((len(indices), 0)))
        if missing:
            padding = {"image": GREY, "index": -1, "label": -1, "weight": 0}
            for key, value in padding.items():
                shape = (missing, *batch[key].shape[1:])
                filler = np.full(shape, value, batch[key].dtype)
                batch[key] = np.concatenate([batch[key], filler])
            names += [""] * missing
        if self._with_names:
            batch["name"] = np.asarray(names)
        return batch


def steps_per_epoch(num_records: int, batch_size: int) -> int:
    """Count the whole batches in one epoch; what is left over is dropped, other records each time.

    Raises:
        ValueError: there is not one whole batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if batch_size > num_records:
        raise ValueError(
            f"batch_size={batch_size} is larger than the data, which has {num_records} records; "
            f"give at most {num_records}"
        )
    return num_records // batch_size


def train_batches(
    source: Source,
    transform: Sequence[Transform],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_steps: int,
    on_bad_record: str = "grey",
    bad_records: BadRecords | None = None,
    cache: ImageCache | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 8,
) -> Generator[Batch, None, None]:
    """Give the batches of training steps start_step, ..., num_steps - 1.

    Each epoch visits every record at most once, in an order that depends on (seed, epoch) alone.
    The processes' rows, put one after the other, are the batch that a single process would get.

    Args:
        source: the records.
        transform: steps of `preprocess`, ending in images of one size.
        batch_size: images in the global batch, over all processes.
        seed: in [0, 2**32); order and augmentation.
        start_step: first step to give, 0 for a new run: the whole state of the stream.
        num_steps: steps of the whole run, counted from 0.
        on_bad_record: "grey" keeps the place of a bad record with pixels 128 and weight 0; "error"
            stops at the first.
        bad_records: counts them; a new count when left out.
        cache: keeps decoded images; None decodes anew in each epoch.
        process_index: which part of each batch this process gets, in [0, process_count).
        process_count: into how many parts batches are divided.
        threads: batches made at the same time; 0 makes them where they are asked for.
        prefetch: batches kept ready, at least `threads`.

    Returns:
        Batches of b = batch_size // process_count rows: image uint8 [b, H, W, 3], index
        int32 [b], label int32 [b] (-1: none), weight float32 [b] (0: bad record).

    Raises:
        ValueError: the arguments do not fit together or the data, at once.
        BadRecordError: while iterating, with the name of the record that stops the run.
    """
    steps_per_epoch(len(source), batch_size)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if start_step < 0:
        raise ValueError(f"start_step must be 0 or more, got {start_step}")
    if on_bad_record not in _ON_BAD_RECORD:
        known = ", ".join(_ON_BAD_RECORD)
        raise ValueError(f"unknown on_bad_record {on_bad_record!r}; known: {known}")
    rows = _rows(batch_size, process_index, process_count)
    if on_bad_record == "error":
        bad_records = None
    elif bad_records is None:
        bad_records = BadRecords(len(source))
    reader = ImageReader(source, transform, cache, bad_records)
    steps = _TrainSteps(reader, batch_size, rows, seed, num_steps)
    return _iterate(steps, start_step, threads, prefetch)


def eval_batches(
    source: Source,
    transform: Sequence[Transform],
    *,
    batch_size: int,
    bad_records: BadRecords | None = None,
    cache: ImageCache | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 4,
    prefetch: int = 8,
    with_names: bool = False,
) -> Generator[Batch, None, None]:
    """Give every record exactly once, in order.

    The last batch is padded with rows of index -1, label -1 and weight 0. Every process gets the
    same number of batches.

    Args:
        source: the records.
        transform: steps of `preprocess` without randomness, ending in images of one size.
        batch_size: rows in the global batch, over all processes; may exceed the data.
        bad_records: counts bad records, which come grey and with weight 0; a new count when left
            out.
        cache: keeps decoded images for other passes; None decodes anew.
        process_index: which part of each batch this process gets, in [0, process_count).
        process_count: into how many parts batches are divided.
        threads: batches made at the same time; 0 makes them where they are asked for.
        prefetch: batches kept ready, at least `threads`.
        with_names: add "name", the records' names ("" for padding), to each batch.

    Returns:
        Batches as in `train_batches`. Close the generator to end its threads early.

    Raises:
        ValueError: the arguments do not fit together or the data, at once.
        BadRecordError: while iterating, with the name of the record that stops the run.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not len(source):
        raise ValueError(f"{source.name} has no records in its {source.split} split")
    if preprocess.draws(transform):
        raise ValueError(f"evaluation must not depend on chance, got the transform {transform}")
    rows = _rows(batch_size, process_index, process_count)
    if bad_records is None:
        bad_records = BadRecords(len(source))
    reader = ImageReader(source, transform, cache, bad_records)
    return _iterate(_EvalSteps(reader, batch_size, rows, with_names), 0, threads, prefetch)


def _rows(batch_size: int, process_index: int, process_count: int) -> range:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} is not in [0, {process_count})")
    if batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} is not divisible by the {process_count} processes"
        )
    local = batch_size // process_count
    return range(process_index * local, (process_index + 1) * local)


def _iterate(
    steps: _TrainSteps | _EvalSteps, start: int, threads: int, prefetch: int
) -> Generator[Batch, None, None]:
    if start >= len(steps):
        return
    import grain

    options = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(prefetch, threads) if threads else 0
    )
    batches = iter(grain.MapDataset.source(steps)[start:].to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()
