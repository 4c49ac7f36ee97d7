"""The handwritten digits that ship with scikit-learn: real images without a download."""

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.arrays import ArraySource

# In the order of the file the test images come from other writers than the training images
# (Alpaydin and Kaynak, 1998), so the split must not be shuffled.
_TRAIN = 1437


def open_digits(argument: str, split: str) -> ArraySource:
    """Open `digits`: 1,797 grey images of 8x8 pixels, the first 1,437 for training.

    Raises:
        ValueError: something was given after the name.
    """
    if argument:
        raise InputError(f"digits takes no argument, got digits:{argument}")
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)  # pixels come as 0..16
    part = slice(_TRAIN) if split == "train" else slice(_TRAIN, None)
    return ArraySource(
        name="digits",
        split=split,
        images=images[part],
        labels=data.target[part],
        class_names=tuple(str(c) for c in range(10)),
        reopen=(open_digits, ""),
    )
