"""Layers in forms that XLA compiles to fast programs on CPUs; elsewhere its own forms are faster.

XLA:CPU computes a convolution's gradient with respect to the kernel as a convolution whose kernel
is as large as the image, several times slower than a matrix product of the same work, and the
gradient of max-pooling value by value.

The gradients are custom VJPs: there is no forward-mode differentiation (``jax.jvp``, ``jacfwd``),
and ``shard_map`` needs ``check_vma=False``. A network with ``platform="gpu"`` has XLA's own forms.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_NUMBERS = ("NHWC", "HWIO", "NHWC")
# Patches that are made at once stay in a core's cache.
_PATCH_BYTES = 1_250_000
# XLA's convolution is slower than a product with patches of at most this many values, and very slow
# where the kernel is larger than the image, as XLA exchanges the two then.
_SMALL_PATCH = 32

# Number of no tap of a window.
_NONE = np.uint8(255)

_Padding = tuple[tuple[int, int], ...]

# Which operations YNNPACK computes: all that XLA:CPU gives it by default but convolutions.
_YNNPACK = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@functools.cache
def compiler_options(platform: str) -> dict[str, str] | None:
    """Return the options with which ``jax.jit`` should compile a network for a platform.

    On CPUs convolutions are left to Eigen, which divides them among all cores. YNNPACK, XLA's
    default there, computes those of up to 128 channels in one thread.

    Args:
        platform: "cpu", "gpu" or "tpu".

    Returns:
        The options; None, which are XLA's defaults, elsewhere and if XLA does not know the option.
    """
    if platform != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": _YNNPACK}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:
            return None
    return options


def conv_general_dilated(
    x: jax.Array,
    kernel: jax.Array,
    window_strides: tuple[int, ...],
    padding: _Padding,
    **settings: Any,
) -> jax.Array:
    """Convolve [B, H, W, I] with [k, k, I, O]; what ``nnx.Conv`` calls in place of ``lax``'s.

    Equal to ``lax.conv_general_dilated`` but for rounding, gradients included (B > 0).

    Args:
        x: float[B, H, W, I].
        kernel: float[k, k, I, O].
        window_strides: of height and width.
        padding: (before, after) of height and width, not negative.
        **settings: others of ``nnx.Conv``, which have to be its defaults.
    """
    return _convolve(x, kernel, tuple(window_strides), tuple(map(tuple, padding)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides, padding) -> jax.Array:
    return _convolve_forward(x, kernel, strides, padding)[0]


def _plain(x: jax.Array, kernel: jax.Array, strides, padding: _Padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_NUMBERS)


def _multiplies_patches(x: jax.Array, kernel: jax.Array) -> bool:
    size = max(kernel.shape[:2])
    return math.prod(kernel.shape[:3]) <= _SMALL_PATCH or min(x.shape[1:3]) < size


def _convolve_forward(x: jax.Array, kernel: jax.Array, strides, padding: _Padding) -> Any:
    if not _multiplies_patches(x, kernel):
        return _plain(x, kernel, strides, padding), (x, kernel, None)
    patches = _patches(x, kernel.shape, strides, padding)
    return patches @ kernel.reshape(-1, kernel.shape[3]), (x, kernel, patches)


def _convolve_backward(strides, padding: _Padding, kept: Any, g: jax.Array) -> Any:
    x, kernel, patches = kept
    if patches is None:
        _, pullback = jax.vjp(lambda x: _plain(x, kernel, strides, padding), x)
        return *pullback(g), _kernel_gradient(x, g, kernel, strides, padding)
    _, pullback = jax.vjp(lambda x: _patches(x, kernel.shape, strides, padding), x)
    of_patches = g @ kernel.reshape(-1, kernel.shape[3]).T
    return *pullback(of_patches), _as_kernel(_product(g, patches), kernel)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _patches(x: jax.Array, kernel: tuple[int, ...], strides, padding: _Padding) -> jax.Array:
    """Return what the kernel sees at each place, [B, h, w, k * k * I]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def along(x: jax.Array, axis: int, size: int, stride: int) -> jax.Array:
        last = x.shape[axis] - size
        shifted = (
            lax.slice_in_dim(x, i, i + last + 1, stride=stride, axis=axis) for i in range(size)
        )
        return jnp.concatenate(list(shifted), axis=-1)

    return along(along(x, 2, kernel[1], strides[1]), 1, kernel[0], strides[0])


def _product(g: jax.Array, patches: jax.Array) -> jax.Array:
    """Return float32[O, k * k * I], summed over images and places."""
    rows, columns = (y.reshape(-1, y.shape[-1]) for y in (g, patches))
    return lax.dot_general(
        rows, columns, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )


