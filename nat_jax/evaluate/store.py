"""Features on disk: one .npy file a layer, written batch by batch, mapped when read.

`FeatureFiles` writes the files of one folder. `FeatureStore` keeps each layer of a network so that
it is computed once for all probes: an entry is one layer's features of one split, in a folder named
by a hash of all that they depend on (weights, data, protocol, versions and hardware). The entry
states these and a checksum of each file. A folder gets its name when it is complete.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from nat_jax.errors import InputError
from nat_jax.evaluate.features import INDEX, LABEL, Columns, FeatureSet
from nat_jax.runtime.atomic_files import size_text, sync, writing
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

_CARD, _FEATURES = "entry.json", "features"
_PARTIAL = ".partial"
_ABANDONED = 24 * 3600.0  # seconds after which what a killed process was writing is deleted
_PIECE = 16 << 20  # bytes read at once where a checksum is compared

Key = Mapping[str, Any]


class FeatureFiles(ExitStack):
    """The .npy files of one folder, which grow together; as a context, it closes them.

    Args:
        folder: where; it exists.
        done: rows that the files hold already; what comes after them is lost.
    """

    def __init__(self, folder: Path, done: int = 0):
        super().__init__()
        self.enter_context(writing(folder))  # also where a file is closed
        self.folder, self.rows = folder, done
        self.checksums: dict[str, int] = {}  # CRC-32 of the rows that were added
        self._files: dict[str, IO[bytes]] = {}
        self._headers: dict[str, dict[str, Any]] = {}

    def append(self, columns: Columns) -> None:
        """Append some rows: arrays [n, ...] by the name of their file."""
        for name, values in columns.items():
            if name not in self._files:
                self._open(name, values)
            rows = np.ascontiguousarray(values)
            self._files[name].write(rows.data)
            self.checksums[name] = zlib.crc32(rows.data, self.checksums[name])
        self.rows += len(next(iter(columns.values())))

    def sync(self) -> None:
        """Wait until the disk has all rows."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the number of rows, and wait for the disk."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)
        self.sync()

    def _open(self, name: str, values: np.ndarray) -> None:
        path, mode = self.folder / f"{name}.npy", "r+b" if self.rows else "w+b"
        self._files[name] = file = self.enter_context(path.open(mode))
        self._headers[name] = np.lib.format.header_data_from_array_1_0(values[:0])
        self._write_header(name)
        file.truncate(file.tell() + self.rows * values.itemsize * math.prod(values.shape[1:]))
        file.seek(0, os.SEEK_END)
        self.checksums[name] = 0

    def _write_header(self, name: str) -> None:
        """Write a header, whose length does not depend on the number of rows."""
        header = self._headers[name]
        header["shape"] = (self.rows, *header["shape"][1:])
        np.lib.format.write_array_header_1_0(self._files[name], header)


class FeatureStore:
    """A folder of features; several processes may use it. It can be deleted at any time.

    Args:
        folder: where; made when the first entry is written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._verified: set[Path] = set()  # compared with their checksums by this process

    def find(self, key: Key) -> FeatureSet | None:
        """Return the features of a key, mapped from their file; None if there are none.

        Files are compared with their checksums when they are first used. A damaged entry is
        deleted, with a warning.
        """
        place = self._place(key)
        if not place.exists():
            return None
        try:
            card = workdirs.read_json(place / _CARD)
            if card["key"] != json.loads(json.dumps(key)):
                raise ValueError(f"{_CARD} is about other features")
            if place not in self._verified:
                for name, expected in card["crc32"].items():
                    if _checksum(place / f"{name}.npy") != expected:
                        raise ValueError(f"the checksum of {name}.npy differs")
                self._verified.add(place)
            return _opened(place)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s), computed again", place, error)
            shutil.rmtree(place, ignore_errors=True)
            return None

    def write(self, keys: Mapping[str, Key], parts: Iterable[Columns]) -> dict[str, FeatureSet]:
        """Write the features of several layers as they are computed.

        Args:
            keys: of each layer.
            parts: for each batch, the layers' features float32[n, F], "label" and "index".

        Returns:
            {layer: features}, mapped from their files.
        """
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob(f"*{_PARTIAL}"):
            if time.time() - partial.stat().st_mtime > _ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)
        with ExitStack() as stack:
            files = {}
            for layer in keys:
                partial = Path(tempfile.mkdtemp(_PARTIAL, ".", self.folder))
                stack.callback(shutil.rmtree, partial, ignore_errors=True)
                files[layer] = stack.enter_context(FeatureFiles(partial))
            for columns in parts:
                common = {name: columns[name] for name in (LABEL, INDEX)}
                for layer, file in files.items():
                    file.append({_FEATURES: columns[layer], **common})
            return {layer: self._publish(file, keys[layer]) for layer, file in files.items()}

    def _publish(self, files: FeatureFiles, key: Key) -> FeatureSet:
        """Rename a complete entry; if another process was faster, its own entry stays."""
        files.finish()
        workdirs.write_json(files.folder / _CARD, {"key": key, "crc32": files.checksums})
        sync(files.folder / _CARD)
        sync(files.folder)
        features, place = _opened(files.folder), self._place(key)
        try:
            files.folder.replace(place)
        except OSError:
            if not place.exists():
                raise
        else:
            self._verified.add(place)
            sync(self.folder)
        return features  # mapped, hence readable whatever happens to the files

    def _place(self, key: Key) -> Path:
        return self.folder / fingerprint(key)[:24]


def check_room(folder: Path, needed: int, advice: str) -> None:
    """Log how many bytes of features will be written.

    Raises:
        InputError: the disk has fewer free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"features: {size_text(needed)} are to be written, but the disk of {folder} has "
            f"{size_text(free)} free. {advice}"
        )
    logger.info("%s: writing %s of features", folder, size_text(needed))


def fingerprint(value: Any) -> str:
    """Return a sha256 in hex over a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _opened(place: Path) -> FeatureSet:
    features = np.load(place / f"{_FEATURES}.npy", mmap_mode="r")
    return FeatureSet(features, *(np.load(place / f"{name}.npy") for name in (LABEL, INDEX)))


def _checksum(path: Path) -> int:
    """Return the CRC-32 of an .npy file's rows."""
    value = 0
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while piece := file.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value
