"""Indexes of large folders, listed once and kept on disk.

An index is a folder of .npy files that are mapped into memory, and an index.json. Its name comes
from the real path of the data and from what it looked like, so that an index never changes once it
is there: data that changed gets another one, and a program that still reads the old one is not
disturbed. It is written under another name and then renamed, so that it is there as a whole or not
at all, however many processes write it.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.errors import InputError, UserError
from nat_jax.input.sources.file_index import FileIndex, Files, SplitIndex, build_index
from nat_jax.input.sources.file_listing import IMAGE_SUFFIXES, Listing, Stamp, list_folder
from nat_jax.input.sources.source import SPLITS
from nat_jax.input.sources.zip_archive import MEMBER, list_zip
from nat_jax.runtime import cache_dir

_log = logging.getLogger(__name__)

KEPT_FROM = 10_000  # files; fewer are listed in less time than a person notices
_FORMAT = 1  # to be raised with any change of the files, or of what is listed in which order
_ABOUT = "index.json"
_PART = ".part-"  # begins the names of indexes that are being written
_COLUMNS = {
    "names": np.dtype("<u1"),
    "starts": np.dtype("<i8"),
    "sizes": np.dtype("<i8"),
    "labels": np.dtype("<i4"),
    "members": MEMBER,
}
# An index of data that has changed since is removed when nobody has opened it for so long.
_UNUSED_NS = 30 * 24 * 3600 * 10**9
_PATIENCE = 2.0  # seconds of listing without a word
_REMEMBERED = 4
_recent: dict[str, FileIndex] = {}


class DamagedIndex(UserError):
    """An index that is not as it was written; the message says what is wrong."""


def open_index(root: str) -> FileIndex:
    """Give the index of a folder or .zip: remembered, kept, or listed now.

    Raises:
        ValueError: there is no image, or it cannot be listed or divided.
    """
    real = os.path.realpath(root)
    known = _recent.pop(real, None)
    index = known if known is not None and known.stamp.holds(root) else _find(root, real)
    if index is None:
        index, settled = _listed(root, real)
        if not settled:
            return index
    _recent[real] = index
    while len(_recent) > _REMEMBERED:
        with contextlib.suppress(KeyError, RuntimeError, StopIteration):  # another thread did
            del _recent[next(iter(_recent))]
    return index


def load_index(folder: Path) -> FileIndex:
    """Map a kept index into memory, whatever its data look like now.

    Raises:
        DamagedIndex: it is incomplete, damaged, or of another version.
    """
    with _what_is_wrong():
        about, stamp = _read_about(folder)
        return _load(folder, about, stamp)


@contextlib.contextmanager
def _what_is_wrong() -> Iterator[None]:
    try:
        yield
    except DamagedIndex:
        raise
    except Exception as error:  # damage shows as exceptions of no common type
        raise DamagedIndex(f"{type(error).__name__}: {error}") from error


def _read_about(folder: Path) -> tuple[dict[str, Any], Stamp]:
    about = json.loads((folder / _ABOUT).read_bytes())
    if about["format"] != _FORMAT:
        raise DamagedIndex(f"version {about['format']}, expected {_FORMAT}")
    return about, Stamp(about["times"], about["links"], about["size"])


def _load(folder: Path, about: dict[str, Any], stamp: Stamp) -> FileIndex:
    splits = {split: _load_split(folder, split, about["splits"][split]) for split in SPLITS}
    return FileIndex(splits, tuple(about["remarks"]), stamp, folder)


def _load_split(folder: Path, split: str, about: dict[str, Any]) -> SplitIndex:
    count, num_bytes = about["count"], about["bytes"]
    lengths = {"names": num_bytes, "starts": count + 1}
    columns: dict[str, Any] = {"members": None}
    for column, checksum in about["columns"].items():
        path = folder / f"{split}.{column}.npy"
        if _checksum(path) != checksum:
            raise DamagedIndex(f"the checksum of {path.name} is wrong")
        array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
        shape = (lengths.get(column, count),)
        if array.dtype != _COLUMNS[column] or array.shape != shape:
            raise DamagedIndex(
                f"{path.name} is {array.dtype}{list(array.shape)}, "
                f"expected {_COLUMNS[column]}{list(shape)}"
            )
        columns[column] = array
    names = about["class_names"]
    return SplitIndex(
        Files(**columns), None if names is None else tuple(names), about["fingerprint"]
    )


def _checksum(path: Path) -> int:
    """Give the CRC-32 of a file, by reading: pages of a mapping would count as memory in use."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(2**16):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _place(real: str) -> Path | None:
    """Give the folder for all indexes of one path, or None where there is no place for any."""
    digest = hashlib.sha256(real.encode("utf-8", "surrogateescape")).hexdigest()
    folder = cache_dir.place("file_index")
    return folder and folder / digest[:32]


def _name(stamp: Stamp) -> str:
    return hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:32]


