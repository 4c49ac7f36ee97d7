"""Images in a folder tree or in a .zip that is read in place."""

import os
import zipfile
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.input.sources.index_cache import FileIndex, open_index
from nat_jax.input.sources.source import Record, UnreadableRecord
from nat_jax.input.sources.zip_archive import ZipReader


class FolderSource:
    """Encoded image files; labels are integers, and `class_names` has the names of the classes.

    There is no Python object for a record until it is read, so that opening takes the same time for
    a million files as for a few. A pickle holds the path, and unpickling opens its index: the kept
    file, or a new listing if it is not kept. A kept index may be days old, so with one a file whose
    length has changed is an `UnreadableRecord`: the times of folders do not show that a file was
    overwritten.

    Args:
        path: the folder or the .zip.
        split: "train" or "test".
        index: what is known of the records.
    """

    def __init__(self, path: str, split: str, index: FileIndex):
        known = index.splits[split]
        self.name = f"folder:{path}"
        self.split = split
        self.class_names = known.class_names
        self.num_classes = None if known.class_names is None else len(known.class_names)
        self.fingerprint = known.fingerprint
        self.labels = known.labels
        self.sizes = known.sizes  # int64[N], bytes of each file
        self._path = path
        self._root = _root(path)
        self._index = index
        self._known = known
        self._archive: ZipReader | None = None
        if index.stamp.size is not None:
            modified, _ = index.stamp.times[""]
            self._archive = ZipReader(self._root, index.stamp.size, modified)

    def __len__(self) -> int:
        return len(self.labels)

    def record_name(self, index: int) -> str:
        return self._known.name(range(len(self))[index])

    def __getitem__(self, index: int) -> Record:
        position = range(len(self))[index]
        name, label = self._known.name(position), int(self.labels[position])
        try:
            if self._archive is not None:
                image = self._archive.read(name, self._known.members[position])
            else:
                with open(os.path.join(self._root, name), "rb", buffering=0) as file:
                    image = file.read()
        except (OSError, zipfile.BadZipFile) as error:
            raise UnreadableRecord(name, label, str(error)) from error
        size, kept = int(self.sizes[position]), self._index.kept
        if kept is not None and self._archive is None and len(image) != size:
            reason = (
                f"it has {len(image)} bytes, but {size} in the index of {self._root}: files were "
                f"overwritten since it was made; delete {kept} and start again"
            )
            raise UnreadableRecord(name, label, reason)
        return {"index": index, "name": name, "label": label, "image": image}

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self._path, self.split, self.fingerprint)


def open_folder(argument: str, split: str) -> FolderSource:
    """Open `folder:PATH`: class folders, or a flat folder, or a .zip of either.

    `train/` and `test/` or `val/` at the top, or folders with similar names, are the splits;
    without them a tenth by index hash is held out as the test split: docs/data.md has what any
    layout is read as. Hidden files, folders of the system (`file_listing.SYSTEM_FOLDERS`)
    and files with other suffixes are left out.

    The first opening lists all files. The index of a large folder or .zip is kept in
    `$NAT_JAX_CACHE`, else `$XDG_CACHE_HOME/nat_jax`, else `~/.cache/nat_jax`, and used again until
    a file or a folder is added, removed or renamed.

    Raises:
        ValueError: nothing is there, it is not a folder or .zip, or no image is in it.
    """
    root = _root(argument)
    if not os.path.exists(root):
        raise InputError(f"folder: no such folder or .zip: {root}")
    return FolderSource(argument, split, open_index(root))


def _root(path: str) -> str:
    return str(Path(os.path.expanduser(path)).absolute())  # notebooks change their folder


def _reopen(path: str, split: str, fingerprint: str) -> FolderSource:
    source = FolderSource(path, split, open_index(_root(path)))
    if source.fingerprint != fingerprint:
        raise InputError(f"folder: {path} was changed after another process opened it; start again")
    return source
