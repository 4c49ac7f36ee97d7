"""Pooling of feature maps to a size that probes can use."""

import jax
import jax.numpy as jnp
import numpy as np

PUBLISHED_FEATURES = 9600  # values of Zhang et al.'s largest pooled maps


def pool(x: jax.Array, max_features: int) -> jax.Array:
    """Average-pool feature maps until a record has at most `max_features` values.

    The map shrinks to the largest grid of about its own aspect ratio that fits; each cell is the
    mean over the pixels that it touches (adaptive pooling). Maps that fit stay as they are; a map
    of more than `max_features` channels becomes 1 x 1.

    Zhang et al. (ECCV 2016) resize AlexNet's maps to 10 x 10 x 96, 6 x 6 x 256, 5 x 5 x 384 twice
    and 6 x 6 x 256, which are 9,600 or 9,216 values: the sizes that `max_features` =
    PUBLISHED_FEATURES produces here. Where they interpolate, this averages: every pixel counts.

    Args:
        x: float[B, h, w, c].
        max_features: largest h' * w' * c of the result.

    Returns:
        float[B, h', w', c].
    """
    if x.ndim != 4:
        raise ValueError(f"pool: expected feature maps [B, h, w, c], got shape {x.shape}")
    if max_features < 1:
        raise ValueError(f"pool: expected max_features of at least 1, got {max_features}")
    height, width, channels = x.shape[1:]
    longer = max(height, width)
    for side in range(longer, 0, -1):
        rows, cols = (max(1, round(side * size / longer)) for size in (height, width))
        if rows * cols * channels <= max_features:
            break
    if (rows, cols) == (height, width):
        return x
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("bhwc,rh->brwc", x, _windows(rows, height), precision=exact)
    return jnp.einsum("brwc,sw->brsc", x, _windows(cols, width), precision=exact)


def _windows(cells: int, size: int) -> np.ndarray:
    """Return float32[cells, size]: row i averages pixels floor(i s/c) .. ceil((i+1) s/c)."""
    first = np.arange(cells)[:, None] * size // cells
    last = -(-(np.arange(cells)[:, None] + 1) * size // cells)
    inside = (np.arange(size) >= first) & (np.arange(size) < last)
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