def _find(root: str, real: str) -> FileIndex | None:
    """Give the kept index that still holds."""
    place = _place(real)
    if place is None:
        return None
    try:
        found = [p for p in place.iterdir() if not p.name.startswith(_PART)]
    except OSError:
        return None
    for folder in sorted(found, key=_last_use, reverse=True):
        try:
            with _what_is_wrong():
                about, stamp = _read_about(folder)
                index = _load(folder, about, stamp) if stamp.holds(root) else None
        except DamagedIndex as error:
            _log.warning("folder: the index in %s cannot be used (%s)", folder, error)
            cause = error.__cause__
            if not isinstance(cause, OSError) or isinstance(cause, FileNotFoundError):
                _remove(folder)  # else others may well be able to read it
            continue
        if index is not None:
            with contextlib.suppress(OSError):
                os.utime(folder / _ABOUT)
            return index
    return None


def _listed(root: str, real: str) -> tuple[FileIndex, bool]:
    """List the data, keep the index where it is large, and say whether it may be used again."""
    start = time.perf_counter()
    listing = _list(root)
    if not listing.groups:
        raise InputError(
            f"folder: no images in {root} ({listing.others} other files); "
            f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    index = build_index(listing, root)
    settled = listing.unsettled is None
    count = listing.others + sum(len(g.sizes) for g in listing.groups)
    if count < KEPT_FROM:
        return index, settled
    if settled:
        index, outcome = _keep(index, real)
    else:
        outcome = (
            f"its index is not kept, since {listing.unsettled} changed within the last seconds "
            "or is dated in the future"
        )
    seconds = time.perf_counter() - start
    _log.info(
        "folder: listed %s files of %s in %.1f s (%s per second); %s",
        f"{count:,}",
        root,
        seconds,
        f"{round(count / seconds):,}",
        outcome,
    )
    return index, settled


def _list(root: str) -> Listing:
    if not os.path.isdir(root):
        with _patience(root):
            return list_zip(root)
    from tqdm import tqdm

    # Silent where there is no terminal. One that does not tell its height would otherwise be taken
    # to have no line for a bar.
    with tqdm(
        desc=f"listing {root}",
        unit=" files",
        unit_scale=True,
        disable=None,
        delay=_PATIENCE,
        leave=False,
        nrows=2,
    ) as bar:
        if not bar.disable:
            return list_folder(root, bar.update)
        with _patience(root):
            return list_folder(root, bar.update)


@contextlib.contextmanager
def _patience(root: str) -> Iterator[None]:
    """Say what takes so long, if it does."""
    note = threading.Timer(_PATIENCE, _log.info, ("folder: listing the files of %s ...", root))
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()


def _keep(index: FileIndex, real: str) -> tuple[FileIndex, str]:
    """Write an index and give it as it is mapped from there, and what became of it in words."""
    place = _place(real)
    try:
        if place is None:
            raise OSError("there is no home folder")
        if Path(real) in place.parents:
            raise OSError(f"{place} lies inside the data, which it would change")
        place.mkdir(parents=True, exist_ok=True)
        folder = place / _name(index.stamp)
        part = place / f"{_PART}{uuid.uuid4().hex}"
        try:
            part.mkdir()
            _write(index, part, real)
            _rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _tidy(place, folder)
        return load_index(folder), f"its index is kept in {folder}"
    except (OSError, DamagedIndex) as error:
        return index, (
            f"its index cannot be kept ({error}): it is listed anew at every start; "
            "set NAT_JAX_CACHE to a folder that can be written"
        )


def _write(index: FileIndex, folder: Path, real: str) -> None:
    splits = {}
    for split, part in index.splits.items():
        columns = {}
        for column, array in part.files._asdict().items():
            if array is None:
                continue
            path = folder / f"{split}.{column}.npy"
            with path.open("wb") as file:
                np.save(file, array.astype(_COLUMNS[column], copy=False))
                _flush(file)
            columns[column] = _checksum(path)
        splits[split] = {
            "count": len(part.files.labels),
            "bytes": len(part.files.names),
            "columns": columns,
            "class_names": part.class_names,
            "fingerprint": part.fingerprint,
        }
    about = {
        "format": _FORMAT,
        "path": real,
        "remarks": list(index.remarks),
        "splits": splits,
        **index.stamp._asdict(),
    }
    with (folder / _ABOUT).open("wb") as file:
        file.write(json.dumps(about).encode())
        _flush(file)


def _flush(file: Any) -> None:
    """Put a file on the disk: after a power cut a renamed folder must not hold zeros."""
    file.flush()
    os.fsync(file.fileno())


def _rename(part: Path, folder: Path) -> None:
    """Give an index its name, unless another process was faster."""
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _tidy(place: Path, current: Path) -> None:
    """Remove indexes of what the data once were, and what killed processes left behind."""
    for folder in place.iterdir():
        if folder != current and time.time_ns() - _last_use(folder) > _UNUSED_NS:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove an index at once for others, whatever happens to its files."""
    part = folder.with_name(f"{_PART}{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):
        folder.rename(part)
        shutil.rmtree(part, ignore_errors=True)


def _last_use(folder: Path) -> int:
    for path in (folder / _ABOUT, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime_ns
    return 0
