"""Images that come as arrays: an .npz file, or MNIST's idx files in a folder."""

import functools
import gzip
import hashlib
import logging
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.errors import InputError, some_of
from nat_jax.input.file_kinds import IMAGE_SUFFIXES, kind_of, kind_of_file, suffix_of
from nat_jax.input.sources.source import Opener, Record, hold_out

_log = logging.getLogger(__name__)

# The names under which .npz files keep (train images, train labels, test images, test labels).
_NPZ_LAYOUTS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("x_train", "y_train", "x_val", "y_val"),
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("train_images", "train_labels", "val_images", "val_labels"),
    ("x", "y", None, None),
    ("image", "label", None, None),
    ("images", "labels", None, None),
)
_NPZ_FORMS = "; or ".join(
    f"{x}[, {y}]" + (f"[, {x_test}[, {y_test}]]" if x_test else "")
    for x, y, x_test, y_test in _NPZ_LAYOUTS
)
_IDX_PREFIX = {"train": "train", "test": "t10k"}
_IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions
_IDX_LABELS = 0x00000801  # unsigned bytes, one dimension
_SHOWN = 8  # names in a message

Parts = tuple[np.ndarray, np.ndarray | None]


class ArraySource:
    """Records held in memory as one array of images.

    Args:
        name, split, class_names: see `Source`.
        images: uint8 [N, H, W] or [N, H, W, 1|3|4].
        labels: integers [N], -1 for a record without a label; None when unlabelled.
        reopen: `(opener, argument)` that opens the same source again; pickling keeps only this.
    """

    def __init__(
        self,
        name: str,
        split: str,
        images: np.ndarray,
        labels: np.ndarray | None,
        class_names: tuple[str, ...] | None,
        reopen: tuple[Opener, str],
    ):
        self.name = name
        self.split = split
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.num_classes = None if class_names is None else len(class_names)
        self._reopen = reopen

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"{self.split} {self.images.shape}".encode())
        digest.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").data)
            if self.class_names != tuple(map(str, range(self.num_classes or 0))):
                digest.update(str(self.class_names).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Record:
        return {
            "index": index,
            "name": self.record_name(index),
            "label": -1 if self.labels is None else int(self.labels[index]),
            "image": self.images[index],
        }

    def record_name(self, index: int) -> str:
        return f"{self.name} {self.split}[{index}]"

    def __reduce__(self) -> tuple[Any, ...]:
        opener, argument = self._reopen
        return opener, (argument, self.split)


def open_arrays(argument: str, split: str) -> ArraySource:
    """Open `arrays:PATH`: an .npz file, or a folder of idx files named as MNIST's.

    Keys of an .npz file: `x_train`, `y_train` and perhaps `x_test`, `y_test`, or `x_val`, `y_val`
    where the former are missing or have no labels; `train_images` and so on; or one set as `x`,
    `y`, as `image`, `label` or as `images`, `labels`, of which a tenth is held out.

    The labels that occur, in rising order, are the classes; -1 stands for no label.

    Raises:
        ValueError: nothing is there, or it is not of the expected form.
    """
    path = Path(os.path.expanduser(argument))
    if not path.exists():
        raise InputError(f"arrays: no such file or folder: {path}")
    train, test = _read_idx_folder(path) if path.is_dir() else _read_npz(path, split)
    images, labels = train
    known = [y[y >= 0] for part in (train, test) if part is not None and (y := part[1]) is not None]
    images, labels = test if test is not None and split == "test" else train
    if test is None:
        every = np.full(len(images), -1) if labels is None else labels
        positions, chosen, _ = hold_out(every, split)
        images = images[positions]
        labels = None if labels is None else chosen
    class_names = None
    if labels is not None and labels.max() >= 0:
        values = np.unique(np.concatenate(known))
        if without := int(np.sum(labels < 0)):
            _log.info(
                "arrays: %d of %d records of %s (%s) have no label (-1), or are held out and the "
                "only ones of their class; probes leave them out",
                *(without, len(labels), path, split),
            )
        labels = np.where(labels < 0, -1, np.searchsorted(values, labels))
        class_names = tuple(map(str, values.tolist()))
    return ArraySource(
        f"arrays:{argument}", split, images, labels, class_names, (open_arrays, argument)
    )


def _read_npz(path: Path, split: str) -> tuple[Parts, Parts | None]:
    try:
        kind = kind_of_file(path)
        if not kind.endswith(".zip archive"):
            raise InputError(
                f"arrays: {path} is not a readable .npz file (of np.savez): it is {kind}"
            )
        with np.load(path, allow_pickle=False) as file:
            names = tuple(file.files)
            # A test split with labels before one without.
            tests = {keys: _is_labelled(file, keys[2], keys[3], path) for keys in _NPZ_LAYOUTS}
            for keys in sorted(tests, key=lambda keys: -tests[keys]):
                if keys[0] in names:
                    arrays = {key: _array(file, key, path) for key in keys if key in names}
                    break
            else:
                raise InputError(_other_keys(path, names))
    except InputError:
        raise
    except Exception as error:  # a damaged .zip has many, and each method of compression its own
        raise InputError(
            f"arrays: {path} is not a readable .npz file: {error}. Copy or download it again"
        ) from error
    if split == "train" and (others := [name for name in names if name not in keys]):
        _log.info("arrays: %s: left out %s", path, some_of(others, _SHOWN))
    x, y, x_test, y_test = keys
    train = _checked(path, x, arrays[x], y, arrays.get(y))
    if x_test is None or x_test not in arrays:
        return train, None
    return train, _checked(path, x_test, arrays[x_test], y_test, arrays.get(y_test))


def _is_labelled(file: Any, x: str | None, y: str | None, path: Path) -> int:
    """Return 2 for arrays with labels, 1 for arrays without, 0 where there are none."""
    if x not in file.files:
        return 0
    return 1 + (y in file.files and bool(np.any(_array(file, y, path) != -1)))


def _array(file: Any, key: str | None, path: Path) -> np.ndarray:
    try:
        array = file[key]
        if isinstance(array, np.ndarray):
            return array
    except ValueError as error:
        if "pickle" not in str(error):
            raise
    raise InputError(
        f"arrays: {path} is not a readable .npz file of plain arrays: {key} holds other objects; "
        "expected numbers"
    )


def _other_keys(path: Path, names: Sequence[str]) -> str:
    found, hint = some_of(names, _SHOWN) or "nothing", ""
    if any(suffix_of(name) in IMAGE_SUFFIXES for name in names):
        hint = f". A .zip of image files is read by folder:{path}"
    return f"arrays: {path} holds {found}; expected arrays named {_NPZ_FORMS}{hint}"


def _checked(
    path: Path, x_name: str, x: np.ndarray, y_name: str | None, y: np.ndarray | None
) -> Parts:
    """Check one split's arrays, and reshape labels to [N]."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)):
        raise InputError(
            f"arrays: {x_name} in {path} is {x.dtype}{list(x.shape)}; expected uint8 images "
            "[N, H, W] or [N, H, W, 1|3|4] with values 0..255, which other numbers become by "
            "np.uint8(np.clip(x * (255.0 / WHITE), 0, 255)), WHITE being the value that is white"
        )
    if x.size == 0:
        raise InputError(f"arrays: {x_name} in {path} is empty: {list(x.shape)}")
    if y is None:
        return x, None
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "iu" or len(y) != len(x):
        raise InputError(
            f"arrays: {y_name} in {path} is {y.dtype}{list(y.shape)}; expected one integer label "
            f"for each of the {len(x)} images of {x_name}"
        )
    if y.max() > np.iinfo(np.int64).max:
        raise InputError(f"arrays: {y_name} in {path} has labels above 2^63 - 1; got {y.max()}")
    y = y.astype(np.int64)
    if y.min() < -1:
        raise InputError(
            f"arrays: {y_name} in {path} has labels below -1, which stands for no label (lowest "
            f"{y.min()})"
        )
    return x, y


def _read_idx_folder(path: Path) -> tuple[Parts, Parts | None]:
    train = _idx_split(path, "train")
    if train is None:
        found = sorted(p.name for p in path.iterdir())[:8]
        raise InputError(
            f"arrays: no idx files in {path} (it holds {', '.join(found) or 'nothing'}); expected "
            "train-images-idx3-ubyte and train-labels-idx1-ubyte [and t10k-...], plain or .gz; "
            "for a folder of image files use folder:PATH; of an .npz file name the file itself"
        )
    return train, _idx_split(path, "test")


def _idx_split(path: Path, split: str) -> Parts | None:
    prefix = _IDX_PREFIX[split]
    images_path = _idx_path(path, f"{prefix}-images", "idx3-ubyte")
    if images_path is None:
        return None
    images = _read_idx(images_path, _IDX_IMAGES)
    labels_path = _idx_path(path, f"{prefix}-labels", "idx1-ubyte")
    labels = None if labels_path is None else _read_idx(labels_path, _IDX_LABELS)
    label_name = labels_path.name if labels_path else None
    return _checked(path, images_path.name, images, label_name, labels)


def _idx_path(path: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz"))
    return next((path / name for name in names if (path / name).is_file()), None)


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """Read one idx file: big-endian magic number, sizes, then the bytes."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":  # whatever it is called: browsers unpack .gz files
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"arrays: {path} cannot be read: {error}") from error
    dims = magic & 0xFF
    start = 4 + 4 * dims
    if len(data) < start:
        raise InputError(f"arrays: {path} is truncated: {len(data)} bytes")
    found, *shape = struct.unpack(f">{1 + dims}I", data[:start])
    if found != magic:
        raise InputError(
            f"arrays: {path} starts with {found:#010x}, not {magic:#010x}: "
            f"not an idx file of unsigned bytes in {dims} dimension(s); it is {kind_of(data)}"
        )
    size = math.prod(shape)
    if len(data) - start != size:
        raise InputError(
            f"arrays: {path} is truncated or damaged: its header says {shape}, so {size} bytes, "
            f"but {len(data) - start} follow"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)
