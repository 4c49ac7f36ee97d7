"""The sparse manifold transform (Chen, Yun, Ma, Olshausen and LeCun, ICLR 2023).

Patches are coded by which of many atoms they resemble, and the codes are embedded linearly so that
patches near each other lie close together: a spectral embedding in closed form, after one pass over
the images. There is no network and no gradient. Published with 8,192 atoms and all 50,000 images of
CIFAR-10: 81.1 % by kNN.

What differs from the source: atoms are random patches, where it learns them or thins similar ones
out; neighbours are patches in the same one of 3 x 3 cells of an image, where it takes those within
a distance; images are not mirrored; the embeddings are averaged over a grid of 4 x 4; few atoms
have fewer dimensions.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
import scipy.sparse

from nat_jax.errors import InputError
from nat_jax.evaluate.baselines.codebooks import EXACT, gram
from nat_jax.evaluate.baselines.patches import (
    check_images,
    first_images,
    sample,
    unit_vectors,
    window_counts,
    windows,
    zca,
)
from nat_jax.evaluate.features import padded_rows
from nat_jax.models.pooling import pool

_COSINE = 0.3  # atoms whose cosine with a whitened patch is at least this are active
_SLOWEST = 16  # dimensions left out: kNN is better without the slowest ones
_DIMENSIONS = 384  # at most; a quarter of the atoms otherwise
_CELLS = 3  # a side: patches in one of 3 x 3 cells of an image are neighbours
_GRID = 4  # of what describes an image
_WHITENING_FLOOR = 1e-3  # added to the patches' covariance, in mean eigenvalues
_CODE_FLOOR = 1e-3  # added to the codes' covariance, in mean eigenvalues
_COSINES = 1 << 24  # cosines held at a time
_TOGETHER = 64  # images coded for one product on the host


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Coder:
    """From patches to the atoms that they resemble.

    Attributes:
        mean: float32[d] of the patches, d = 3 size^2; an image's mean colour is taken off before.
        whitener: float32[d, d], symmetric.
        atoms: float32[K, d], unit vectors in whitened space.
        size: side of a patch in pixels.
        stride: pixels between the windows of an image.
    """

    mean: np.ndarray
    whitener: np.ndarray
    atoms: np.ndarray
    size: int = dataclasses.field(metadata={"static": True})
    stride: int = dataclasses.field(metadata={"static": True})

    def __call__(self, image: jax.Array) -> jax.Array:
        """Return bool[rows, cols, K] of an image [H, W, 3], at least one true in a row."""
        patches = windows(_centred(image), self.size, self.stride)
        white = jnp.matmul(patches - self.mean, self.whitener, precision=EXACT)
        cosine = jnp.matmul(unit_vectors(white), self.atoms.T, precision=EXACT)
        return cosine >= jnp.minimum(_COSINE, jnp.max(cosine, axis=-1, keepdims=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SparseManifold:
    """What was learned; call it with images.

    Attributes:
        coder: from patches to codes.
        projection: float32[K, m], from codes to their embedding.
        offset: float32[m], the embedding of the mean code.
    """

    coder: Coder
    projection: np.ndarray
    offset: np.ndarray

    def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Describe images.

        Args:
            images: uint8[B, H, W, 3] of at least `size` pixels a side.

        Returns:
            float32[B, 16 m], a unit vector for each cell of a 4 x 4 grid.

        Raises:
            InputError: the images are smaller than a patch.
        """
        check_images(images, self.coder.size)
        return _describe(self, jnp.asarray(images), _at_a_time(self.coder, images))


def learn_sparse_manifold(
    batches: Iterable[np.ndarray],
    atoms: int = 8192,
    *,
    size: int = 6,
    stride: int = 1,
    seed: int = 0,
) -> SparseManifold:
    """Learn the transform from images.

    Codes a of patches have covariance V, their means over cells of images covariance C. P maximises
    tr(P C P^T) where P V P^T = 1: patches of one cell come as close as whitened codes can. Its
    rows are the leading generalised eigenvectors of C against V, without the first 16. An embedded
    patch P (a - mean) is scaled to unit length.

    Memory is that of a few K x K matrices in float64 (0.5 GiB each for 8,192 atoms); the products
    of sparse codes and the eigenvectors are computed on the host.

    Args:
        batches: uint8[B, H, W, 3] each, read twice: not a generator. The first 50,000 images count.
        atoms: K.
        size: side of a patch in pixels.
        stride: pixels between the windows of an image.
        seed: of the patches that the whitening is learned from and that become atoms.

    Raises:
        InputError: fewer than 128 atoms, images that are smaller than a patch, or too few.
    """
    if atoms < 128:
        raise InputError(f"smt: atoms: expected at least 128, got {atoms}")
    patches = sample((np.asarray(_centred(b)) for b in batches), size, seed)
    if len(patches) < atoms:
        raise InputError(
            f"smt: expected at least {atoms} patches for {atoms} atoms, got {len(patches)}; give "
            "more images, or fewer atoms"
        )
    patches = patches.reshape(len(patches), -1)
    variance = float(patches.var(axis=0).mean())
    if not variance:
        raise InputError("smt: expected images that are not flat, got flat ones alone")
    mean, whitener = zca(patches, _WHITENING_FLOOR * variance)
    chosen = np.random.default_rng(seed).choice(len(patches), atoms, replace=False)
    white = jnp.matmul(patches[np.sort(chosen)] - mean, whitener, precision=EXACT)
    coder = Coder(mean, whitener, np.asarray(unit_vectors(white)), size, stride)
    average, within, between = _moments(coder, batches)
    projection = _embedding(within, between)
    return SparseManifold(
        coder,
        projection.astype(np.float32),
        (average @ projection).astype(np.float32),
    )


