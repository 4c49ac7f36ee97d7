"""DIFFRAC: discriminative clustering (Bach and Harchaoui, NIPS 2007) on features of patches.

Images are put into clusters of equal sizes such that ridge regression predicts the clusters from
features as well as possible. The features are those of 400 k-means patches.

What differs from the source: it solves a convex relaxation over all partitions, with bounds on the
sizes of clusters, and rounds its leading eigenvectors by k-means. At thousands of images this
rounds the eigenvectors of the unconstrained relaxation, which are the features' principal
components, and then alternates: fit the regression, assign images to clusters. Sizes are equal in
each block of 1,024 random images. The result is a local optimum.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.errors import InputError
from nat_jax.evaluate.baselines.codebooks import (
    EXACT,
    gram,
    k_means,
    nearest_centroid,
    sums_by_owner,
)
from nat_jax.evaluate.baselines.patches import PatchDictionary, first_images, learn_patches
from nat_jax.evaluate.features import inverse_deviation, padded_rows

_PENALTY = 1.0  # kappa, in variances of a feature
_BLOCK = 1024  # images assigned together
_TOGETHER = 256  # images described at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Diffrac:
    """What was learned; call it with images.

    Attributes:
        dictionary: describes images by patches.
        kernel: float32[F, K], from these features to predictions of the clusters.
        bias: float32[K].
        cluster: int[N], of each image that it was learned from.
    """

    dictionary: PatchDictionary
    kernel: np.ndarray
    bias: np.ndarray
    cluster: np.ndarray

    def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Return the predictions of the clusters, float32[B, K], of images uint8[B, H, W, 3]."""
        return _predicted(self.dictionary(images), self.kernel, self.bias)


def learn_diffrac(
    batches: Iterable[np.ndarray],
    clusters: int = 100,
    *,
    patches: int = 400,
    stride: int = 1,
    rounds: int = 20,
    seed: int = 0,
) -> Diffrac:
    """Cluster images and return the regression that predicts their clusters.

    Minimises ``mean |x W + b - y|^2 + kappa |W|^2`` over W, b and the indicators y of clusters of
    equal sizes, x being standardised features and kappa 1. Memory is that of the features of all
    images and their covariance.

    Args:
        batches: uint8[B, H, W, 3] each, read twice: not a generator. The first 50,000 images count.
        clusters: K.
        patches: number of the k-means patches that describe the images.
        stride: pixels between the windows of an image.
        rounds: of regression and assignment at most; stops when no image changes its cluster.
        seed: of the patches, the first clusters and the blocks.

    Raises:
        InputError: fewer than 2 clusters, fewer images than clusters, equal images, or what
            `learn_patches` rejects.
    """
    if clusters < 2:
        raise InputError(f"diffrac: clusters: expected at least 2, got {clusters}")
    dictionary = learn_patches(batches, patches, stride=stride, seed=seed)
    parts = [
        np.asarray(dictionary(padded_rows(images, _TOGETHER)))[: len(images)]
        for images in first_images(batches, _TOGETHER)
    ]
    x = np.concatenate(parts)
    if len(x) < clusters:
        raise InputError(
            f"diffrac: expected at least {clusters} images for {clusters} clusters, got {len(x)}"
        )
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x -= mean
    scale = np.asarray(inverse_deviation(mean, np.square(x).mean(axis=0)))
    x *= scale
    variance, axes = np.linalg.eigh(np.asarray(gram(x), np.float64) / len(x))
    # In these coordinates of unit variance, the first ones vary most, and ridge is a product.
    kept = variance[::-1] > 1e-6
    if not kept.any():
        raise InputError("diffrac: expected images that differ, got equal ones")
    variance, axes = variance[::-1][kept], axes[:, ::-1][:, kept]
    to_axes = (axes / np.sqrt(variance)).astype(np.float32)
    x = np.asarray(jnp.matmul(x, to_axes, precision=EXACT))
    cluster = _assigned(x, variance, clusters, rounds, seed)
    share = np.bincount(cluster, minlength=clusters) / len(x)
    kernel = (scale[:, None] * to_axes) @ _ridge(x, variance, cluster, clusters)
    return Diffrac(dictionary, kernel, (share - mean @ kernel).astype(np.float32), cluster)


def _assigned(
    x: np.ndarray, variance: np.ndarray, clusters: int, rounds: int, seed: int
) -> np.ndarray:
    """Return the cluster of each row, int[N]."""
    leading = np.ascontiguousarray(x[:, :clusters])
    cluster = nearest_centroid(leading, k_means(leading, clusters, rounds, seed))[0]
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    for _ in range(rounds):
        before = cluster
        kernel = _ridge(x, variance, cluster, clusters)
        cluster = _of_equal_sizes(np.asarray(jnp.matmul(x, kernel, precision=EXACT)), order)
        if np.array_equal(before, cluster):
            break
    return cluster


def _ridge(x: np.ndarray, variance: np.ndarray, cluster: np.ndarray, clusters: int) -> np.ndarray:
    """Return the kernel float32[F, K] that predicts the clusters, from x of unit covariance."""
    _, sums = sums_by_owner(x, cluster, clusters)
    shrunk = variance / (variance + _PENALTY)
    return (shrunk[:, None] * sums.T / len(x)).astype(np.float32)


def _of_equal_sizes(scores: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return clusters int[N] of the largest total score [N, K], of equal sizes block by block."""
    from scipy.optimize import linear_sum_assignment  # takes long to import

    cluster = np.empty(len(scores), np.int64)
    count = scores.shape[1]
    for start in range(0, len(order), _BLOCK):
        rows = order[start : start + _BLOCK]
        each = -(-len(rows) // count)
        _, column = linear_sum_assignment(-np.repeat(scores[rows], each, axis=1))
        cluster[rows] = column // each
    return cluster


@jax.jit
def _predicted(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=EXACT) + bias
