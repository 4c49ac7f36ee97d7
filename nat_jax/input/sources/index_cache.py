"""Indexes of large folders, listed once and kept on disk: one file for each path of data."""

import hashlib
import logging
import os
import time
from pathlib import Path

from nat_jax.errors import InputError
from nat_jax.input.sources.file_index import DamagedIndex, FileIndex, build_index, load_index
from nat_jax.input.sources.file_listing import IMAGE_SUFFIXES, list_folder
from nat_jax.input.sources.zip_archive import list_zip
from nat_jax.runtime import atomic_files, cache_dir

_log = logging.getLogger(__name__)

KEPT_FROM = 10_000  # files; fewer are listed in less time than a person notices
_PATIENCE = 2.0  # seconds of listing before a bar is shown
_recent: dict[str, FileIndex] = {}  # the last one, by real path: train and test are opened in turn


def open_index(root: str) -> FileIndex:
    """Return the index of a folder or .zip: the last one opened, the kept one, or a new one.

    Raises:
        ValueError: there is no image, or it cannot be listed or divided.
    """
    real = os.path.realpath(root)
    index = _recent.get(real)
    if index is None or not index.stamp.holds(root):
        digest = hashlib.sha256(real.encode("utf-8", "surrogateescape")).hexdigest()
        cache = cache_dir.place("file_index")
        path = cache and cache / digest[:32]
        index = (path and _kept(path, root)) or _list(root, real, path)
    _recent.clear()
    _recent[real] = index
    return index


def _kept(path: Path, root: str) -> FileIndex | None:
    """Return the kept index, if it still holds."""
    if not os.path.isfile(path):
        return None
    try:
        index = load_index(path)
    except DamagedIndex as error:
        _log.warning("folder: the index in %s cannot be used (%s)", path, error)
        return None
    return index if index.stamp.holds(root) else None


def _list(root: str, real: str, path: Path | None) -> FileIndex:
    """List the data, and keep the index in `path` where it is large."""
    from tqdm import tqdm

    start = time.perf_counter()
    with tqdm(
        desc=f"listing {root}",
        unit=" files",
        unit_scale=True,
        disable=None,
        delay=_PATIENCE,
        leave=False,
        nrows=2,  # a terminal that does not tell its height would be taken to have no line for it
    ) as bar:
        listing = list_folder(root, bar.update) if os.path.isdir(root) else list_zip(root)
    if not listing.files:
        raise InputError(
            f"folder: no images in {root} ({listing.others} other files); "
            f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    index = build_index(listing, root)
    count = listing.others + len(listing.files)
    if count < KEPT_FROM:
        return index
    try:
        if listing.stamp.unsettled is not None:
            raise OSError(
                f"{listing.stamp.unsettled} changed within the last seconds or is dated in the "
                "future"
            )
        if path is None:
            raise OSError("there is no home folder")
        if Path(real) in path.parents:
            raise OSError(f"{path} lies inside the data, which it would change")
        atomic_files.write(path, index.block.tobytes())
        index, outcome = load_index(path), f"its index is kept in {path}"
    except (OSError, DamagedIndex) as error:
        outcome = (
            f"its index cannot be kept ({error}): it is listed again at every start; "
            "NAT_JAX_CACHE names a folder for it that can be written"
        )
    seconds = time.perf_counter() - start
    rate = f"{count:,} files of {root} in {seconds:.1f} s ({count / seconds:,.0f} per second)"
    _log.info("folder: listed %s; %s", rate, outcome)
    return index
