"""Read, decode, transform and stack records; keep images of small data sets in memory."""

import logging
import math
import threading
from typing import Any, NamedTuple

import numpy as np

from nat_jax.input.bad_records import Bad, BadRecordError
from nat_jax.input.decode import BadImage, open_picture
from nat_jax.input.sources import Source, UnreadableRecord
from nat_jax.input.transforms import Crop, Transform, decode_and_crop
from nat_jax.input.work_log import WorkLog

_log = logging.getLogger(__name__)

Batch = dict[str, Any]

GREY = 128  # the pixels of bad records and of padding
_BLOCK = 2**19  # bytes of images that are transformed while they are in the processor's cache


class _Read(NamedTuple):
    """A record without its pixels."""

    label: int
    name: str
    problem: str | None


class _Store:
    """The decoded records of one source. Holds the source, so that its id remains its own."""

    def __init__(self, source: Source, size: int):
        self.source = source
        self.images = np.empty((len(source), size, size, 3), np.uint8)
        self.records: list[_Read | None] = [None] * len(source)  # None: not decoded yet


class ImageCache:
    """Cropped images, kept from epoch to epoch.

    One cache serves every pass of a run: passes over the same source object with the same crop and
    white share their images. Only crops without randomness are kept (uint8, all of a source or
    none), and only while all sources together fit.

    Args:
        max_bytes: bound on the memory of all images.
    """

    def __init__(self, max_bytes: int = 2**30):
        self._free = max_bytes
        self._stores: dict[tuple[int, Crop, int], _Store | None] = {}  # None: it does not fit
        self._lock = threading.Lock()

    def store(self, source: Source, transform: Transform) -> "_Store | None":
        """Return the memory of a source's images, or None if they do not fit."""
        crop = transform.crop
        if crop.draws or crop.count > 1:
            return None
        with self._lock:
            key = (id(source), crop, transform.white)
            needed = len(source) * crop.size**2 * 3
            if key not in self._stores:
                fits = needed <= self._free
                self._stores[key] = _Store(source, crop.size) if fits else None
                self._free -= needed if fits else 0
                if not fits:
                    _log.info("%s: not kept in memory, decoded in each epoch", source.name)
            return self._stores[key]


class ImageReader:
    """Turns record numbers into batches; pickles to what a worker process needs to do the same.

    Args:
        source: the records.
        transform: applied to each image.
        views: how many times each image is transformed, by other random numbers.
        cache: keeps cropped images; None keeps none.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        views: int = 1,
        cache: ImageCache | None = None,
    ):
        self.source = source
        self.transform = transform
        self.views = views
        self.log = WorkLog()  # the record that each thread is reading
        self._store = None if cache is None else cache.store(source, transform)

    @property
    def cached(self) -> bool:
        """Whether images are kept from epoch to epoch."""
        return self._store is not None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of a record's images: [size, size, 3], or [count, size, size, 3] of several."""
        size, count = self.transform.size, self.views * self.transform.count
        return (size, size, 3) if count == 1 else (count, size, size, 3)

    def batch(self, indices: np.ndarray, uniform: np.ndarray, *, pixels: bool = True) -> Batch:
        """Read records.

        Args:
            indices: int64[b].
            uniform: float64 [views, b, transform.draws], random numbers in [0, 1).
            pixels: False returns shifts and flips for `device_images.DeviceImages` instead of
                pixels; needs images that are cached.

        Returns:
            image uint8 [b, *image_shape], or corner int32 [b, views, 2] and mirrored
            bool [b, views] (see `ShiftFlip`); index int32[b], label int32[b], weight float32[b],
            name, a list of str, and bad, a list of `Bad`: those records have pixels 128 and
            weight 0.

        Raises:
            BadRecordError: a fault other than a bad image, with the record's name.
        """
        batch: Batch = {}
        if pixels:
            batch["image"], records = self._images(indices, uniform)
        else:
            records = self._cached(indices)
            moves = [self.transform.shift_flip(view) for view in uniform]
            batch["corner"] = np.stack([move.corner for move in moves], axis=1)
            batch["mirrored"] = np.stack([move.mirrored for move in moves], axis=1)
        bad = [row for row, record in enumerate(records) if record.problem is not None]
        weight = np.ones(len(records), np.float32)
        weight[bad] = 0
        if pixels:
            batch["image"][bad] = GREY
        return batch | {
            "index": indices.astype(np.int32),
            "label": np.array([record.label for record in records], np.int32),
            "weight": weight,
            "name": [record.name for record in records],
            "bad": [Bad(int(indices[i]), records[i].name, str(records[i].problem)) for i in bad],
        }

    def _images(self, indices: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, list[_Read]]:
        """Return transformed images, uint8 [b, *image_shape], and their records."""
        transform = self.transform
        size, count = transform.size, self.views * transform.count
        images = np.empty((len(indices), count, size, size, 3), np.uint8)
        records: list[_Read] = []
        step = max(1, _BLOCK // math.prod(self.image_shape))
        for start in range(0, len(indices), step):
            part, numbers = images[start : start + step], uniform[:, start : start + step]
            records += self._crop(indices[start : start + step], numbers, part)
            for view, drawn in enumerate(numbers):
                transform.shift_flip(drawn).apply(part[:, view], transform.pad)
                if transform.colors is not None:
                    colors = drawn[:, -transform.colors.draws :]
                    transform.colors.apply(part[:, view], colors)
        return images.reshape(len(indices), *self.image_shape), records

    def _crop(self, indices: np.ndarray, uniform: np.ndarray, out: np.ndarray) -> list[_Read]:
        """Write crops to uint8 [b, views * count, size, size, 3]."""
        if self._store is not None:
            records = self._cached(indices)
            out[:] = self._store.images[indices][:, None]
            return records
        chosen = uniform[:, :, : self.transform.crop.draws].swapaxes(0, 1).tolist()
        rows = zip(indices.tolist(), chosen, out, strict=True)
        return [self._read(index, numbers, images) for index, numbers, images in rows]

    def _cached(self, indices: np.ndarray) -> list[_Read]:
        """Return records after reading those that the cache lacks."""
        store = self._store
        assert store is not None, "only images that are kept in memory can be on the device"
        numbers = indices.tolist()
        for index in numbers:
            if store.records[index] is None:  # other threads see it once its pixels are complete
                store.records[index] = self._read(index, [()], store.images[index : index + 1])
        return [store.records[index] for index in numbers]

    def _read(self, index: int, uniforms: list, out: np.ndarray) -> _Read:
        """Read one record and write its images to `out`, which a bad record leaves unchanged."""
        with self.log.reading(index):
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
                picture = open_picture(record["image"], self.transform.white)
                decode_and_crop(picture, self.transform, uniforms, out)
            except BadImage as error:
                return _Read(label, name, str(error) or "not an image")
            except Exception as error:
                raise BadRecordError(f"record {index} ({name}): {error!r}") from error
            return _Read(label, name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}
