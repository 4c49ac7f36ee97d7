"""Features without any deep learning: whitened k-means patches (Coates, Ng and Lee, AISTATS 2011).

A dictionary of small patches is learned from random ones, which are normalised for brightness and
contrast, whitened, and clustered by k-means. An image is described by how much closer than average
each of its patches lies to each centroid, summed over its four quadrants. Probes on these features
are the bar that features of a network without labels have to clear.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.errors import InputError
from nat_jax.input import counter_random

_CONTRAST_FLOOR = 10.0  # added to the variance of a patch, in grey levels squared
_WHITENING_FLOOR = 0.1  # added to the eigenvalues of the normalised patches' covariance
_PER_IMAGE, _MOST_PATCHES = 8, 400_000  # drawn of each image, and in all
_ROWS = 8192  # patches whose distances to all centroids are held at a time
_WINDOWS = 4096  # about as many windows of images at a time
_EXACT = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PatchDictionary:
    """What was learned from patches; call it with images.

    Attributes:
        mean: float32[d] of the normalised patches, d = 3 size^2.
        whitener: float32[d, d], symmetric.
        centroids: float32[K, d] in whitened space.
        size: side of a patch in pixels.
        stride: pixels between the windows of an image.
    """

    mean: np.ndarray
    whitener: np.ndarray
    centroids: np.ndarray
    size: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})

    def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Describe images.

        Args:
            images: uint8[B, H, W, 3] of at least `size` pixels a side.

        Returns:
            float32[B, 4 K], never negative.

        Raises:
            InputError: the images are smaller than a patch.
        """
        _check_images(images, self.size)
        windows = [(side - self.size) // self.stride + 1 for side in images.shape[1:3]]
        most = max(1, _WINDOWS // (windows[0] * windows[1]))
        return _describe(self, jnp.asarray(images), most)


def learn_patches(
    batches: Iterable[np.ndarray],
    *,
    centroids: int = 1600,
    size: int = 6,
    stride: int = 1,
    iterations: int = 50,
    seed: int = 0,
) -> PatchDictionary:
    """Learn a dictionary from random patches of images.

    Published: 1,600 centroids (4,000 at best) from 400,000 patches of 6 pixels in CIFAR-10, eight
    of each image; contrast normalised by the deviation of variance + 10, ZCA whitening with 0.1
    added to the eigenvalues. What is drawn does not depend on how images are batched.

    Args:
        batches: uint8[B, H, W, 3] each; one array in a list will do.
        centroids: K.
        size: side of a patch in pixels.
        stride: pixels between the windows of an image that is described; 1 is published, larger
            ones suit larger images.
        iterations: of k-means at most; it stops when no patch changes its centroid.
        seed: of the patches and the first centroids.

    Raises:
        InputError: an option below 1, images that are smaller than a patch, or too few patches.
    """
    options = {"centroids": centroids, "size": size, "stride": stride, "iterations": iterations}
    for name, value in options.items():
        if value < 1:
            raise InputError(f"patches: {name}: expected at least 1, got {value}")
    patches = _sample(batches, size, seed)
    if len(patches) < 2 * centroids:
        raise InputError(
            f"patches: expected at least {2 * centroids} patches for {centroids} centroids, got "
            f"{len(patches)}; give more images, or fewer centroids"
        )
    normal = np.asarray(_normalised(patches.reshape(len(patches), -1)))
    mean, whitener = _zca(normal)
    white = np.asarray(jnp.matmul(normal - mean, whitener, precision=_EXACT))
    return PatchDictionary(
        mean, whitener, k_means(white, centroids, iterations, seed), size, stride
    )


def k_means(points: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """Cluster points by Lloyd's iterations from random ones.

    A centroid that loses all its points moves to the point that is farthest from its own.

    Args:
        points: float32[N, d].
        count: K <= N.
        iterations: at most; stops when no point changes its centroid.
        seed: of the first centroids.

    Returns:
        float32[K, d].
    """
    chosen = np.random.default_rng(seed).choice(len(points), count, replace=False)
    centroids = points[np.sort(chosen)]
    owner = np.full(len(points), -1)
    for _ in range(iterations):
        before, (owner, distance) = owner, nearest_centroid(points, centroids)
        if np.array_equal(before, owner):
            break
        members = np.bincount(owner, minlength=count)
        sums = np.stack([np.bincount(owner, column, count) for column in points.T], axis=1)
        centroids = (sums / np.maximum(members, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(members == 0)
        if len(empty):
            centroids[empty] = points[np.argsort(-distance, kind="stable")[: len(empty)]]
    return centroids


def nearest_centroid(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int32[N], each point's nearest centroid (ties: the first), and float32[N], how far."""
    parts = []
    for start in range(0, len(points), _ROWS):
        part = points[start : start + _ROWS]
        padding = np.zeros((min(_ROWS, len(points)) - len(part), points.shape[1]), np.float32)
        index, distance = _nearest(np.concatenate([part, padding]), centroids)
        parts.append((np.asarray(index)[: len(part)], np.asarray(distance)[: len(part)]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore


def _check_images(images: np.ndarray | jax.Array, size: int) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < size:
        raise InputError(
            f"patches: expected images [B, H, W, 3] of at least {size} pixels a side, got shape "
            f"{images.shape}"
        )


def _sample(batches: Iterable[np.ndarray], size: int, seed: int) -> np.ndarray:
    """Return uint8[n, size, size, 3], random patches of the first images."""
    key, seen = counter_random.stream(seed), 0
    parts: list[np.ndarray] = [np.zeros((0, size, size, 3), np.uint8)]
    for images in batches:
        if seen * _PER_IMAGE >= _MOST_PATCHES:
            break
        _check_images(images, size)
        numbers = np.arange(seen, seen + len(images))
        seen += len(images)
        draws = counter_random.uniform(key, numbers, 2 * _PER_IMAGE).reshape(-1, _PER_IMAGE, 2)
        room = np.array(images.shape[1:3]) - size + 1
        top, left = np.moveaxis((draws * room).astype(np.int64), 2, 0)
        windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
        picked = windows[np.arange(len(images))[:, None], top, left]  # [B, _PER_IMAGE, 3, s, s]
        parts.append(np.moveaxis(picked, 2, -1).reshape(-1, size, size, 3))
    return np.concatenate(parts)[:_MOST_PATCHES]


@jax.jit
def _normalised(patches: jax.Array) -> jax.Array:
    """Return float32[n, d] of zero mean and about unit deviation each, of grey levels [n, d]."""
    x = patches.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(x), axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return x * jax.lax.rsqrt(variance + _CONTRAST_FLOOR)


def _zca(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [d] and the symmetric whitener [d, d] of patches [n, d]."""
    mean = patches.mean(axis=0, dtype=np.float64)
    away = patches - mean
    values, vectors = np.linalg.eigh(away.T @ away / len(patches))
    whitener = (vectors / np.sqrt(values + _WHITENING_FLOOR)) @ vectors.T
    return mean.astype(np.float32), whitener.astype(np.float32)


@jax.jit
def _nearest(points: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    squares = _square_distances(points, centroids)
    index = jnp.argmin(squares, axis=1).astype(jnp.int32)
    return index, jnp.sqrt(jnp.min(squares, axis=1))


def _square_distances(points: jax.Array, centroids: np.ndarray | jax.Array) -> jax.Array:
    """Return float32[..., K], never negative, of points [..., d]."""
    products = jnp.matmul(points, centroids.T, precision=_EXACT)
    own = jnp.sum(jnp.square(points), axis=-1, keepdims=True)
    return jnp.maximum(own - 2 * products + jnp.sum(jnp.square(centroids), axis=1), 0.0)


@functools.partial(jax.jit, static_argnames="most")
def _describe(dictionary: PatchDictionary, images: jax.Array, most: int) -> jax.Array:
    """Describe images [B, H, W, 3], `most` at a time."""
    size, stride = dictionary.size, dictionary.stride

    def one(image: jax.Array) -> jax.Array:
        rows, cols = ((side - size) // stride + 1 for side in image.shape[:2])
        high, wide = (stride * (count - 1) + 1 for count in (rows, cols))
        pixels = [
            image[i : i + high : stride, j : j + wide : stride]
            for i in range(size)
            for j in range(size)
        ]
        patches = jnp.concatenate(pixels, axis=-1)  # [rows, cols, size * size * 3]
        centred = _normalised(patches) - dictionary.mean
        white = jnp.matmul(centred, dictionary.whitener, precision=_EXACT)
        distance = jnp.sqrt(_square_distances(white, dictionary.centroids))
        nearness = jnp.maximum(jnp.mean(distance, axis=-1, keepdims=True) - distance, 0.0)
        row, col = (rows + 1) // 2, (cols + 1) // 2
        quadrants = (
            part for half in jnp.split(nearness, [row]) for part in jnp.split(half, [col], axis=1)
        )
        return jnp.concatenate([jnp.sum(part, axis=(0, 1)) for part in quadrants])

    return jax.lax.map(one, images, batch_size=most)
