"""Images in a folder tree or in a .zip that is read in place."""

import logging
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.input.sources.file_index import FileIndex, SplitIndex
from nat_jax.input.sources.index_cache import DamagedIndex, load_index, open_index
from nat_jax.input.sources.source import Record, UnreadableRecord
from nat_jax.input.sources.zip_archive import ZipReader

_log = logging.getLogger(__name__)


class FolderSource:
    """Encoded image files; labels are the names of the class folders.

    There is no Python object for a record until it is read, so that opening takes the same time for
    a million files as for a few. Pickling writes where the index is kept, or, where it is not, the
    index itself.

    Args:
        path: the folder or the .zip.
        split: "train" or "test".
        index: what is known of the records.
        archive: reads the .zip; None for a folder.
        kept: the folder of the cache that the index comes from; None where it was listed by this
            program or its parent. A kept index may be days old, so with one a file whose length has
            changed is an `UnreadableRecord`: the times of folders do not show that a file was
            overwritten.
    """

    def __init__(
        self,
        path: str,
        split: str,
        index: SplitIndex,
        archive: ZipReader | None = None,
        kept: Path | None = None,
    ):
        self.name = f"folder:{path}"
        self.split = split
        self.class_names = index.class_names
        self.num_classes = None if index.class_names is None else len(index.class_names)
        self.fingerprint = index.fingerprint
        self.labels = index.files.labels.view()
        self.labels.flags.writeable = False  # in the cache they are not
        self._path = path
        self._root = _root(path)
        self._index = index
        self._archive = archive
        self._kept = kept

    def __len__(self) -> int:
        return len(self.labels)

    def record_name(self, index: int) -> str:
        return self._index.files.name(range(len(self))[index])

    def __getitem__(self, index: int) -> Record:
        position = range(len(self))[index]
        files = self._index.files
        name, label = files.name(position), int(self.labels[position])
        size = int(files.sizes[position])
        try:
            if self._archive is None or files.members is None:
                with open(os.path.join(self._root, name), "rb", buffering=0) as file:
                    image = file.read()
            else:
                image = self._archive.read(name, size, files.members[position])
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise UnreadableRecord(name, label, str(error)) from error
        if self._kept is not None and self._archive is None and len(image) != size:
            reason = (
                f"it has {len(image)} bytes, but {size} in the index of {self._root}: files were "
                f"overwritten since it was made; delete {self._kept} and start again"
            )
            raise UnreadableRecord(name, label, reason)
        return {"index": index, "name": name, "label": label, "image": image}

    def __reduce__(self) -> tuple[Any, ...]:
        if self._kept is None:
            return FolderSource, (self._path, self.split, self._index, self._archive)
        return _reopen, (self._path, self.split, self.fingerprint, self._kept)


def open_folder(argument: str, split: str) -> FolderSource:
    """Open `folder:PATH`: class folders, or a flat folder, or a .zip of either.

    `train/` beside `test/` or `val/` at the top are the splits; otherwise a tenth by index hash is
    held out as the test split. Folders that hold everything else are looked through, hidden files
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
    index = open_index(root)
    for remark in index.remarks:
        _log.info("folder: %s", remark.format(root=root))
    return _source(argument, split, index)


def _root(path: str) -> str:
    return str(Path(path).expanduser().absolute())  # notebooks change their folder


def _source(path: str, split: str, index: FileIndex) -> FolderSource:
    archive = None
    if index.stamp.size is not None:
        modified, _ = index.stamp.times[""]
        archive = ZipReader(_root(path), index.stamp.size, modified)
    return FolderSource(path, split, index.splits[split], archive, index.kept)


def _reopen(path: str, split: str, fingerprint: str, kept: Path) -> FolderSource:
    """Open what another process has opened: by the same index, even if the data changed since."""
    try:
        index = load_index(kept)
    except DamagedIndex:  # somebody has emptied the cache
        index = open_index(_root(path))
    if index.splits[split].fingerprint != fingerprint:
        raise InputError(
            f"folder: {path} was changed after another process opened it, and its index is no "
            f"longer in {kept}; start again"
        )
    return _source(path, split, index)
