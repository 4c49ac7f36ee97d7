"""Random access to the records of array_record files, and what stands in a record.

A record is a serialized tf.train.Example, as TensorFlow Datasets and the task `convert` write them,
or an encoded image as it is. Neither needs TensorFlow.
"""

import bisect
import functools
import hashlib
import itertools
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nat_jax.errors import InputError

# No read-ahead and no threads of the reader's own: both only help those who read in order.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 2**15  # of the file, in bytes; larger ones read more than a record at a time
_OPENERS = 16  # threads that look at shards, so that a slow disk is asked for several at once
_SPARE_FILES = 256  # what else a program has open
_IDENTIFYING = 2**16  # bytes from either end of a shard; its index is at the end

# An image's first bytes. None of them begins like an Example, whose first byte is a line feed.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP|II\*\0|MM\0\*|P[2356]\s", re.DOTALL
)


class Fields(NamedTuple):
    """Names of the features of a record; `image` is None where the record itself is the image."""

    image: str | None
    label: str | None = None
    name: str | None = None


class Content(NamedTuple):
    """What was found in a record: label -1 and name None where there is none."""

    image: bytes
    label: int
    name: str | None


class Shards:
    """The records of array_record files, one file after the other.

    Several threads may read at once. A pickled copy opens its files when it first reads them.

    Args:
        paths: the files, in the order of their records.

    Raises:
        ValueError: a file is missing, cut off or not array_record, or there are more than this
            process may open.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = tuple(paths)
        _allow_open_files(len(self.paths))
        with ThreadPoolExecutor(_OPENERS) as pool:
            self.lengths = tuple(pool.map(_count_records, self.paths))
        self._ends = list(itertools.accumulate(self.lengths))
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._readers: list[Any] = [None] * len(self.paths)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, position: int) -> bytes:
        """Give one record's bytes.

        Raises:
            IndexError: there is no such record.
            RuntimeError: it cannot be read; the message has the shard and what is wrong with it.
        """
        shard, row = self._locate(position)
        try:
            reader = self._readers[shard] or self._open(shard)
            return reader.read([row])[0]
        except (RuntimeError, IndexError) as error:
            raise RuntimeError(f"{self.paths[shard].name}, record {row}: {error}") from error

    def _locate(self, position: int) -> tuple[int, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        shard = bisect.bisect_right(self._ends, position)
        return shard, position - self._ends[shard] + self.lengths[shard]

    def _open(self, shard: int) -> Any:
        with self._lock:
            if self._readers[shard] is None:
                self._readers[shard] = _reader(self.paths[shard])
            return self._readers[shard]

    def identity(self) -> str:
        """Give a hash of the files' names, lengths, sizes, and the bytes at either end of each.

        The end of a file holds its index, from which the size of every record follows.
        """
        digest = hashlib.sha256()
        for path, length in zip(self.paths, self.lengths, strict=True):
            with path.open("rb") as file:
                digest.update(file.read(_IDENTIFYING))
                size = path.stat().st_size
                file.seek(max(0, size - _IDENTIFYING))
                digest.update(file.read(_IDENTIFYING))
            digest.update(f"{path.name}\0{length}\0{size}\n".encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _allow_open_files(len(self.paths))
        self._forget_readers()


def content(record: bytes, fields: Fields) -> Content:
    """Take image, label and name out of a record.

    Raises:
        ValueError: it is no Example, or lacks one of the features.
    """
    if fields.image is None:
        return Content(record, -1, None)
    features = _features(record)
    image = _values(features, fields.image, "bytes_list")
    label, name = -1, None
    if fields.label is not None:
        label = int(_values(features, fields.label, "int64_list")[0])
    if fields.name is not None:
        # Names of files are bytes that need not be text; a folder's names are decoded like this.
        encoded = _values(features, fields.name, "bytes_list")[0]
        name = encoded.decode("utf-8", "surrogateescape")
    return Content(image[0], label, name)


def example(image: bytes, label: int | None, name: str) -> bytes:
    """Serialize a record of the features image, label (where it is given) and file_name.

    The same arguments give the same bytes.
    """
    message = _proto()[0]()
    features = message.features.feature
    features["image"].bytes_list.value.append(image)
    features["file_name"].bytes_list.value.append(name.encode("utf-8", "surrogateescape"))
    if label is not None:
        features["label"].int64_list.value.append(label)
    return message.SerializeToString(deterministic=True)


def guess_fields(record: bytes) -> Fields:
    """Find the image in a record of which nothing is known.

    The image is the feature "image", or the only one whose value begins like an image file; a label
    is the integer "label", a name the text "file_name" or "filename".

    Raises:
        ValueError: there is no image, or a choice of several.
    """
    if is_image(record):
        return Fields(None)
    features = _features(record)
    images = [key for key in sorted(features) if is_image(*features[key].bytes_list.value[:1])]
    if "image" in images:
        images = ["image"]
    if len(images) != 1:
        found = ", ".join(sorted(features)) or "none at all"
        what = f"several images ({', '.join(images)})" if images else "no encoded image"
        raise InputError(
            f"{what} in a record; expected one, in a feature 'image'; its features: {found}"
        )
    label = "label" if "label" in features and features["label"].int64_list.value else None
    names = [key for key in NAME_KEYS if key in features and features[key].bytes_list.value]
    return Fields(images[0], label, names[0] if names else None)


NAME_KEYS = ("file_name", "filename", "image/filename")


def is_image(data: bytes = b"") -> bool:
    """Say whether bytes begin like an image file of a kind that `preprocess` may decode."""
    return _MAGIC.match(data) is not None


def _features(record: bytes) -> Any:
    example_class, error_class = _proto()
    try:
        features = example_class.FromString(record).features.feature
    except error_class:
        features = None
    if not features:
        raise InputError(
            "expected an encoded image or a tf.train.Example; "
            f"got {len(record)} bytes that begin with {record[:16]!r}"
        )
    return features


def _values(features: Any, key: str, kind: str) -> Any:
    values = getattr(features[key], kind).value if key in features else ()
    if not values:
        what = {"bytes_list": "bytes", "int64_list": "an integer"}[kind]
        raise InputError(f"no feature {key!r} with {what} (it has {', '.join(sorted(features))})")
    return values


@functools.cache
def _proto() -> tuple[Any, type[Exception]]:
    """Give the class of tf.train.Example that comes with TFDS, and what it raises."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example, DecodeError


def _reader(path: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), _OPTIONS, file_reader_buffer_size=_BUFFER)
    if not reader.ok():
        reader.close()  # says what is wrong
        raise RuntimeError("not readable")
    return reader


def _count_records(path: Path) -> int:
    try:
        reader = _reader(path)
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise InputError(
            f"{path} is damaged, cut off or not an array_record file: {error}"
        ) from error
    return count


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files, where needed, to what several sources take."""
    import resource  # array_record and this module are for Linux and macOS only

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = 4 * count + _SPARE_FILES  # training, probes and copies each open their own
    if soft == unlimited or soft >= wanted:
        return
    allowed = wanted if hard == unlimited else min(wanted, hard)
    if allowed < count + _SPARE_FILES:
        raise InputError(
            f"{count} shards are more files than this process may open ({hard}): raise the limit "
            f"with `ulimit -Hn {wanted}`, or write fewer, larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
