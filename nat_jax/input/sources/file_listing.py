"""The image files of a folder tree, and what tells later whether the list still holds."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from nat_jax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# A change within one tick of the file system's clock after the listing leaves the times as they
# are; ticks are 2 s long at most (FAT).
SETTLED_NS = 2 * 10**9
_THREADS = 16  # that check the times of folders, for file systems that are slow to answer


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
        times: st_mtime_ns and st_ctime_ns of every folder listed, and of a file that tells labels,
            by path below the root, or of the .zip.
        links: where each linked folder leads.
        size: bytes of the .zip; None for a folder.
        unsettled: a path that changed too recently for `times` to show a further change; None
            where there is none.
    """

    times: dict[str, list[int]]
    links: dict[str, str]
    size: int | None
    unsettled: str | None

    def holds(self, root: str) -> bool:
        """Return whether nothing was added, removed, renamed or linked elsewhere since."""
        paths = list(self.times)
        try:
            if self.unsettled or (self.size is not None and os.stat(root).st_size != self.size):
                return False
            if any(os.path.realpath(os.path.join(root, n)) != t for n, t in self.links.items()):
                return False
            with ThreadPoolExecutor(_THREADS) as pool:
                parts = [paths[i::_THREADS] for i in range(_THREADS)]
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


def list_folder(root: str, progress: Callable[[int], Any]) -> Listing:
    """List a folder tree; links are followed, each folder is listed once.

    A workdir may lie in the tree, or be its root: the pictures of a run are left out.

    Args:
        root: the folder.
        progress: called for each folder with the number of files in it.

    Raises:
        ValueError: a folder below cannot be read, or is being changed.
    """
    folders: list[str] = []
    files: list[File] = []
    stamp = Stamp({}, {}, None, None)
    others = 0
    real_root = os.path.realpath(root)
    pending, reached = [("", real_root)], {real_root}
    while pending:
        prefix, real = pending.pop()
        path, front = os.path.join(root, prefix), encoded(prefix)
        before = len(files) + others
        below: list[tuple[str, str]] = []
        try:
            # The times before the names, so that a change in between is noticed.
            now = time.time_ns()
            stamp.times[prefix] = times = times_of(os.stat(path))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if is_hidden(name):
                        continue
                    if entry.is_dir():
                        target = os.path.join(real, name)
                        if entry.is_symlink():
                            target = stamp.links[prefix + name] = os.path.realpath(entry.path)
                        below.append((f"{prefix}{name}/", target))
                    elif entry.is_file() and is_image(name):
                        size = entry.stat().st_size
                        files.append(File(front + encoded(name), size, len(folders)))
                    else:
                        others += entry.is_file()
        except OSError as error:
            raise InputError(f"folder: cannot list {path}: {error}") from error
        if files and files[-1].folder == len(folders):
            folders.append(prefix)
        if not is_settled(now, times):
            stamp = stamp._replace(unsettled=path)
        new = []
        for below_prefix, target in sorted(below):  # which of several links to a folder counts
            if target not in reached and not _is_drawn(os.path.join(root, below_prefix[:-1])):
                reached.add(target)
                new.append((below_prefix, target))
        pending += reversed(new)
        progress(len(files) + others - before)
    return Listing(folders, files, others, stamp)


def _is_drawn(folder: str) -> bool:
    """Return whether a folder has pictures that a run drew into its workdir, not images of data."""
    workdir, name = os.path.split(folder)
    marks = ("metrics.jsonl", "features_cache", "results/judged", "results/suite.json")
    return name == "pictures" and any(os.path.exists(os.path.join(workdir, m)) for m in marks)


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
