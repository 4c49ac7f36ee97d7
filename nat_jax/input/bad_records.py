"""Tracks unreadable records; stops the run above 1 %."""

import dataclasses
import logging
import threading

from nat_jax.errors import UserError

_log = logging.getLogger(__name__)

_BAD_SHARE = 100  # one record in this many may be bad
_NAMES_SHOWN = 5


class BadRecordError(UserError, RuntimeError):
    """A record cannot be used; the message has its name and the reason."""


@dataclasses.dataclass(frozen=True)
class Bad:
    """A bad record, which keeps its place in the batch."""

    index: int
    name: str
    reason: str


class TooManyBadRecords(BadRecordError):
    """More than 1 % of the records are bad."""


class BadRecords:
    """The distinct bad records of one source.

    Args:
        num_records: length of the source, of which max(1, num_records // 100) may be bad.
    """

    def __init__(self, num_records: int):
        self.limit = max(1, num_records // _BAD_SHARE)
        self._num_records = num_records
        self._reasons: dict[int, str] = {}
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self._reasons)

    def add(self, bad: Bad) -> None:
        """Count a bad record, the same index once.

        Raises:
            TooManyBadRecords: more than `limit` are bad.
        """
        with self._lock:
            new = bad.index not in self._reasons
            self._reasons[bad.index] = f"{bad.name}: {bad.reason}"
        if self.count > self.limit:
            raise TooManyBadRecords(
                f"{self.summary()}. At most {self.limit} may be (1 %), and there may be more that "
                "were not read yet. Repair or delete them; this changes the data's fingerprint, so "
                "start in another --workdir"
            )
        if new and self.count <= _NAMES_SHOWN:
            _log.warning("bad record, used as grey with weight 0: %s: %s", bad.name, bad.reason)

    def summary(self) -> str:
        """Return how many records are bad, and the first few with their reasons."""
        with self._lock:
            shown = [self._reasons[i] for i in sorted(self._reasons)[:_NAMES_SHOWN]]
            count = self.count
        more = f"; and {count - len(shown)} more" if count > len(shown) else ""
        listed = f": {'; '.join(shown)}{more}" if shown else ""
        return f"{count} of {self._num_records} records are bad{listed}"
