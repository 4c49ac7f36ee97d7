"""SIFT descriptors (Lowe, 2004) in improved Fisher vectors (Sánchez et al., IJCV 2013).

An image is described by how its SIFT descriptors, taken on a dense grid at three scales, would move
the means and variances of a mixture of Gaussians that was fitted to descriptors of many images.

What differs from the source: scales suit small images (cells of 2, 3 and 4 pixels, where it takes
24-pixel patches at five scales); 64 Gaussians by default where it takes 256; the image alone where
it adds parts of a spatial pyramid. Descriptors weight the gradients of a cell by the Gaussian
window at its centre, and images are not smoothed before.
"""

import dataclasses
import functools
import warnings
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.errors import InputError
from nat_jax.evaluate.baselines.codebooks import EXACT
from nat_jax.evaluate.baselines.patches import check_images, first_images, unit_vectors
from nat_jax.evaluate.features import padded_rows
from nat_jax.input import counter_random

_CELLS = (2, 3, 4)  # pixels a side, times the stride
_STEP = 2  # pixels between descriptors, times the stride
_DIMENSIONS = 64  # of the descriptors' principal components
_PER_IMAGE, _MOST = 8, 200_000  # descriptors drawn of an image, and in all
_ITERATIONS = 50  # of expectation and maximisation at most
_TOGETHER = 32  # images described at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FisherVectors:
    """What was learned from descriptors; call it with images.

    Attributes:
        mean: float32[128] of the descriptors.
        axes: float32[128, D], their principal components.
        weights: float32[K] of the Gaussians.
        centres: float32[K, D], their means.
        deviations: float32[K, D].
        stride: scale of cells and steps.
    """

    mean: np.ndarray
    axes: np.ndarray
    weights: np.ndarray
    centres: np.ndarray
    deviations: np.ndarray
    stride: int = dataclasses.field(metadata={"static": True})

    def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Describe images uint8[B, H, W, 3]; return unit vectors float32[B, 2 K D]."""
        _check(images, self.stride)
        return _describe(self, jnp.asarray(images))


def learn_fisher_vectors(
    batches: Iterable[np.ndarray], gaussians: int = 64, *, stride: int = 1, seed: int = 0
) -> FisherVectors:
    """Fit principal components and a mixture of Gaussians to SIFT descriptors of images.

    Args:
        batches: uint8[B, H, W, 3] each; the first 25,000 images count.
        gaussians: K.
        stride: scale of cells and steps; 1 suits images of 32 pixels.
        seed: of the descriptors and of the first Gaussians.

    Raises:
        InputError: no Gaussian, images without room for a descriptor, or too few of them.
    """
    # scikit-learn takes long to import.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    if gaussians < 1:
        raise InputError(f"sift: gaussians: expected at least 1, got {gaussians}")
    found = _sample(batches, stride, seed)
    if len(found) < 4 * gaussians:
        raise InputError(
            f"sift: expected at least {4 * gaussians} descriptors for {gaussians} Gaussians, got "
            f"{len(found)}; give more images, or fewer Gaussians"
        )
    mean = found.mean(axis=0)
    found = found - mean
    _, axes = np.linalg.eigh(found.T.astype(np.float64) @ found)
    axes = axes[:, ::-1][:, :_DIMENSIONS].astype(np.float32)
    mixture = GaussianMixture(
        gaussians,
        covariance_type="diag",
        reg_covar=1e-4,
        max_iter=_ITERATIONS,
        tol=1e-2,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last iteration will do
        mixture.fit(found @ axes)
    return FisherVectors(
        mean,
        axes,
        mixture.weights_.astype(np.float32),
        mixture.means_.astype(np.float32),
        np.sqrt(mixture.covariances_).astype(np.float32),
        stride,
    )


def dense_sift(image: jax.Array, cell: int, step: int) -> jax.Array:
    """Return SIFT descriptors of a grid of upright patches, 4 x 4 cells with 8 directions each.

    Args:
        image: float32[H, W], grey levels.
        cell: side of a cell in pixels.
        step: pixels between patches; the first one touches the corner.

    Returns:
        float32[rows, cols, 128], of unit length, or zero where the patch is flat. Cells stand row
        by row; directions begin with that of rising x and turn towards that of rising y.
    """
    down, right = jnp.gradient(image)
    # A gradient counts for the two nearest of eight directions.
    turn = jnp.arctan2(down, right)[..., None] * (8 / (2 * jnp.pi)) - jnp.arange(8)
    apart = jnp.abs((turn + 4) % 8 - 4)
    maps = jnp.hypot(down, right)[..., None] * jnp.maximum(1 - apart, 0)
    tall, wide = (_cells(side, cell, step) for side in image.shape)
    x = jnp.einsum("hwo,rih,cjw->rcijo", maps, tall, wide, precision=EXACT)
    x = x.reshape(*x.shape[:2], 128)
    return unit_vectors(jnp.minimum(unit_vectors(x), 0.2))


def _cells(side: int, cell: int, step: int) -> np.ndarray:
    """Return float32[patches, 4, side]: the weights of pixels in the cells along one axis."""
    first = np.arange(0, side - 4 * cell + 1, step)
    centre = first[:, None] + cell * (np.arange(4) + 0.5) - 0.5
    near = np.maximum(1 - np.abs(np.arange(side) - centre[..., None]) / cell, 0)
    window = np.exp(-np.square(np.arange(4) - 1.5) / (2 * 2**2))  # deviation: half a patch
    return (near * window[:, None]).astype(np.float32)


def _descriptors(image: jax.Array, stride: int) -> jax.Array:
    """Return float32[T, 128] of an image [H, W, 3] at all scales that fit."""
    grey = jnp.matmul(image.astype(jnp.float32), jnp.array([0.299, 0.587, 0.114]), precision=EXACT)
    cells = [stride * cell for cell in _CELLS if 4 * stride * cell <= min(grey.shape)]
    found = (dense_sift(grey, cell, stride * _STEP) for cell in cells)
    return jnp.concatenate([x.reshape(-1, 128) for x in found])


def _sample(batches: Iterable[np.ndarray], stride: int, seed: int) -> np.ndarray:
    """Return float32[n, 128], random descriptors of the first images."""
    key, seen, parts = counter_random.stream(seed), 0, [np.zeros((0, 128), np.float32)]
    for images in first_images(batches, _TOGETHER):
        _check(images, stride)
        found = np.asarray(_all_descriptors(padded_rows(images, _TOGETHER), stride))
        numbers = np.arange(seen, seen + len(images))
        draws = counter_random.uniform(key, numbers, _PER_IMAGE).reshape(-1, _PER_IMAGE)
        picked = (draws * found.shape[1]).astype(np.int64)
        parts.append(found[np.arange(len(images))[:, None], picked].reshape(-1, 128))
        seen += len(images)
        if seen * _PER_IMAGE >= _MOST:
            break
    return np.concatenate(parts)


def _check(images: np.ndarray | jax.Array, stride: int) -> None:
    side = 4 * stride * min(_CELLS)
    check_images(images, side, what="sift", advice="; raise data.image_size")


@functools.partial(jax.jit, static_argnames="stride")
def _all_descriptors(images: jax.Array, stride: int) -> jax.Array:
    return jax.vmap(lambda image: _descriptors(image, stride))(images)


@jax.jit
def _describe(fisher: FisherVectors, images: jax.Array) -> jax.Array:
    """Return the improved Fisher vectors of images: means, then variances, [B, 2 K D]."""
    product = functools.partial(jnp.matmul, precision=EXACT)
    centres, precision = fisher.centres, 1 / jnp.square(fisher.deviations)
    constant = jnp.sum(jnp.log(precision) - jnp.square(centres) * precision, axis=1) / 2
    constant += jnp.log(fisher.weights)

    def one(image: jax.Array) -> jax.Array:
        x = product(_descriptors(image, fisher.stride) - fisher.mean, fisher.axes)
        away = product(jnp.square(x) / 2, precision.T) - product(x, (centres * precision).T)
        owner = jax.nn.softmax(constant - away, axis=1)  # [T, K]
        count = jnp.sum(owner, axis=0)[:, None]
        first, second = product(owner.T, x), product(owner.T, jnp.square(x))
        means = (first - count * centres) / fisher.deviations
        spread = second - 2 * centres * first + count * jnp.square(centres)
        root = jnp.sqrt(fisher.weights)[:, None] * len(x)
        blocks = means / root, (spread * precision - count) / (root * 2**0.5)
        vector = jnp.concatenate([block.reshape(-1) for block in blocks])
        return unit_vectors(jnp.sign(vector) * jnp.sqrt(jnp.abs(vector)))

    return jax.lax.map(one, images, batch_size=_TOGETHER)
