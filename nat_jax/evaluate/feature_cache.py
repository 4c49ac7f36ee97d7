"""Features kept on disk, so that each layer of a network is computed once for all probes.

An entry is one layer's features of one split. Its name is a hash of all that they depend on, which
the entry states in full; it is written beside its place and renamed, so that there is a whole entry
or none. Features are read as a map of the file.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax import workdir as workdirs
from nat_jax.evaluate.features import FeatureSet

logger = logging.getLogger(__name__)

MOST_BYTES = 64 << 30  # of all entries of one folder
_ABANDONED = 24 * 3600.0  # seconds after which what a killed process was writing is deleted
_CARD, _FEATURES, _LABELS, _INDEX = "entry.json", "features.f32", "labels.npy", "index.npy"

Key = Mapping[str, Any]
Rows = Iterable[tuple[Mapping[str, np.ndarray], np.ndarray]]


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
    free: those that were used longest ago go first, and what is larger alone is not kept.

    Args:
        folder: where; made when the first entry is written.
        most_bytes: the bound.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES):
        self._folder, self._most = folder, most_bytes
        self._used: set[str] = set()

    def find(self, key: Key) -> Entry | None:
        """Return the features of a key, mapped from their file; None where there are none."""
        place = self._place(key)
        card = workdirs.read_json(place / _CARD)
        if card is None or card["key"] != json.loads(json.dumps(key)):
            return None
        shape = tuple(card["shape"])
        file = place / _FEATURES
        if file.stat().st_size != 4 * shape[0] * shape[1]:
            logger.warning("%s is damaged; its features are computed again", place)
            shutil.rmtree(place)
            return None
        os.utime(place / _CARD)
        self._used.add(place.name)
        features = np.memmap(file, np.float32, "r", shape=shape)
        labels, index = (np.load(place / name) for name in (_LABELS, _INDEX))
        return Entry(FeatureSet(features, labels), index)

    def has_room(self, needed: int) -> bool:
        """Make room for some bytes; False, with a line that says so, where there can be none."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for partial in self._folder.glob(".*"):
            touched = max(file.stat().st_mtime for file in (partial, *partial.iterdir()))
            if time.time() - touched > _ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)
        sizes = {card.parent: _size(card.parent) for card in self._by_use()}
        total = sum(sizes.values())
        most = min(self._most, total + shutil.disk_usage(self._folder).free // 2)
        if needed > most - sum(sizes[place] for place in sizes if place.name in self._used):
            logger.info(
                "%s: no room for %.1f GB of features, which are kept in memory",
                self._folder,
                needed / 1e9,
            )
            return False
        for place, size in sizes.items():
            if total + needed > most and place.name not in self._used:
                shutil.rmtree(place)
                total -= size
        return True

    def write(self, keys: Mapping[str, Key], rows: Rows, index: list[np.ndarray]) -> None:
        """Write the features of several layers as they come.

        Args:
            keys: of each layer.
            rows: {layer: float32[n, F]} and labels int32[n] of each batch.
            index: the records int32[n] of each batch, complete once `rows` has ended.
        """
        partial = {layer: self._partial(key) for layer, key in keys.items()}
        shapes, labels = dict.fromkeys(keys, 0), []
        try:
            with ExitStack() as stack:
                files = {
                    layer: stack.enter_context((place / _FEATURES).open("wb"))
                    for layer, place in partial.items()
                }
                for features, kept in rows:
                    labels.append(kept)
                    for layer, values in features.items():
                        np.ascontiguousarray(values, np.float32).tofile(files[layer])
                        shapes[layer] = values.shape[1]
            for layer, place in partial.items():
                np.save(place / _LABELS, np.concatenate(labels))
                np.save(place / _INDEX, np.concatenate(index))
                shape = [sum(map(len, labels)), shapes[layer]]
                workdirs.write_json(place / _CARD, {"key": keys[layer], "shape": shape})
                final = self._place(keys[layer])
                shutil.rmtree(final, ignore_errors=True)
                place.replace(final)
        finally:
            for place in partial.values():
                shutil.rmtree(place, ignore_errors=True)

    def _by_use(self) -> list[Path]:
        cards = self._folder.glob(f"*/{_CARD}")
        return sorted(cards, key=lambda card: (card.stat().st_mtime_ns, card.parent.name))

    def _place(self, key: Key) -> Path:
        return self._folder / fingerprint(key)[:24]

    def _partial(self, key: Key) -> Path:
        place = self._place(key)
        partial = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial


def fingerprint(value: Any) -> str:
    """Return a sha256 in hex over a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
