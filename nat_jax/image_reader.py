"""From record numbers to stacked pixels: read, decode, augment; remember images, count bad ones."""

import logging
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nat_jax import preprocess
from nat_jax.preprocess import BadImage, Transform
from nat_jax.records import Source, UnreadableRecord

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

GREY = 128  # the pixels of bad records and of padding
_BAD_SHARE = 100  # one record in this many may be bad
_NAMES_SHOWN = 5


class BadRecordError(RuntimeError):
    """A record cannot be used; the message names it and says why."""


class TooManyBadRecords(BadRecordError):
    """More records are bad than a run may go on with."""


class BadRecords:
    """Count of the distinct bad records of one source, shared by all threads.

    Args:
        num_records: length of the source; more than max(1, num_records // 100) bad ones are too
            many.
    """

    def __init__(self, num_records: int):
        self.limit = max(1, num_records // _BAD_SHARE)
        self._num_records = num_records
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self._reasons)

    def add(self, index: int, name: str, reason: str) -> None:
        """Note a bad record; the same index counts once.

        Raises:
            TooManyBadRecords: there are more than `limit` of them.
        """
        with self._lock:
            new = index not in self._reasons
            self._reasons[index] = f"{name}: {reason}"
            count = len(self._reasons)
        if count > self.limit:
            raise TooManyBadRecords(
                f"{self.summary()}. At most {self.limit} may be (1 %): repair or delete these files"
            )
        if new and count <= _NAMES_SHOWN:
            _log.warning("bad record, used as grey with weight 0: %s: %s", name, reason)

    def summary(self) -> str:
        """Say how many records are bad, and name the first few."""
        with self._lock:
            shown = [self._reasons[i] for i in sorted(self._reasons)[:_NAMES_SHOWN]]
            count = len(self._reasons)
        more = f"; and {count - len(shown)} more" if count > len(shown) else ""
        listed = f": {'; '.join(shown)}{more}" if shown else ""
        return f"{count} of {self._num_records} records are bad{listed}"


class _Decoded(NamedTuple):
    """One record after the deterministic steps."""

    image: np.ndarray  # [h, w, 3]; grey of the final size where there is a problem
    label: int
    name: str
    problem: str | None


class _Store:
    """The decoded records of one source. Holds the source, so that its id stays its own."""

    def __init__(self, source: Source, size: int):
        self.source = source
        self.images = np.empty((len(source), size, size, 3), np.uint8)
        self.labels = np.full(len(source), -1, np.int32)
        self.names = [""] * len(source)
        self.problems: dict[int, str] = {}
        self.ready = np.zeros(len(source), bool)

    def put(self, index: int, record: _Decoded) -> None:
        self.images[index] = record.image
        self.labels[index] = record.label
        self.names[index] = record.name
        if record.problem is not None:
            self.problems[index] = record.problem
        # Last, so that another thread never sees a record that is partly written.
        self.ready[index] = True


class ImageCache:
    """Images as they are after decoding and the deterministic steps, kept from epoch to epoch.

    One cache serves every pass of a run: passes over the same source object whose transforms begin
    alike share their images. Only images of a fixed size are kept (uint8, all of a source or none),
    and only while all sources together stay under the bound.

    Args:
        max_bytes: the bound.
    """

    def __init__(self, max_bytes: int = 2**30):
        self._free = max_bytes
        self._stores: dict[tuple[int, tuple[Transform, ...]], _Store] = {}
        self._lock = threading.Lock()

    def store(self, source: Source, head: tuple[Transform, ...]) -> "_Store | None":
        """Give the place of a source's images, or None where they do not fit."""
        try:
            size = preprocess.output_size(head)
        except ValueError:
            return None
        with self._lock:
            key = (id(source), head)
            needed = len(source) * size * size * 3
            if key not in self._stores:
                if needed > self._free:
                    _log.info("%s: not kept in memory, decoded in each epoch", source.name)
                    return None
                self._stores[key] = _Store(source, size)
                self._free -= needed
            return self._stores[key]


