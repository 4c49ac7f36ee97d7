"""Features kept on disk, so that each layer of a network is computed once for all probes.

An entry is one layer's features of one split. Its name is a hash of all that they depend on, which
the entry states in full, with a checksum of each of its files. It is written beside its place, to
the disk itself, and renamed, so that there is a whole entry or none. Features are read as a map of
the file.
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Hashable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureSet
from nat_jax.runtime.atomic_files import sync
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

MOST_BYTES = 64 << 30  # of all entries of one folder
_ABANDONED = 24 * 3600.0  # seconds after which what a killed process was writing is deleted
_AROUND = 8192  # bytes that an entry's card and the heads of its files stay below
_PIECE = 16 << 20  # bytes read at once where a checksum is compared
_CARD, _FEATURES, _LABELS, _INDEX = "entry.json", "features.f32", "labels.npy", "index.npy"
_CHECKED = (_FEATURES, _LABELS, _INDEX)

Key = Mapping[str, Any]
Rows = Iterable[tuple[Mapping[str, np.ndarray], np.ndarray]]
Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Features and where they come from.

    Attributes:
        data: the features and labels.
        index: int32[N], the record of each row.
    """

    data: FeatureSet
    index: np.ndarray


class FeatureCache:
    """A folder of features.

    All entries together take at most `most_bytes`, and never more than half of what the disk has
    free: those that were used longest ago go first, but none that the present reader has used.
    Several processes may use one folder.

    Args:
        folder: where; made when the first entry is written.
        most_bytes: the bound.
        most_memory: bytes that may be held in memory instead; None: half of what the host has
            available whenever there is something to decide.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES, most_memory: int | None = None):
        self._folder, self._most, self._memory = folder, most_bytes, most_memory
        self._reader = ""
        self._used: set[str] = set()  # by the present reader
        # What was compared with its checksums, and is not read in full again.
        self._sound: dict[str, list[tuple[int, int, int]]] = {}

    def serve(self, reader: str) -> None:
        """State for whom entries are found and written from now on; those of another may go."""
        if reader != self._reader:
            self._reader = reader
            self._used.clear()

    def find(self, key: Key) -> Entry | None:
        """Return the features of a key, mapped from their file; None where there are none.

        Files are compared with their checksums when they are first used. A damaged entry is
        deleted, with a warning.
        """
        place = self._place(key)
        if not place.exists():
            return None
        try:
            card = _card(place, key)
            self._check(place, card)
            entry = _opened(place, card)
            os.utime(place / _CARD)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if place.exists():  # otherwise another process has just deleted it
                logger.warning("%s is damaged (%s), computed again", place, error)
                _remove(place)
            return None
        self._used.add(place.name)
        return entry

    def plan(self, sizes: Mapping[Name, int]) -> set[Name]:
        """Choose what is to be kept on the disk; the rest is to be held in memory.

        The largest come first, each to the disk if it has room.

        Args:
            sizes: bytes of each.

        Raises:
            ValueError: there is room in neither.
        """
        disk = whole_disk = max(0, self._bound() - self._size_in_use())
        memory = whole_memory = available_memory() // 2 if self._memory is None else self._memory
        chosen: set[Name] = set()
        for name in sorted(sizes, key=lambda name: sizes[name], reverse=True):
            if sizes[name] <= disk:
                chosen.add(name)
                disk -= sizes[name]
            elif sizes[name] <= memory:
                memory -= sizes[name]
            else:
                raise InputError(
                    f"features: {_gigabytes(sum(sizes.values()))} are asked for at once; "
                    f"{_gigabytes(whole_disk)} of disk ({self._folder}) and "
                    f"{_gigabytes(whole_memory)} of memory may be used. Lower eval.max_train or "
                    "eval.max_features, name fewer eval.layers, or take a --workdir on a larger "
                    "disk"
                )
        if held := sum(size for name, size in sizes.items() if name not in chosen):
            logger.info("%s: no room for %s, held in memory", self._folder, _gigabytes(held))
        return chosen

    def make_room(self, needed: int) -> None:
        """Delete entries, those used longest ago first, until so many bytes can be written."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(".*"):
            if time.time() - _touched(partial) > _ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)
        sizes = self._entries()
        total, most = sum(sizes.values()), self._bound()
        for place, size in sizes.items():
            if total + needed > most and place.name not in self._used:
                _remove(place)
                total -= size

    def write(
        self, keys: Mapping[str, Key], rows: Rows, index: list[np.ndarray]
    ) -> dict[str, Entry]:
        """Write the features of several layers as they come.

        Args:
            keys: of each layer.
            rows: {layer: float32[n, F]} and labels int32[n] of each batch.
            index: the records int32[n] of each batch, complete once `rows` has ended.

        Returns:
            {layer: what was written}, mapped: it stays readable if another process deletes it.
        """
        labels, entries = [], {}
        with ExitStack() as stack:
            partial = {layer: self._partial(key, stack) for layer, key in keys.items()}
            for features, kept in rows:
                labels.append(kept)
                for layer, values in features.items():
                    partial[layer].append(values)
            for layer, key in keys.items():
                place, final = partial[layer].place, self._place(key)
                partial[layer].finish(key, np.concatenate(labels), np.concatenate(index))
                entries[layer], stamps = _opened(place, _card(place, key)), _stamps(place)
                try:
                    place.replace(final)
                except OSError:
                    if not final.exists():
                        raise
                    continue  # another process was faster, and may be reading what it wrote
                sync(self._folder)
                self._used.add(final.name)
                self._sound[final.name] = stamps
        return entries

    def _check(self, place: Path, card: Mapping[str, Any]) -> None:
        """Compare an entry's files with their checksums, unless they are known and untouched.

        Raises:
            ValueError: they differ.
        """
        stamps = _stamps(place)
        if self._sound.get(place.name) == stamps:
            return
        for name in _CHECKED:
            if _checksum(place / name) != card["crc32"][name]:
                raise ValueError(f"{name}: its checksum differs")
        self._sound[place.name] = stamps

    def _bound(self) -> int:
        """Return how many bytes all entries may take."""
        there = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        return min(self._most, sum(self._entries().values()) + free // 2)

    def _size_in_use(self) -> int:
        return sum(size for place, size in self._entries().items() if place.name in self._used)

    def _entries(self) -> dict[Path, int]:
        """Return every entry and its size, the one that was used longest ago first."""
        found = []
        for card in self._folder.glob(f"[!.]*/{_CARD}"):
            try:
                size = sum(file.stat().st_size for file in card.parent.iterdir())
                found.append((card.stat().st_mtime_ns, card.parent, size))
            except FileNotFoundError:  # deleted by another process
                continue
        return {place: size for _, place, size in sorted(found)}

    def _place(self, key: Key) -> Path:
        return self._folder / fingerprint(key)[:24]

    def _partial(self, key: Key, stack: ExitStack) -> "_Partial":
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f".{self._place(key).name}."
        partial = _Partial(Path(tempfile.mkdtemp(prefix=name, dir=self._folder)))
        stack.callback(partial.discard)
        return partial


class _Partial:
    """An entry that is being written, in a folder of its own."""

    def __init__(self, place: Path):
        self.place = place
        self._file = (place / _FEATURES).open("wb")
        self._checksum, self._width = 0, 0

    def append(self, values: np.ndarray) -> None:
        """Write float32[n, F]."""
        rows = np.ascontiguousarray(values, np.float32)
        self._file.write(rows.data)
        self._checksum = zlib.crc32(rows.data, self._checksum)
        self._width = rows.shape[1]

    def finish(self, key: Key, labels: np.ndarray, index: np.ndarray) -> None:
        """Write what goes with the features, and wait until the disk has all of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        card = {
            "key": key,
            "shape": [len(labels), self._width],
            "crc32": {
                _FEATURES: self._checksum,
                _LABELS: _written(self.place / _LABELS, _as_npy(labels)),
                _INDEX: _written(self.place / _INDEX, _as_npy(index)),
            },
        }
        _written(self.place / _CARD, json.dumps(card, indent=1).encode())
        sync(self.place)

    def discard(self) -> None:
        """Delete what was not renamed."""
        self._file.close()
        shutil.rmtree(self.place, ignore_errors=True)


def fingerprint(value: Any) -> str:
    """Return a sha256 in hex over a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def entry_bytes(records: int, width: int) -> int:
    """Return the size of an entry, a little more than what goes with the features included."""
    return records * (4 * width + 4 + 4) + _AROUND


def available_memory() -> int:
    """Return the bytes that the host could give now; where it does not say, all that it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])


def _remove(place: Path) -> None:
    """Delete an entry such that no other process finds half of it."""
    try:
        hidden = place.with_name(f".{place.name}.{os.getpid()}.{time.monotonic_ns()}")
        shutil.rmtree(place.replace(hidden), ignore_errors=True)
    except FileNotFoundError:  # another process has deleted it
        return


def _touched(folder: Path) -> float:
    """Return when a folder or one of its files was last written to; now if it is gone."""
    try:
        return max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
    except (FileNotFoundError, NotADirectoryError):
        return time.time()


def _card(place: Path, key: Key) -> dict[str, Any]:
    """Return what an entry states about itself.

    Raises:
        ValueError: it states nothing, or another key.
    """
    card = workdirs.read_json(place / _CARD)
    if card is None or card["key"] != json.loads(json.dumps(key)):
        raise ValueError(f"{_CARD}: it does not state the key")
    return card


def _opened(place: Path, card: Mapping[str, Any]) -> Entry:
    """Map an entry's features; raises ValueError where its files do not fit together."""
    file, (rows, width) = place / _FEATURES, card["shape"]
    if file.stat().st_size != 4 * rows * width:
        raise ValueError(f"{_FEATURES}: expected {4 * rows * width} bytes")
    features = np.memmap(file, np.float32, "r", shape=(rows, width))
    labels, index = (np.load(place / name) for name in (_LABELS, _INDEX))
    return Entry(FeatureSet(features, labels), index)


def _stamps(place: Path) -> list[tuple[int, int, int]]:
    """Return what differs once a file of an entry is written again."""
    stats = [(place / name).stat() for name in _CHECKED]
    return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def _as_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _written(path: Path, content: bytes) -> int:
    """Write a file to the disk itself, and return its checksum."""
    path.write_bytes(content)
    sync(path)
    return zlib.crc32(content)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