def _kernel_gradient(
    x: jax.Array, g: jax.Array, kernel: jax.Array, strides, padding: _Padding
) -> jax.Array:
    """Return the gradient [k, k, I, O], from as many images at once as the cache takes."""
    batch, width, channels = len(x), math.prod(kernel.shape[:3]), kernel.shape[3]
    of_image = math.prod(g.shape[1:3]) * width * x.dtype.itemsize
    # Adding up costs less than the products if their factors are larger than the sum.
    at_once = max(1, max(_PATCH_BYTES, 8 * width * channels) // of_image)
    if batch > at_once and jax.device_count() > 1:
        # Turns of a loop would each exchange a part of the sum between the devices.
        return jax.vjp(lambda kernel: _plain(x, kernel, strides, padding), kernel)[1](g)[0]
    at_once = max(n for n in range(1, batch + 1) if batch % n == 0 and n <= at_once)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, g = part
        return total + _product(g, _patches(x, kernel.shape, strides, padding)), None

    x, g = (y.reshape(-1, at_once, *y.shape[1:]) for y in (x, g))
    total, _ = lax.scan(add, jnp.zeros((channels, width), jnp.float32), (x, g))
    return _as_kernel(total, kernel)


def _as_kernel(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
    return gradient.T.reshape(kernel.shape).astype(kernel.dtype)


def filter_grey(x: jax.Array, kernel: np.ndarray) -> jax.Array:
    """Correlate [B, H, W], zeros around it, with fixed kernels [k, k, C]; return [B, H, W, C]."""
    (size, _, channels), (height, width) = kernel.shape, x.shape[1:]
    x = jnp.pad(x, ((0, 0), *[(size // 2, size // 2)] * 2))
    taps = list(itertools.product(range(size), repeat=2))

    def filtered(kernel: np.ndarray) -> jax.Array:
        return sum(
            kernel[i, j] * x[:, i : i + height, j : j + width] for i, j in taps if kernel[i, j]
        )

    return jnp.stack([filtered(kernel[..., c]) for c in range(channels)], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def normalise_pool(
    x: jax.Array, mean: jax.Array, scale: jax.Array, bias: jax.Array, window: int, stride: int
) -> jax.Array:
    """Return what max-pooling makes of relu((x - mean) * scale + bias).

    As all of that is monotonic, the greatest (under a negative scale the smallest) values of ``x``
    are chosen first, and the rest is done for these only. The gradient goes to the first of equal
    values.

    Args:
        x: float[B, H, W, C].
        mean: float32, of a shape that can be broadcast to that of ``x``; one value per channel, or
            per image and channel.
        scale: likewise.
        bias: likewise.
        window: side of the windows, which lie within the image.
        stride: of the windows.

    Returns:
        [B, h, w, C] of the dtype of ``x``.
    """
    return _normalised(_chosen(_taps(x, window, stride), scale), mean, scale, bias)


def _normalised(y: jax.Array, mean: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.maximum((y.astype(jnp.float32) - mean) * scale + bias, 0.0).astype(y.dtype)


def _taps(x: jax.Array, window: int, stride: int) -> list[jax.Array]:
    """Return the values of all windows, row by row, each [B, h, w, C]."""
    height, width = (side - window + 1 for side in x.shape[1:3])
    return [
        x[:, i : i + height : stride, j : j + width : stride]
        for i in range(window)
        for j in range(window)
    ]


def _chosen(taps: list[jax.Array], scale: jax.Array) -> jax.Array:
    def better(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(scale < 0, jnp.minimum(a, b), jnp.maximum(a, b))

    return functools.reduce(better, taps)


def _normalise_pool_forward(x, mean, scale, bias, window: int, stride: int) -> Any:
    taps = _taps(x, window, stride)
    y = _chosen(taps, scale)
    result = _normalised(y, mean, scale, bias)
    # A tap's number, or that of none where ReLU lets no gradient through.
    which = jnp.full(y.shape, len(taps) - 1, jnp.uint8)
    for number in reversed(range(len(taps) - 1)):
        which = jnp.where(taps[number] == y, np.uint8(number), which)
    which = jnp.where(result > 0, which, _NONE)
    return result, (which, y, mean, scale, bias, jnp.empty((0, *x.shape[1:]), x.dtype))


def _normalise_pool_backward(window: int, stride: int, kept: Any, g: jax.Array) -> Any:
    which, y, mean, scale, bias, like = kept
    g = jnp.where(which == _NONE, 0.0, g.astype(jnp.float32))

    def summed(values: jax.Array, like: jax.Array) -> jax.Array:
        """Sum over the axes along which ``like`` is broadcast to the values."""
        padded = (1,) * (values.ndim - like.ndim) + like.shape
        over = tuple(k for k, size in enumerate(padded) if size < values.shape[k])
        return jnp.sum(values, axis=over).reshape(like.shape)

    of_mean = summed(-scale * g, mean)
    of_scale = summed(g * (y.astype(jnp.float32) - mean), scale)
    of_bias = summed(g, bias)
    pixels = _scatter(which, (g * scale).astype(y.dtype), like.shape[1:3], window, stride)
    return pixels, of_mean, of_scale, of_bias


def _scatter(
    which: jax.Array, g: jax.Array, sides: tuple[int, int], window: int, stride: int
) -> jax.Array:
    """Return [B, H, W, C]: each pixel's sum over the windows of which it is tap ``which``."""
    # A cell has stride x stride pixels; so many windows along a side reach into it.
    cells = tuple(-(-side // stride) for side in sides)
    reach = -(-window // stride)

    def moved(y: jax.Array, fill: Any, down: int, right: int) -> jax.Array:
        rows = (down, cells[0] - down - y.shape[1], 0)
        columns = (right, cells[1] - right - y.shape[2], 0)
        y = lax.pad(y, np.array(fill, y.dtype), [(0, 0, 0), rows, columns, (0, 0, 0)])
        return y[:, :, None, :, None]

    parts = []
    for down, right in itertools.product(range(reach), repeat=2):
        # Pixel (i, j) of a cell is this tap of the window that begins so many cells before.
        i, j = np.ix_(np.arange(stride) + down * stride, np.arange(stride) + right * stride)
        tap = np.where((i < window) & (j < window), i * window + j, _NONE - 1).astype(np.uint8)
        is_tap = moved(which, _NONE, down, right) == tap[None, None, :, None, :, None]
        parts.append(jnp.where(is_tap, moved(g, 0, down, right), 0))
    total = functools.reduce(jnp.add, parts)
    total = total.reshape(len(g), cells[0] * stride, cells[1] * stride, -1)
    return total[:, : sides[0], : sides[1]]


normalise_pool.defvjp(_normalise_pool_forward, _normalise_pool_backward)
