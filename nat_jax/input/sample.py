"""What a few records of a source show: values of more than 8 bits, pages that are not used."""

import logging
from collections.abc import Iterator

import numpy as np

from nat_jax.input.decode import DEEP_WHITE, deep_values, open_file
from nat_jax.input.file_kinds import JPEG_SUFFIXES, suffix_of
from nat_jax.input.sources import Source, UnreadableRecord

_log = logging.getLogger(__name__)

_NAMES = 4096  # that are looked at for files other than JPEG, which have neither
_RECORDS = 16  # that are read


def log_sample(source: Source, white: int) -> None:
    """Log the range of values of more than 8 bits, and which pages are left out, in a sample.

    The sample is up to 16 records at equal distances. None is read where all names are those of
    JPEG files.

    Args:
        source: the records.
        white: the value that is white, see `decode.open_picture`.
    """
    ranges, pages, count = [], [], 0
    for data in _sample(source):
        count += 1
        try:
            opened = open_file(data)
            pages.append(getattr(opened, "n_frames", 1))
            values = deep_values(data, opened)
            if values is not None:
                ranges.append((int(values.min()), int(values.max())))
        except Exception:  # a file that cannot be read is reported with its record
            continue
    if ranges:
        lows, highs = zip(*ranges, strict=True)
        share = f"{len(ranges)} of {count} sampled records have"
        _log_range(f"{source.name}: {share}", min(lows), max(highs), white)
    elif white:
        _log.warning(
            "%s: data.white = %d has no effect, as no sampled record has more than 8 bits",
            *(source.name, white),
        )
    if several := [number for number in pages if number > 1]:
        _log.warning(
            "%s: %d of %d sampled records have several pages or frames, %d in all; the first of "
            "each is used, the others are left out. To use them, write each to a file of its own",
            *(source.name, len(several), count, sum(several)),
        )


def _log_range(records: str, low: int, high: int, white: int) -> None:
    limit, likely = white or DEEP_WHITE, (1 << max(1, high.bit_length())) - 1
    text = (
        f"{records} more than 8 bits; their values lie in {low}..{high}, and white is {limit} "
        f"(data.white = {white})"
    )
    if high > limit:
        _log.warning("%s, which larger values become too", text)
    elif not white and likely < limit:
        _log.warning(
            "%s, so %d of 256 grey levels are used. Set --config.data.white=%d if no value can be "
            "larger than that",
            *(text, high * 256 // (limit + 1) + 1, likely),
        )
    else:
        _log.info("%s", text)


def _sample(source: Source) -> Iterator[bytes]:
    """Yield the files of some records that are no JPEG, by name or first bytes."""
    rows = [
        row
        for row in _spread(len(source), _NAMES)
        if suffix_of(source.record_name(row)) not in JPEG_SUFFIXES
    ]
    for place in _spread(len(rows), _RECORDS):
        try:
            data = source[rows[place]]["image"]
        except UnreadableRecord:
            continue
        if not isinstance(data, bytes):
            return
        if not data.startswith(b"\xff\xd8"):
            yield data


def _spread(length: int, count: int) -> list[int]:
    """Return at most so many of the first numbers, at equal distances."""
    return np.linspace(0, length - 1, min(length, count)).astype(int).tolist()
