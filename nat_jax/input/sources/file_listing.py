"""The image files of a folder tree, with what tells later whether the list still holds.

A million files are listed without a Python object for each that outlives its folder: what stays is
a string and an array per folder.
"""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np

from nat_jax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# A change that comes within one tick of the file system's clock after the listing leaves the time
# of the change before it; ticks are 2 s long at most (FAT).
SETTLED_NS = 2 * 10**9
_THREADS = 16
# Threads pay where a file system takes time to answer, over a network; elsewhere they take turns
# at Python's lock and a listing lasts twice as long.
_SLOW_SECONDS_PER_FILE = 25e-6
_SECONDS_OF_TRIAL = 0.2
_FOLDERS_PER_THREAD = 64


class Group(NamedTuple):
    """The images that stand directly in one folder.

    Attributes:
        prefix: the folder's path below the root, ending in "/"; "" is the root.
        names: their names in order, in UTF-8, with a NUL between any two.
        sizes: int64[n], bytes of each.
        members: where each lies in a .zip, [n] of `zip_archive.MEMBER`; None in a folder.
    """

    prefix: str
    names: bytes
    sizes: np.ndarray
    members: np.ndarray | None


class Stamp(NamedTuple):
    """What a folder tree or a .zip looked like when it was listed.

    The times of change stand beside those of modification because no program can set them: one
    that unpacks more files into a folder often sets its modification time back.

    Attributes:
        times: st_mtime_ns and st_ctime_ns of every folder listed, by path below the root, or of
            the .zip.
        links: where each linked folder led, and None for links that led nowhere.
        size: bytes of the .zip; None of a folder.
    """

    times: dict[str, list[int]]
    links: dict[str, str | None]
    size: int | None

    def holds(self, root: str) -> bool:
        """Say whether nothing was added, removed, renamed or linked elsewhere since."""
        workers = min(_THREADS, len(self.times) // _FOLDERS_PER_THREAD + 1)
        paths = list(self.times)
        try:
            if self.size is not None and os.stat(root).st_size != self.size:
                return False
            if any(_target(os.path.join(root, n)) != t for n, t in self.links.items()):
                return False
            if workers == 1:
                return self._same(root, paths)
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
        groups: the folders that hold images, in any order.
        others: how many other files were seen.
        stamp: what the root looked like.
        unsettled: a path that changed too recently for `stamp` to show a further change; None
            where there is none.
    """

    groups: list[Group]
    others: int
    stamp: Stamp
    unsettled: str | None


class _Scanned(NamedTuple):
    group: Group
    others: int
    folders: list[tuple[str, str]]  # name and real path of each, by name
    links: dict[str, str | None]
    times: list[int]
    settled: bool


def list_folder(root: str, progress: Callable[[int], object]) -> Listing:
    """List a folder tree; links are followed, each folder is listed once.

    Args:
        root: the folder.
        progress: told how many more files were listed, again and again.

    Raises:
        ValueError: a folder below cannot be read, or is being changed.
    """
    groups: list[Group] = []
    times: dict[str, list[int]] = {}
    links: dict[str, str | None] = {}
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
            times[prefix] = found.times
            links |= found.links
            others += found.others
            if found.group.names:
                groups.append(found.group)
            if not found.settled:
                unsettled = os.path.join(root, prefix)
            new = []
            for name, target in found.folders:
                if target not in reached:
                    reached.add(target)
                    new.append((f"{name}/", target))
            pending += reversed(new)
            count = len(found.group.sizes) + found.others
            progress(count)
            num_seen += count + 1
            if pool is None and _is_slow(time.perf_counter() - start, num_seen):
                pool = ThreadPoolExecutor(_THREADS)
                cleanup.callback(pool.shutdown, cancel_futures=True)
                new = pending
            if pool is not None:
                ahead |= {p: pool.submit(_scan, root, p, r) for p, r in new}
    return Listing(groups, others, Stamp(times, links, None), unsettled)


def _is_slow(seconds: float, num_seen: int) -> bool:
    return seconds > _SECONDS_OF_TRIAL and seconds > num_seen * _SLOW_SECONDS_PER_FILE


def _scan(root: str, prefix: str, real: str) -> _Scanned:
    """List one folder, the times before the names: so that a change in between is seen."""
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
    settled = is_settled(now, times)
    images.sort()
    folders.sort()
    sizes = np.fromiter((size for _, size in images), np.int64, len(images))
    group = Group(prefix, encoded("\0".join(name for name, _ in images)), sizes, None)
    return _Scanned(group, others, folders, links, times, settled)


def encoded(text: str) -> bytes:
    """Encode names so that their bytes sort as the names do, even those that are not UTF-8."""
    return text.encode("utf-8", "surrogatepass")


def decoded(data: bytes) -> str:
    """Undo `encoded`."""
    return data.decode("utf-8", "surrogatepass")


def is_hidden(name: str) -> bool:
    """Say whether one part of a path is left out without a word."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Say whether the last part of a path, not a hidden one, ends as those of images do."""
    return name[name.rfind(".") :].lower() in IMAGE_SUFFIXES


def times_of(status: os.stat_result) -> list[int]:
    """Give the times that `Stamp` keeps."""
    return [status.st_mtime_ns, status.st_ctime_ns]


def is_settled(now: int, times: list[int]) -> bool:
    """Say whether a change after `now` would change these times."""
    return now - max(times) >= SETTLED_NS


def _target(path: str) -> str | None:
    return os.path.realpath(path) if os.path.exists(path) else None
