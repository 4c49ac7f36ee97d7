"""Indexes of large folders, listed once and kept on disk.

An index is one file. Its name comes from the real path of the data and from what they looked like,
so that it never changes once it is there: data that changed get another one, and a program that
still reads the old one is not disturbed.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.input.sources.file_index import DamagedIndex, FileIndex, build_index, load_index
from nat_jax.input.sources.file_listing import IMAGE_SUFFIXES, list_folder
from nat_jax.input.sources.zip_archive import list_zip
from nat_jax.runtime import atomic_files, cache_dir

_log = logging.getLogger(__name__)

KEPT_FROM = 10_000  # files; fewer are listed in less time than a person notices
# An index of data that have changed since is removed when nobody has opened it for so long.
_UNUSED_NS = 30 * 24 * 3600 * 10**9
_PATIENCE = 2.0  # seconds of listing before something is shown
_recent: dict[str, FileIndex] = {}  # the last one, by real path: train and test are opened in turn


def open_index(root: str) -> FileIndex:
    """Return the index of a folder or .zip: the last one opened, a kept one, or a new one.

    Raises:
        ValueError: there is no image, or it cannot be listed or divided.
    """
    real = os.path.realpath(root)
    index = _recent.get(real)
    if index is None or not index.stamp.holds(root):
        index = _find(root, real) or _list(root, real)
    _recent.clear()
    _recent[real] = index
    return index


def _place(real: str) -> Path | None:
    """Return the folder for all indexes of one path, or None where there is no place for any."""
    digest = hashlib.sha256(real.encode("utf-8", "surrogateescape")).hexdigest()
    folder = cache_dir.place("file_index")
    return folder and folder / digest[:32]


def _find(root: str, real: str) -> FileIndex | None:
    """Return the kept index that still holds."""
    place = _place(real)
    try:
        found = [] if place is None else [p for p in place.glob("[!.]*") if p.is_file()]
    except OSError:
        return None
    for path in sorted(found, key=_last_use, reverse=True):
        try:
            index = load_index(path)
        except DamagedIndex as error:
            _log.warning("folder: the index in %s cannot be used (%s)", path, error)
            if not isinstance(error.__cause__, OSError):  # else others may be able to read it
                _remove(path)
            continue
        if index.stamp.holds(root):
            with contextlib.suppress(OSError):
                os.utime(path)
            return index
    return None


def _list(root: str, real: str) -> FileIndex:
    """List the data, and keep the index where it is large."""
    start = time.perf_counter()
    is_folder = os.path.isdir(root)
    with _progress(root, is_folder) as progress:
        listing = list_folder(root, progress) if is_folder else list_zip(root)
    if not listing.files:
        raise InputError(
            f"folder: no images in {root} ({listing.others} other files); "
            f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    index = build_index(listing, root)
    count = listing.others + len(listing.files)
    if count < KEPT_FROM:
        return index
    if listing.stamp.unsettled is None:
        index, outcome = _keep(index, real)
    else:
        outcome = (
            f"its index is not kept, since {listing.stamp.unsettled} changed within the last "
            "seconds or is dated in the future"
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
    return index


@contextlib.contextmanager
def _progress(root: str, is_folder: bool) -> Iterator[Callable[[int], Any]]:
    """Where listing takes long, show a bar on a terminal, elsewhere one log line."""
    from tqdm import tqdm

    note = threading.Timer(_PATIENCE, _log.info, ("folder: listing the files of %s ...", root))
    note.daemon = True
    # A terminal that does not tell its height would otherwise be taken to have no line for a bar.
    with tqdm(
        desc=f"listing {root}",
        unit=" files",
        unit_scale=True,
        disable=None if is_folder else True,  # a .zip is listed in one call
        delay=_PATIENCE,
        leave=False,
        nrows=2,
    ) as bar:
        if bar.disable:
            note.start()
        try:
            yield bar.update
        finally:
            note.cancel()


def _keep(index: FileIndex, real: str) -> tuple[FileIndex, str]:
    """Write an index; return it as it is mapped from there, and a message on what became of it."""
    place = _place(real)
    try:
        if place is None:
            raise OSError("there is no home folder")
        if Path(real) in place.parents:
            raise OSError(f"{place} lies inside the data, which it would change")
        place.mkdir(parents=True, exist_ok=True)
        stamp = json.dumps(index.stamp, sort_keys=True).encode()
        path = place / hashlib.sha256(stamp).hexdigest()[:32]
        atomic_files.write(path, index.block.tobytes())
        for other in place.iterdir():  # also what killed processes left behind
            if other != path and time.time_ns() - _last_use(other) > _UNUSED_NS:
                _remove(other)
        return load_index(path), f"its index is kept in {path}"
    except (OSError, DamagedIndex) as error:
        return index, (
            f"its index cannot be kept ({error}): it is listed again at every start; "
            "set NAT_JAX_CACHE to a folder that can be written"
        )


def _remove(path: Path) -> None:
    if path.is_dir():  # an index of version 0.1
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _last_use(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return 0
