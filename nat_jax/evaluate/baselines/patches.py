"""Features without any deep learning: whitened k-means patches (Coates, Ng and Lee, AISTATS 2011).

A dictionary of small patches is learned from random ones, which are normalised for brightness and
contrast, whitened, and clustered by k-means. An image is described by how much closer than average
each of its patches lies to each centroid, summed over its four quadrants. Probes on these features
are the bar that features of a network without labels have to clear.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.errors import InputError
from nat_jax.evaluate.baselines.codebooks import EXACT, Codebook, k_means, square_distances
from nat_jax.input import counter_random

_CONTRAST_FLOOR = 10.0  # added to the variance of a patch, in grey levels squared
_WHITENING_FLOOR = 0.1  # added to the eigenvalues of the normalised patches' covariance
_PER_IMAGE, _MOST_IMAGES = 8, 50_000  # patches drawn of an image, and images that count
_WINDOWS = 4096  # about as many windows of images at a time


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
        check_images(images, self.size)
        rows, cols = window_counts(images.shape[1:3], self.size, self.stride)
        most = max(1, _WINDOWS // (rows * cols))
        return _describe(self, jnp.asarray(images), most)


def learn_patches(
    batches: Iterable[np.ndarray],
    centroids: int = 1600,
    *,
    size: int = 6,
    stride: int = 1,
    iterations: int = 50,
    seed: int = 0,
    codebook: Codebook = k_means,
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
        iterations: of the codebook; k-means stops when no patch changes its centroid.
        seed: of the patches and the first centroids.
        codebook: finds the centroids among the whitened patches.

    Raises:
        InputError: an option below 1, images that are smaller than a patch, or too few patches.
    """
    options = {"centroids": centroids, "size": size, "stride": stride, "iterations": iterations}
    for name, value in options.items():
        if value < 1:
            raise InputError(f"patches: {name}: expected at least 1, got {value}")
    patches = sample(batches, size, seed)
    if len(patches) < 2 * centroids:
        raise InputError(
            f"patches: expected at least {2 * centroids} patches for {centroids} centroids, got "
            f"{len(patches)}; give more images, or fewer centroids"
        )
    normal = np.asarray(_normalised(patches.reshape(len(patches), -1)))
    mean, whitener = zca(normal, _WHITENING_FLOOR)
    white = np.asarray(jnp.matmul(normal - mean, whitener, precision=EXACT))
    return PatchDictionary(
        mean, whitener, codebook(white, centroids, iterations, seed), size, stride
    )


def check_images(
    images: np.ndarray | jax.Array, size: int, *, what: str = "patches", advice: str = ""
) -> None:
    """Raise InputError where images are smaller than `size`; `advice` ends the message."""
    if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < size:
        raise InputError(
            f"{what}: expected images [B, H, W, 3] of at least {size} pixels a side, got shape "
            f"{images.shape}{advice}"
        )


def first_images(batches: Iterable[np.ndarray], together: int) -> Iterator[np.ndarray]:
    """Yield the first 50,000 images of batches, at most `together` at a time."""
    left = _MOST_IMAGES
    for batch in batches:
        for start in range(0, min(left, len(batch)), together):
            yield batch[start : min(left, start + together)]
        left -= len(batch)
        if left <= 0:
            return


def sample(batches: Iterable[np.ndarray], size: int, seed: int) -> np.ndarray:
    """Return [n, size, size, 3], eight random patches of each of the first 50,000 images."""
    key, seen = counter_random.stream(seed), 0
    parts: list[np.ndarray] = [np.zeros((0, size, size, 3), np.uint8)]
    for images in first_images(batches, _MOST_IMAGES):
        check_images(images, size)
        numbers = np.arange(seen, seen + len(images))
        seen += len(images)
        draws = counter_random.uniform(key, numbers, 2 * _PER_IMAGE).reshape(-1, _PER_IMAGE, 2)
        room = np.array(images.shape[1:3]) - size + 1
        top, left = np.moveaxis((draws * room).astype(np.int64), 2, 0)
        view = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
        picked = view[np.arange(len(images))[:, None], top, left]  # [B, _PER_IMAGE, 3, s, s]
        parts.append(np.moveaxis(picked, 2, -1).reshape(-1, size, size, 3))
    return np.concatenate(parts)


def window_counts(sides: Sequence[int], size: int, stride: int) -> tuple[int, int]:
    """Return how many windows fit into an image of some height and width: rows and columns."""
    height, width = sides
    return (height - size) // stride + 1, (width - size) // stride + 1


def windows(image: jax.Array, size: int, stride: int) -> jax.Array:
    """Return all patches of an image [H, W, 3], one in a row: [rows, cols, 3 size^2]."""
    rows, cols = window_counts(image.shape[:2], size, stride)
    high, wide = (stride * (count - 1) + 1 for count in (rows, cols))
    pixels = [
        image[i : i + high : stride, j : j + wide : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(pixels, axis=-1)


def unit_vectors(x: jax.Array) -> jax.Array:
    """Scale vectors [..., n] to unit length; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


@jax.jit
def _normalised(patches: jax.Array) -> jax.Array:
    """Return float32[n, d] of zero mean and about unit deviation each, of grey levels [n, d]."""
    x = patches.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.sum(jnp.square(x), axis=-1, keepdims=True) / (x.shape[-1] - 1)
    return x * jax.lax.rsqrt(variance + _CONTRAST_FLOOR)


def zca(patches: np.ndarray, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [d] and the symmetric whitener [d, d] of patches [n, d].

    `floor` is added to the eigenvalues of their covariance.
    """
    mean = patches.mean(axis=0, dtype=np.float64)
    away = patches - mean
    values, vectors = np.linalg.eigh(away.T @ away / len(patches))
    whitener = (vectors / np.sqrt(values + floor)) @ vectors.T
    return mean.astype(np.float32), whitener.astype(np.float32)


@functools.partial(jax.jit, static_argnames="most")
def _describe(dictionary: PatchDictionary, images: jax.Array, most: int) -> jax.Array:
    """Describe images [B, H, W, 3], `most` at a time."""
    size, stride = dictionary.size, dictionary.stride

    def one(image: jax.Array) -> jax.Array:
        patches = windows(image, size, stride)
        rows, cols = patches.shape[:2]
        centred = _normalised(patches) - dictionary.mean
        white = jnp.matmul(centred, dictionary.whitener, precision=EXACT)
        distance = jnp.sqrt(square_distances(white, dictionary.centroids))
        nearness = jnp.maximum(jnp.mean(distance, axis=-1, keepdims=True) - distance, 0.0)
        row, col = (rows + 1) // 2, (cols + 1) // 2
        quadrants = (
            part for half in jnp.split(nearness, [row]) for part in jnp.split(half, [col], axis=1)
        )
        return jnp.concatenate([jnp.sum(part, axis=(0, 1)) for part in quadrants])

    return jax.lax.map(one, images, batch_size=most)
