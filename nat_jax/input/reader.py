"""From record numbers to stacked pixels: read, decode, cut out, move; remember images."""

import logging
import math
import threading
import weakref
from typing import Any, NamedTuple

import numpy as np

from nat_jax.input import transforms
from nat_jax.input.bad_records import Bad, BadRecordError
from nat_jax.input.decode import BadImage, open_picture
from nat_jax.input.sources import Source, UnreadableRecord
from nat_jax.input.transforms import Transform
from nat_jax.input.work_log import WorkLog

_log = logging.getLogger(__name__)

Batch = dict[str, Any]

GREY = 128  # the pixels of bad records and of padding


class _Read(NamedTuple):
    """What is known of a record beside its pixels."""

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

    def put(self, index: int, record: _Read) -> None:
        self.labels[index] = record.label
        self.names[index] = record.name
        if record.problem is not None:
            self.problems[index] = record.problem
        # Last, so that another thread never sees a record that is partly written.
        self.ready[index] = True


class ImageCache:
    """Images as they are once cut out, kept from epoch to epoch.

    One cache serves every pass of a run: passes over the same source object that cut out the same
    share their images. Only crops without chance are kept (uint8, all of a source or none), and
    only while all sources together stay under the bound.

    Args:
        max_bytes: the bound.
    """

    def __init__(self, max_bytes: int = 2**30):
        self._free = max_bytes
        # None: it does not fit, which has been said.
        self._stores: dict[tuple[int, transforms.Crop], _Store | None] = {}
        self._lock = threading.Lock()

    def store(self, source: Source, crop: transforms.Crop) -> "_Store | None":
        """Give the place of a source's images, or None where they do not fit."""
        if crop.draws or crop.count > 1:
            return None
        with self._lock:
            key = (id(source), crop)
            needed = len(source) * crop.size**2 * 3
            if key not in self._stores:
                fits = needed <= self._free
                self._stores[key] = _Store(source, crop.size) if fits else None
                self._free -= needed if fits else 0
                if not fits:
                    _log.info("%s: not kept in memory, decoded in each epoch", source.name)
            return self._stores[key]


