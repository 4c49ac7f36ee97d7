"""The handwritten digits that ship with scikit-learn: real images without a download."""

import functools
import importlib.util
from pathlib import Path

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.arrays import ArraySource

# In the order of the file the test images come from other writers than the training images
# (Alpaydin and Kaynak, 1998), so the split must not be shuffled.
_TRAIN = 1437


@functools.cache
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels float64[1797, 8, 8] and labels int64[1797] of ``load_digits``.

    Without importing scikit-learn, which takes longer than a run's other imports.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError(
            "digits come with scikit-learn, which is missing: pip install scikit-learn"
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if not file.exists():
        raise InputError(f"digits come with scikit-learn, whose {file} is missing: install it anew")
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def open_digits(argument: str, split: str) -> ArraySource:
    """Open `digits`: 1,797 grey images of 8x8 pixels, the first 1,437 for training.

    Raises:
        ValueError: something was given after the name.
    """
    if argument:
        raise InputError(f"digits takes no argument, got digits:{argument}")
    pixels, labels = _read()
    images = np.round(pixels * (255 / 16)).astype(np.uint8)  # pixels come as 0..16
    part = slice(_TRAIN) if split == "train" else slice(_TRAIN, None)
    return ArraySource(
        name="digits",
        split=split,
        images=images[part],
        labels=labels[part],
        class_names=tuple(str(c) for c in range(10)),
        reopen=(open_digits, ""),
    )
