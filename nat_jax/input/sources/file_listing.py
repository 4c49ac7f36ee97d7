"""The image files of a folder tree, and what tells later whether the list still holds."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

from nat_jax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# A change within one tick of the file system's clock after the listing leaves the times as they
# are; ticks are 2 s long at most (FAT).
SETTLED_NS = 2 * 10**9
_THREADS = 16
# Threads pay where a file system takes time to answer, over a network; elsewhere they wait for
# Python's lock and a listing lasts twice as long.
_SLOW_SECONDS_PER_FILE = 25e-6
_SECONDS_OF_TRIAL = 0.2
_FOLDERS_PER_THREAD = 64


class File(NamedTuple):
    """One image; files sort by their paths.

    Attributes:
        path: below the root, with "/", as `encoded`.
        size: bytes.
        folder: number of its folder in the listing.
        member: where it lies in a .zip, a row of `zip_archive.MEMBER`; () in a folder.
    """

    path: bytes
    size: int
    folder: int
    member: tuple[int, ...] = ()


class Stamp(NamedTuple):
    """What a folder tree or a .zip looked like when it was listed.

    The times of change (st_ctime) are kept with those of modification because no program can set
    them: one that unpacks more files into a folder often sets its modification time back.

    Attributes:
        times: st_mtime_ns and st_ctime_ns of every folder listed, by path below the root, or of
            the .zip.
        links: where each linked folder leads, and None for links that lead nowhere.
        size: bytes of the .zip; None for a folder.
        unsettled: a path that changed too recently for `times` to show a further change; None
            where there is none.
    """

    times: dict[str, list[int]]
    links: dict[str, str | None]
    size: int | None
    unsettled: str | None

    def holds(self, root: str) -> bool:
        """Return whether nothing was added, removed, renamed or linked elsewhere since."""
        paths = list(self.times)
        workers = min(_THREADS, len(paths) // _FOLDERS_PER_THREAD + 1)
        try:
            if self.unsettled or (self.size is not None and os.stat(root).st_size != self.size):
                return False
            if any(_target(os.path.join(root, n)) != t for n, t in self.links.items()):
                return False
            with ThreadPoolExecutor(workers) as pool:
                parts = [paths[i::workers] for i in range(workers)]
                return all(pool.map(lambda part: self._same(root, part), parts))
        except OSError:
            return False

    def _same(self, root: str, paths: Iterable[str]) -> bool:
        # A path with "/" at its end is no file, so a .zip stands for itself.
        full = ((path, os.path.join(root, path) if path else root) for path in paths)
        return all(times_of(os.stat(name)) == self.times[path] for path, name in full)


class Listing(NamedTuple):
    """All images below a root.

    Attributes:
        folders: paths below the root of the folders that hold images, each ending in "/"; "" is
            the root.
        files: the images, in any order.
        others: how many other files were seen.
        stamp: what the root looked like.
    """

    folders: list[str]
    files: list[File]
    others: int
    stamp: Stamp


class _Scanned(NamedTuple):
    """One folder; `folders` has name and real path of each, by name."""

    images: list[tuple[str, int]]
    others: int
    folders: list[tuple[str, str]]
    links: dict[str, str | None]
    times: list[int]
    settled: bool


def list_folder(root: str, progress: Callable[[int], Any]) -> Listing:
    """List a folder tree; links are followed, each folder is listed once.

    Args:
        root: the folder.
        progress: called for each folder with the number of files in it.

    Raises:
        ValueError: a folder below cannot be read, or is being changed.
    """
    listing = Listing([], [], 0, Stamp({}, {}, None, None))
    unsettled = None
    others = num_seen = 0
    real_root = os.path.realpath(root)
    pending, reached = [("", real_root)], {real_root}
    ahead: dict[str, Future[_Scanned]] = {}
    pool = None
    start = time.perf_counter()
    with ExitStack() as cleanup:
        while pending:
            prefix, real = pending.pop()
            # Which of several links to one folder counts depends on this order, which is that of
            # their names: so threads only prepare what comes next.
            future = ahead.pop(prefix, None)
            found = future.result() if future else _scan(root, prefix, real)
            listing.stamp.times[prefix] = found.times
            listing.stamp.links.update(found.links)
            others += found.others
            if found.images:
                number, front = len(listing.folders), encoded(prefix)
                listing.folders.append(prefix)
                listing.files.extend(File(front + encoded(n), s, number) for n, s in found.images)
            if not found.settled:
                unsettled = os.path.join(root, prefix)
            new = []
            for name, target in found.folders:
                if target not in reached:
                    reached.add(target)
                    new.append((f"{name}/", target))
            pending += reversed(new)
            count = len(found.images) + found.others
            progress(count)
            num_seen += count + 1
            seconds = time.perf_counter() - start
            if pool is None and seconds > max(_SECONDS_OF_TRIAL, num_seen * _SLOW_SECONDS_PER_FILE):
                pool = ThreadPoolExecutor(_THREADS)
                cleanup.callback(pool.shutdown, cancel_futures=True)
                new = pending
            if pool is not None:
                ahead |= {p: pool.submit(_scan, root, p, r) for p, r in new}
    return listing._replace(others=others, stamp=listing.stamp._replace(unsettled=unsettled))


def _scan(root: str, prefix: str, real: str) -> _Scanned:
    """List one folder, the times before the names, so that a change in between is noticed."""
    path = os.path.join(root, prefix)
    images: list[tuple[str, int]] = []
    folders: list[tuple[str, str]] = []
    links: dict[str, str | None] = {}
    others = 0
    try:
        now = time.time_ns()
        times = times_of(os.stat(path))
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    continue
                if entry.is_dir():
                    target = os.path.join(real, name)
                    if entry.is_symlink():
                        target = os.path.realpath(entry.path)
                        links[prefix + name] = target
                    folders.append((prefix + name, target))
                elif not entry.is_file():
                    if entry.is_symlink():
                        links[prefix + name] = None
                elif is_image(name):
                    images.append((name, entry.stat().st_size))
                else:
                    others += 1
    except OSError as error:
        raise InputError(f"folder: cannot list {path}: {error}") from error
    return _Scanned(images, others, sorted(folders), links, times, is_settled(now, times))


def encoded(text: str) -> bytes:
    """Encode a name so that bytes sort as names do, even those that are not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> str:
    """Invert `encoded`."""
    return data.decode("utf-8", "surrogatepass")


def is_hidden(name: str) -> bool:
    """Return whether one part of a path is left out without being counted."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Return whether the last part of a path, not a hidden one, ends as those of images do."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


def times_of(status: os.stat_result) -> list[int]:
    """Return the times that `Stamp` keeps."""
    return [status.st_mtime_ns, status.st_ctime_ns]


def is_settled(now: int, times: list[int]) -> bool:
    """Return whether a change after `now` would change these times."""
    return now - max(times) >= SETTLED_NS


def _target(path: str) -> str | None:
    return os.path.realpath(path) if os.path.exists(path) else None