class _BatchMemory:
    """Memory of batches, used again once nobody looks at it any more.

    The system gives fresh memory page by page, which for batches of photographs costs as much as a
    tenth of their decoding.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[memoryview]] = {}

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Give uint8 of a shape, with any content."""
        size = math.prod(shape)
        free = self._free.setdefault(size, [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(size, np.uint8).data
        # Every view of it, JAX's included, keeps this array alive: it owns no memory, and its base
        # is no array, so NumPy makes it the base of all.
        whole = np.frombuffer(memory, np.uint8)
        weakref.finalize(whole, free.append, memory).atexit = False
        return whole.reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _BatchMemory, ()


class ImageReader:
    """Turns record numbers into batches; pickles to what another process needs to do the same.

    Args:
        source: the records.
        transform: what becomes of each image.
        views: how many times each image is transformed, by other numbers.
        cache: keeps what is cut out; None keeps nothing.
        log: where each thread writes which record it reads.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        views: int = 1,
        cache: ImageCache | None = None,
        log: WorkLog,
    ):
        self.source = source
        self.transform = transform
        self.views = views
        self._store = None if cache is None else cache.store(source, transform.crop)
        self._log = log
        self._memory = _BatchMemory()

    @property
    def cached(self) -> bool:
        """Whether images are kept from epoch to epoch."""
        return self._store is not None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of what one record becomes: [size, size, 3], or [count, size, size, 3]."""
        size, count = self.transform.size, self.views * self.transform.count
        return (size, size, 3) if count == 1 else (count, size, size, 3)

    def batch(self, indices: np.ndarray, uniform: np.ndarray) -> Batch:
        """Read records.

        Args:
            indices: int64[b], b > 0.
            uniform: float64 [views, b, transform.draws] in [0, 1), the chance of each record.

        Returns:
            image uint8 [b, *image_shape], index, label, weight, name (a list), and bad, a list of
            `Bad`: those records are grey, and their weight is 0.

        Raises:
            BadRecordError: a fault other than a bad image, with the record.
        """
        numbers = indices.tolist()
        moves = [self.transform.moves(view) for view in uniform]
        if self._store is None:
            images, labels, names, problems = self._read_all(numbers, uniform, moves)
        else:
            self.fill(indices)
            store = self._store
            views = [self._move(store.images[indices], m) for m in moves]
            images = views[0][:, None] if len(views) == 1 else np.stack(views, axis=1)
            labels, problems = store.labels[indices], store.problems
            names = [store.names[i] for i in numbers]
        colors = self.transform.colors
        if colors is not None:
            for view, chance in enumerate(uniform[:, :, -colors.draws :]):
                colors.apply(images[:, view], chance)
        weight = np.ones(len(numbers), np.float32)
        bad = []
        for row, index in enumerate(numbers if problems else ()):
            if index in problems:
                bad.append(Bad(index, names[row], problems[index]))
                images[row] = GREY
                weight[row] = 0
        return {
            "image": images.reshape(len(numbers), *self.image_shape),
            "index": indices.astype(np.int32),
            "label": labels,
            "weight": weight,
            "name": names,
            "bad": bad,
        }

    def moves(self, indices: np.ndarray, uniform: np.ndarray) -> Batch:
        """Choose what happens to records whose pixels are elsewhere; see `device_images`.

        Args:
            indices: as in `batch`.
            uniform: as in `batch`.

        Returns:
            As `batch`, with corner int32 [b, views, 2] and mirrored bool [b, views] (see
            `preprocess.Moves`) in place of the image.
        """
        store = self._store
        assert store is not None, "only images that are kept in memory can be elsewhere"
        self.fill(indices)
        moves = [self.transform.moves(view) for view in uniform]
        numbers = indices.tolist()
        bad = [Bad(i, store.names[i], store.problems[i]) for i in numbers if i in store.problems]
        return {
            "corner": np.stack([m.corner for m in moves], axis=1),
            "mirrored": np.stack([m.mirrored for m in moves], axis=1),
            "index": indices.astype(np.int32),
            "label": store.labels[indices],
            "weight": np.asarray([i not in store.problems for i in numbers], np.float32),
            "name": [store.names[i] for i in numbers],
            "bad": bad,
        }

    def fill(self, indices: np.ndarray) -> None:
        """Read what the cache lacks of some records."""
        store = self._store
        if store is None:
            return
        for index in indices[~store.ready[indices]].tolist():
            # No chance is left in crops that are cached, and moves come later.
            store.put(index, self._read(index, [()], [False], store.images[index : index + 1]))

    def _read_all(
        self, numbers: list[int], uniform: np.ndarray, moves: list[transforms.Moves]
    ) -> tuple[np.ndarray, np.ndarray, list[str], dict[int, str]]:
        transform, size = self.transform, self.transform.size
        images = self._memory.empty((len(numbers), self.views * transform.count, size, size, 3))
        chosen = uniform[:, :, : transform.crop.draws].swapaxes(0, 1).tolist()
        # Mirroring one by one is cheaper, but comes after a shift.
        mirrored = np.stack([m.mirrored & (not transform.pad) for m in moves], axis=1).tolist()
        records = [
            self._read(index, chosen[row], mirrored[row], images[row])
            for row, index in enumerate(numbers)
        ]
        if transform.pad:
            images = np.stack([self._move(images[:, v], m) for v, m in enumerate(moves)], axis=1)
        labels = np.fromiter((r.label for r in records), np.int32, len(records))
        problems = {i: r.problem for i, r in zip(numbers, records, strict=True) if r.problem}
        return images, labels, [r.name for r in records], problems

    def _move(self, images: np.ndarray, moves: transforms.Moves) -> np.ndarray:
        return transforms.move(images, moves, self.transform.pad)

    def _read(self, index: int, uniforms: list, mirrored: list[bool], out: np.ndarray) -> _Read:
        """Read one record and write its images to `out`, which stays as it is for a bad one."""
        with self._log.reading(index):
            try:
                record = self.source[index]
            except UnreadableRecord as error:
                return _Read(error.label, error.name, error.reason)
            except Exception as error:
                raise BadRecordError(f"record {index} of {self.source.name}: {error!r}") from error
            name, label = record["name"], record["label"]
            if record["index"] != index:
                raise BadRecordError(
                    f"record {index} of {self.source.name} says it is number {record['index']}: "
                    "a source must give each record its own position"
                )
            try:
                picture = open_picture(record["image"])
                transforms.cut(picture, self.transform, uniforms, mirrored, out)
            except BadImage as error:
                return _Read(label, name, str(error) or "not an image")
            except Exception as error:
                raise BadRecordError(f"record {index} ({name}): {error!r}") from error
            return _Read(label, name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}
