"""Random access to the records of array_record files."""

import hashlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nat_jax.errors import InputError

# A reader's own threads and read-ahead only help those who read in order.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPENERS = 16  # threads that look at shards, so that a slow disk serves several at once
_SPARE_FILES = 256  # what else a program has open
_IDENTIFYING = 2**16  # bytes from either end of a shard; its index is at the end


class _WholeFile(NamedTuple):
    """All records of a file, as `ArrayRecordDataSource` wants them described."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


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
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.paths = tuple(paths)
        _allow_open_files(len(self.paths))
        with ThreadPoolExecutor(_OPENERS) as pool:
            self.lengths = tuple(pool.map(_count_records, self.paths))
        parts = zip(self.paths, self.lengths, strict=True)
        self._records = ArrayRecordDataSource(
            [_WholeFile(str(path), 0, length, length) for path, length in parts],
            {"max_parallelism": "0"},
        )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, position: int) -> bytes:
        """Return one record's bytes.

        Raises:
            RuntimeError: it cannot be read; the message has the shard and what is wrong with it.
        """
        try:
            return self._records[position]
        except (RuntimeError, ValueError, IndexError) as error:
            starts = itertools.accumulate(self.lengths, initial=0)
            places = [(p, position - s) for p, s in zip(self.paths, starts, strict=False)]
            path, row = next(place for place in reversed(places) if place[1] >= 0)
            raise RuntimeError(f"{path.name}, record {row}: {error}") from error

    def identity(self) -> str:
        """Return a hash of the files' names, lengths, sizes, and the bytes at either end of each.

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

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _allow_open_files(len(self.paths))


def _count_records(path: Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), _OPTIONS)
        if not reader.ok():
            reader.close()  # raises what is wrong
            raise RuntimeError("not readable")
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
