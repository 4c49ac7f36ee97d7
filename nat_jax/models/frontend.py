"""Front ends: from uint8 images to the input of the first convolution.

The front end is part of the network, so that a trained model takes raw RGB and cannot be fed
wrongly (paper, section 4: training on image gradients instead of colours).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.models import on_cpu

# Constant images have no deviation to divide by; half a grey level keeps them at zero.
_MIN_DEVIATION = 0.5 / 255.0

# dx of the authors' main.lua: a Sobel kernel that takes the mean of the three colours.
_SOBEL_X = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], np.float32) / 3.0


def standardise(images: jax.Array) -> jax.Array:
    """Subtract each image's mean and divide by its deviation, over pixels and colours together.

    Args:
        images: uint8[B, H, W, 3].

    Returns:
        float32[B, H, W, 3] (authors' imagenet.lua; no statistics of the data set).
    """
    x = images.astype(jnp.float32) / 255.0
    x = x - jnp.mean(x, axis=(1, 2, 3), keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(x), axis=(1, 2, 3), keepdims=True))
    return x / jnp.maximum(deviation, _MIN_DEVIATION)


def sobel_kernel() -> np.ndarray:
    """Return the fixed kernel float32[3, 3, 3, 2]: gradients of mean grey, across and down."""
    dx = np.repeat(_SOBEL_X[:, :, None], 3, axis=2)
    dy = np.repeat(_SOBEL_X.T[:, :, None], 3, axis=2)
    return np.stack([dx, dy], axis=-1)


def highpass_kernel(size: int = 5, sigma: float = 1.0) -> np.ndarray:
    """Return the fixed kernel float32[size, size, 3, 1]: mean grey minus its Gaussian blur.

    The paper names a high-pass filter in table 2 and does not define it; this one is ours.
    """
    axis = np.arange(size) - size // 2
    bell = np.exp(-(axis**2) / (2 * sigma**2))
    kernel = -np.outer(bell, bell) / bell.sum() ** 2
    kernel[size // 2, size // 2] += 1.0
    return np.repeat(kernel[:, :, None, None].astype(np.float32), 3, axis=2) / 3.0


def _filter(images: jax.Array, kernel: np.ndarray, platform: str | None) -> jax.Array:
    """Apply a fixed kernel with zero padding, as the authors' frozen first layer does."""
    x = standardise(images)
    if (platform or jax.default_backend()) == "cpu":
        return on_cpu.filter_grey(jnp.sum(x, axis=-1), kernel[:, :, 0])
    return jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel),
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def rgb(images: jax.Array, platform: str | None = None) -> jax.Array:
    """Return the standardised colours, float32[B, H, W, 3]."""
    return standardise(images)


def highpass(images: jax.Array, platform: str | None = None) -> jax.Array:
    """Return the standardised image without its low frequencies, float32[B, H, W, 1]."""
    return _filter(images, highpass_kernel(), platform)


def sobel(images: jax.Array, platform: str | None = None) -> jax.Array:
    """Return horizontal and vertical gradients, float32[B, H, W, 2]."""
    return _filter(images, sobel_kernel(), platform)


# name -> (function of images and the platform that it runs on, None for JAX's default; channels)
FRONTENDS: dict[str, tuple[Callable[..., jax.Array], int]] = {
    "rgb": (rgb, 3),
    "highpass": (highpass, 1),
    "sobel": (sobel, 2),
}


def kernel_of(frontend: str) -> np.ndarray | None:
    """Return a front end's fixed kernel float32[h, w, 3, C]; None for "rgb", which has none."""
    kernels = {"highpass": highpass_kernel, "sobel": sobel_kernel}
    return kernels[frontend]() if frontend in kernels else None