class ImageReader:
    """Turns record numbers into batches.

    Args:
        source: the records.
        transform: its deterministic head runs on each image alone, its tail on whole batches.
        cache: keeps what the head gives; None keeps nothing.
        bad_records: counts bad records, whose pixels become grey and whose weight 0; None stops at
            the first.
    """

    def __init__(
        self,
        source: Source,
        transform: Sequence[Transform],
        cache: ImageCache | None,
        bad_records: BadRecords | None,
    ):
        self.source = source
        self.size = preprocess.output_size(transform)
        self.draws = preprocess.draws(transform)
        self._head, self._tail = preprocess.split(transform)
        self._store = None if cache is None else cache.store(source, self._head)
        self._bad_records = bad_records
        self._grey = np.full((self.size, self.size, 3), GREY, np.uint8)

    def batch(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[Batch, list[str]]:
        """Read records.

        Args:
            indices: int64[b], b > 0.
            uniform: float64 [b, draws] in [0, 1), the randomness of each record.

        Returns:
            The batch (image, index, label, weight) and the records' names.

        Raises:
            BadRecordError: a record stops the run.
        """
        numbers = indices.tolist()
        if self._store is None:
            records = [self._decode(i) for i in numbers]
            images = self._augment([r.image for r in records], numbers, uniform)
            labels = np.fromiter((r.label for r in records), np.int32, len(records))
            names = [r.name for r in records]
            problems = {i: r.problem for i, r in zip(numbers, records, strict=True) if r.problem}
        else:
            store = self._store
            for i in indices[~store.ready[indices]].tolist():
                store.put(i, self._decode(i))
            images = self._apply_tail(store.images[indices], numbers[0], uniform)
            labels = store.labels[indices]
            names = [store.names[i] for i in numbers]
            problems = store.problems
        weight = np.ones(len(indices), np.float32)
        if problems:
            for row, i in enumerate(numbers):
                if i in problems:
                    self._note(i, names[row], problems[i])
                    images[row] = GREY
                    weight[row] = 0
        index = indices.astype(np.int32)
        return {"image": images, "index": index, "label": labels, "weight": weight}, names

    def _decode(self, index: int) -> _Decoded:
        try:
            record = self.source[index]
        except UnreadableRecord as error:
            return _Decoded(self._grey, error.label, error.name, error.reason)
        except Exception as error:
            raise BadRecordError(f"record {index} of {self.source.name}: {error!r}") from error
        name, label = record["name"], record["label"]
        if record["index"] != index:
            raise BadRecordError(
                f"record {index} of {self.source.name} says it is number {record['index']}: "
                "a source must give each record its own position"
            )
        try:
            image = preprocess.apply(self._head, preprocess.decode(record["image"])[None])[0]
        except BadImage as error:
            return _Decoded(self._grey, label, name, str(error) or "not an image")
        except Exception as error:
            raise BadRecordError(f"record {index} ({name}): {error!r}") from error
        return _Decoded(image, label, name, None)

    def _augment(
        self, images: list[np.ndarray], numbers: list[int], uniform: np.ndarray
    ) -> np.ndarray:
        if len({image.shape for image in images}) == 1:
            return self._apply_tail(np.stack(images), numbers[0], uniform)
        return np.concatenate(
            [
                self._apply_tail(image[None], i, uniform[row : row + 1])
                for row, (i, image) in enumerate(zip(numbers, images, strict=True))
            ]
        )

    def _apply_tail(self, images: np.ndarray, first: int, uniform: np.ndarray) -> np.ndarray:
        try:
            return preprocess.apply(self._tail, images, uniform)
        except Exception as error:
            raise BadRecordError(f"record {first} of {self.source.name}: {error!r}") from error

    def _note(self, index: int, name: str, problem: str) -> None:
        if self._bad_records is None:
            raise BadRecordError(f"bad record {index} ({name}): {problem}")
        self._bad_records.add(index, name, problem)
