"""Records in order, read by several threads ahead of where they are needed."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from nat_jax.input.sources.source import Record, Source, UnreadableRecord

READERS = 16  # threads: a slow disk or a network answers several questions at once
_AHEAD = 2 * READERS  # records in memory


def read_ahead(
    source: Source, rows: Iterable[int], pool: ThreadPoolExecutor
) -> Iterator[Record | UnreadableRecord]:
    """Give records in order, or why one cannot be read, while threads read the next ones.

    Args:
        source: where they are.
        rows: their numbers.
        pool: the threads.
    """
    pending: deque[Future[Record | UnreadableRecord]] = deque()
    try:
        for row in rows:
            pending.append(pool.submit(_read, source, row))
            if len(pending) == _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _read(source: Source, row: int) -> Record | UnreadableRecord:
    try:
        return source[row]
    except UnreadableRecord as error:
        return error
