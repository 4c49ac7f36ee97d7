"""Random access to the records of array_record files."""

import bisect
import hashlib
import itertools
import resource  # array_record and this module are for Linux and macOS only
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError

# A reader's own threads and read-ahead only help those who read in order.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_OPENERS = 16  # threads that look at shards, so that a slow disk serves several at once
_IDENTIFYING = 2**16  # bytes from either end of a shard; its index is at the end


class Shards:
    """The records of array_record files, one file after the other.

    Several threads may read at once. A pickled copy opens its files when it first reads them.

    Args:
        paths: the files, in the order of their records.

    Raises:
        ValueError: a file is missing, cut off or not array_record.
    """

    def __init__(self, paths: Sequence[Path]):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.paths = tuple(paths)
        _allow_open_files(len(self.paths))
        with ThreadPoolExecutor(_OPENERS) as pool:
            self.lengths = tuple(pool.map(count_records, self.paths))
        parts = zip(self.paths, self.lengths, strict=True)
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{length}]" for path, length in parts], {"max_parallelism": "0"}
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
            starts = list(itertools.accumulate(self.lengths, initial=0))
            shard = bisect.bisect_right(starts, position) - 1
            place = f"{self.paths[shard].name}, record {position - starts[shard]}"
            raise RuntimeError(f"{place}: {error}") from error

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


def count_records(path: Path) -> int:
    """Return the number of records of an array_record file.

    Raises:
        ValueError: it is missing, cut off or not array_record.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), _OPTIONS)
        count = int(reader.num_records())  # 0 for a file that cannot be read
        reader.close()  # raises what is wrong
    except RuntimeError as error:
        raise InputError(
            f"{path} is damaged, cut off or not an array_record file: {error}"
        ) from error
    return count


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files: ImageNet's 1,024 shards alone reach the usual one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4 * count + 256  # training, probes and copies each open their own
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft not in (resource.RLIM_INFINITY, hard) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
