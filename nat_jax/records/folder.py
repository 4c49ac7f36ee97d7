"""Images in a folder tree or in a .zip that is read in place."""

import functools
import hashlib
import logging
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nat_jax.records.source import Record, UnreadableRecord, split_positions

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
_TEST_FOLDERS = ("test", "val")


class _File(NamedTuple):
    name: str  # path below the root, with "/"
    inner: str  # the same without common top folders and without the split's folder
    size: int


class FolderSource:
    """Encoded image files; labels are the names of the class folders.

    Args:
        path: the folder or the .zip.
        split: "train" or "test".
        names: path of each record below `path`, with "/".
        sizes: bytes of each.
        labels: int32[N], -1 where unlabelled.
        class_names: see `Source`.
    """

    def __init__(
        self,
        path: str,
        split: str,
        names: tuple[str, ...],
        sizes: tuple[int, ...],
        labels: np.ndarray,
        class_names: tuple[str, ...] | None,
    ):
        self.name = f"folder:{path}"
        self.split = split
        self.class_names = class_names
        self.num_classes = None if class_names is None else len(class_names)
        self._names = names
        self._sizes = sizes
        self.labels = labels
        self._root = Path(path).expanduser()
        self._open_archive()

    def _open_archive(self) -> None:
        self._lock = threading.Lock()
        self._zip = zipfile.ZipFile(self._root) if self._root.is_file() else None

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.split} {self.class_names}\n".encode())
        for name, size, label in zip(self._names, self._sizes, self.labels, strict=True):
            digest.update(f"{name}\0{size}\0{label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Record:
        name, label = self._names[index], int(self.labels[index])
        try:
            if self._zip is None:
                image = (self._root / name).read_bytes()
            else:
                with self._lock:
                    image = self._zip.read(name)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
            raise UnreadableRecord(name, label, str(error)) from error
        return {"index": index, "name": name, "label": label, "image": image}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_zip", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_archive()


def open_folder(argument: str, split: str) -> FolderSource:
    """Open `folder:PATH`: class folders, or a flat folder, or a .zip of either.

    `train/` beside `test/` or `val/` at the top are the splits; otherwise a tenth by index hash is
    held out as the test split. Folders that hold everything else are looked through, hidden files
    and files with other suffixes are left out.

    Raises:
        ValueError: nothing is there, it is not a folder or .zip, or no image is in it.
    """
    root = Path(argument).expanduser()
    if not root.exists():
        raise ValueError(f"folder: no such folder or .zip: {root}")
    found = sorted(_list_folder(root) if root.is_dir() else _list_zip(root))
    visible = [(n, s) for n, s in found if not _is_hidden(n)]
    images = [(n, s) for n, s in visible if Path(n).suffix.lower() in IMAGE_SUFFIXES]
    others = len(visible) - len(images)
    if not images:
        raise ValueError(
            f"folder: no images in {root} ({others} other files); "
            f"expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if others:
        _log.info("folder: left out %d file(s) of %s that are not images", others, root)
    files, class_names = _split_files(images, split, root)
    lookup = {name: label for label, name in enumerate(class_names or ())}
    labels = [lookup.get(f.inner.partition("/")[0], -1) for f in files]
    return FolderSource(
        path=argument,
        split=split,
        names=tuple(f.name for f in files),
        sizes=tuple(f.size for f in files),
        labels=np.asarray(labels, np.int32),
        class_names=class_names,
    )


def _list_folder(root: Path) -> Iterator[tuple[str, int]]:
    """Yield path and size of every file below root; links are followed, each folder once."""
    pending, seen = [""], {os.path.realpath(root)}
    while pending:
        prefix = pending.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in seen and not _is_hidden(name):
                        seen.add(real)
                        pending.append(f"{name}/")
                elif entry.is_file():
                    yield name, entry.stat().st_size


def _list_zip(path: Path) -> list[tuple[str, int]]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"folder: {path} is neither a folder nor a readable .zip: {error}"
        ) from error
    if any(m.flag_bits & 1 for m in members):
        raise ValueError(f"folder: {path} is protected by a password; give one without")
    return [(m.filename, m.file_size) for m in members]


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _split_files(
    images: list[tuple[str, int]], split: str, root: Path
) -> tuple[list[_File], tuple[str, ...] | None]:
    """Choose one split's files and the classes, from the layout of the tree."""
    files = _without_common_top([_File(n, n, s) for n, s in images])
    by_top: dict[str, list[_File]] = {}
    for f in files:
        top, slash, inner = f.inner.partition("/")
        by_top.setdefault(top if slash else "", []).append(f._replace(inner=inner or top))
    test = next((name for name in _TEST_FOLDERS if name in by_top), None)
    if "train" in by_top and test is not None:
        left_out = len(files) - len(by_top["train"]) - len(by_top[test])
        if left_out:
            _log.info("folder: left out %d image(s) outside train/ and %s/", left_out, test)
        classes = {"train": _classes(by_top["train"], root), "test": _classes(by_top[test], root)}
        chosen = by_top["train" if split == "train" else test]
        if not classes[split]:
            return chosen, None
        return chosen, tuple(sorted(classes["train"] | classes["test"]))
    names = _classes(files, root)
    return [files[i] for i in split_positions(len(files), split)], tuple(sorted(names)) or None


def _without_common_top(files: list[_File]) -> list[_File]:
    while True:
        tops = {f.inner.partition("/")[0] if "/" in f.inner else "" for f in files}
        if len(tops) > 1 or "" in tops:
            return files
        files = [f._replace(inner=f.inner.partition("/")[2]) for f in files]


def _classes(files: list[_File], root: Path) -> set[str]:
    """Give the names of the class folders: empty for a flat folder."""
    flat = [f.name for f in files if "/" not in f.inner]
    if flat and len(flat) < len(files):
        raise ValueError(
            f"folder: {root} mixes {len(flat)} loose images (such as {flat[0]}) with class "
            "folders; put every image into a class folder, or all into one folder (unlabelled)"
        )
    return set() if flat else {f.inner.partition("/")[0] for f in files}
