"""The image files of a folder tree, and what tells later whether the list still holds."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from nat_jax.errors import InputError
from nat_jax.input.file_kinds import IMAGE_SUFFIXES, suffix_of

# Folders of desktop systems and network storage, in lower case: thumbnails, recycle bins,
# snapshots, what a repair of the file system found.
SYSTEM_FOLDERS = frozenset(
    ("__macosx", "lost+found", "found.000", "system volume information", "@eadir", "@tmp")
    + ("#recycle", "@recycle", "$recycle.bin", "#snapshot", "@recently-snapshot")
    + ("network trash folder", "temporary items")
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
        others: how many other files were seen, by suffix, and links that lead nowhere.
        system: names of the folders of `SYSTEM_FOLDERS`, and of runs, that were left out.
        refused: paths of the folders that could not be listed, each ending in "/", and why.
        repeated: how many names stand in a .zip more than once.
        stamp: what the root looked like.
    """

    folders: list[str]
    files: list[File]
    others: Counter[str]
    system: set[str]
    refused: dict[str, str]
    repeated: int
    stamp: Stamp


def list_folder(root: str, progress: Callable[[int], Any]) -> Listing:
    """List a folder tree; links are followed, each folder is listed once.

    A workdir may lie in the tree, or be its root: the pictures of a run are left out.

    Args:
        root: the folder.
        progress: called for each folder with the number of files in it.

    Raises:
        ValueError: the root cannot be read.
    """
    folders: list[str] = []
    files: list[File] = []
    others: Counter[str] = Counter()
    system: set[str] = set()
    refused: dict[str, str] = {}
    stamp = Stamp({}, {}, None, None)
    real_root = os.path.realpath(root)
    pending, reached = [("", real_root)], {real_root}
    while pending:
        prefix, real = pending.pop()
        path, front = os.path.join(root, prefix), encoded(prefix)
        here: list[File] = []
        suffixes: list[str] = []  # of the files that are no images
        below: list[tuple[str, str]] = []
        # The times before the names, so that a change in between is noticed.
        now = time.time_ns()
        stamp.times[prefix] = times = [0, 0]  # of no folder, so that it is listed again
        try:
            stamp.times[prefix] = times = times_of(os.stat(path))
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    if is_hidden(name):
                        continue
                    if entry.is_dir():
                        if is_system(name):
                            system.add(name)
                            continue
                        if _is_drawn(entry.path):
                            system.add(f"{prefix}{name} (of a run)")
                            continue
                        target = os.path.join(real, name)
                        if entry.is_symlink():
                            target = stamp.links[prefix + name] = os.path.realpath(entry.path)
                        below.append((f"{prefix}{name}/", target))
                    elif entry.is_file() and (suffix := suffix_of(name)) in IMAGE_SUFFIXES:
                        here.append(File(front + encoded(name), entry.stat().st_size, len(folders)))
                    elif entry.is_file():
                        suffixes.append(suffix)
                    elif entry.is_symlink():
                        suffixes.append("broken link(s)")
        except OSError as error:
            if not prefix:
                raise InputError(f"folder: cannot list {path}: {error}") from error
            refused[prefix] = error.strerror or str(error)
            continue
        others.update(suffixes)
        files += here
        if here:
            folders.append(prefix)
        if not is_settled(now, times):
            stamp = stamp._replace(unsettled=path)
        new = []
        for below_prefix, target in sorted(below):  # which of several links to a folder counts
            if target not in reached:
                reached.add(target)
                new.append((below_prefix, target))
        pending += reversed(new)
        progress(len(here) + len(suffixes))
    return Listing(folders, files, others, system, refused, 0, stamp)


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
    return name.startswith(".")


def is_system(name: str) -> bool:
    """Return whether the name of a folder is one of `SYSTEM_FOLDERS`, in any case."""
    return name.lower() in SYSTEM_FOLDERS


def times_of(status: os.stat_result) -> list[int]:
    """Return the times that `Stamp` keeps."""
    return [status.st_mtime_ns, status.st_ctime_ns]


def is_settled(now: int, times: list[int]) -> bool:
    """Return whether a change after `now` would change these times."""
    return now - max(times) >= SETTLED_NS