def _moments(
    coder: Coder, batches: Iterable[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean [K] of codes, their covariance [K, K], and that of their means by cell."""
    count = len(coder.atoms)
    total, patches = np.zeros(count), 0
    within, between = np.zeros((count, count)), np.zeros((count, count))
    for images in first_images(batches, _TOGETHER):
        padded = padded_rows(images, _TOGETHER)
        codes = np.asarray(_codes(coder, padded, _at_a_time(coder, padded)))[: len(images)]
        image, row, col = np.indices(codes.shape[:3])
        cell = (row * _CELLS // codes.shape[1]) * _CELLS + col * _CELLS // codes.shape[2]
        cell = (image * _CELLS**2 + cell).reshape(-1)
        patch, atom = np.nonzero(codes.reshape(-1, count))
        ones, cells = np.ones(len(patch), np.float32), _TOGETHER * _CELLS**2
        active = scipy.sparse.csr_array((ones, (patch, atom)), (len(cell), count))
        within += (active.T @ active).toarray()
        # The sums over cells: entries of one cell and atom are added up.
        sums = scipy.sparse.csr_array((ones, (cell[patch], atom)), (cells, count)).toarray()
        members = np.bincount(cell, minlength=cells)[:, None].astype(np.float32)
        between += np.asarray(gram(sums / np.sqrt(np.maximum(members, 1))))
        total, patches = total + sums.sum(axis=0, dtype=np.float64), patches + len(cell)
    average = total / patches
    outer = np.outer(average, average)
    return average, within / patches - outer, between / patches - outer


def _embedding(within: np.ndarray, between: np.ndarray) -> np.ndarray:
    """Return float64[K, m], leading generalised eigenvectors, the first of them left out."""
    count = len(within)
    within = within + _CODE_FLOOR * np.trace(within) / count * np.eye(count)
    dimensions = min(_DIMENSIONS, count // 4)
    last = count - 1 - min(_SLOWEST, count // 64)
    factor = np.linalg.cholesky(within)
    half = scipy.linalg.solve_triangular(factor, between, lower=True)
    ratio = scipy.linalg.solve_triangular(factor, half.T, lower=True)
    _, vectors = scipy.linalg.eigh(
        (ratio + ratio.T) / 2, subset_by_index=(last - dimensions + 1, last)
    )
    return scipy.linalg.solve_triangular(factor.T, vectors[:, ::-1], lower=False)


@functools.partial(jax.jit, static_argnames="most")
def _codes(coder: Coder, images: jax.Array, most: int) -> jax.Array:
    """Return bool[B, rows, cols, K] of images, coded `most` at a time."""
    return jax.lax.map(coder, images, batch_size=most)


@functools.partial(jax.jit, static_argnames="most")
def _describe(manifold: SparseManifold, images: jax.Array, most: int) -> jax.Array:
    """Describe images [B, H, W, 3], `most` at a time."""

    def one(image: jax.Array) -> jax.Array:
        codes = manifold.coder(image).astype(jnp.float32)
        embedded = jnp.matmul(codes, manifold.projection, precision=EXACT) - manifold.offset
        cells = pool(unit_vectors(embedded)[None], _GRID**2 * embedded.shape[-1])
        return unit_vectors(cells).reshape(-1)

    return jax.lax.map(one, images, batch_size=most)


def _at_a_time(coder: Coder, images: np.ndarray | jax.Array) -> int:
    rows, cols = window_counts(images.shape[1:3], coder.size, coder.stride)
    return max(1, _COSINES // (rows * cols * len(coder.atoms)))


def _centred(images: np.ndarray | jax.Array) -> jax.Array:
    """Return grey levels [..., H, W, 3] as float32 around the mean colour of each image."""
    x = jnp.asarray(images, jnp.float32)
    return x - jnp.mean(x, axis=(-3, -2), keepdims=True)
