"""Codebooks of points: k-means, the self-organising map and neural gas.

Each function has the same arguments and returns the same number of units, so that features which
differ in the codebook alone can be compared. Width of the neighbourhood 0 turns the latter two into
k-means; the wide ones at the start leave fewer units without points.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.evaluate.features import padded_rows

# (points float32[N, d], count K <= N, iterations, seed of the first units) -> float32[K, d]
Codebook = Callable[[np.ndarray, int, int, int], np.ndarray]

ROWS = 8192  # points whose distances to all units are held at a time
EXACT = jax.lax.Precision.HIGHEST

_MAP_END = 0.5  # last width of the neighbourhood on the map, in units
_GAS_START, _GAS_END = 10.0, 0.01  # first and last decay of weights, in ranks
_GAS_RANKS = 128  # units that a point moves: exp(-128 / 10) is nothing


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
    centroids = _first(points, count, seed)
    owner = np.full(len(points), -1)
    for _ in range(iterations):
        before, (owner, distance) = owner, nearest_centroid(points, centroids)
        if np.array_equal(before, owner):
            break
        members, sums = sums_by_owner(points, owner, count)
        centroids = (sums / np.maximum(members, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(members == 0)
        if len(empty):
            centroids[empty] = points[np.argsort(-distance, kind="stable")[: len(empty)]]
    return centroids


def self_organising_map(points: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """Fit a self-organising map (Kohonen, 1982) by its batch iterations.

    The units lie on a lattice that is about as wide as high. An iteration assigns each point to the
    nearest unit and moves every unit to the mean of all points, weighted by exp(-r^2 / 2 s^2), r
    being the distance on the lattice to the point's unit. The width s falls geometrically from half
    the lattice's side to half a unit. The on-line form of the source moves the units after each
    point, at a rate that falls; the batch form has no rate.

    Args:
        points: float32[N, d].
        count: K <= N; unit i lies at row i // w and column i % w, w = ceil(sqrt(K)).
        iterations: all are done.
        seed: of the first units, which are random points.

    Returns:
        float32[K, d].
    """
    units = _first(points, count, seed)
    side = int(np.ceil(np.sqrt(count)))
    place = np.stack(np.divmod(np.arange(count), side), axis=1).astype(np.float64)
    apart = np.square(place[:, None] - place).sum(axis=2)
    for width in np.geomspace(max(side / 2, _MAP_END), _MAP_END, iterations):
        owner, _ = nearest_centroid(points, units)
        members, sums = sums_by_owner(points, owner, count)
        near = np.exp(-apart / (2 * width**2))
        weight = near @ members
        reached = weight > 1e-12  # a unit that is too far from all others' points stays
        units[reached] = ((near @ sums)[reached] / weight[reached, None]).astype(np.float32)
    return units


def neural_gas(points: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """Fit neural gas (Martinetz and Schulten, 1991) by batch iterations (Cottrell et al., 2006).

    An iteration moves every unit to the mean of all points, weighted by exp(-k / l), k being the
    rank of the unit among all, by distance from the point. The decay l falls geometrically from 10
    to 0.01, as in the source, whose on-line form moves the units after each point. The weights of
    ranks from 128, below exp(-12), are left out.

    Args:
        points: float32[N, d].
        count: K <= N.
        iterations: all are done.
        seed: of the first units, which are random points.

    Returns:
        float32[K, d].
    """
    units = _first(points, count, seed)
    for decay in np.geomspace(_GAS_START, _GAS_END, iterations):
        weight, sums = np.zeros(count), np.zeros(units.shape)
        for part in range(0, len(points), ROWS):
            rows = points[part : part + ROWS]
            padded = padded_rows(rows, min(ROWS, len(points)))
            near, moved = _ranked_sums(padded, len(rows), units, np.float32(decay))
            weight += np.asarray(near, np.float64)
            sums += np.asarray(moved, np.float64)
        reached = weight > 1e-12
        units[reached] = (sums[reached] / weight[reached, None]).astype(np.float32)
    return units


def nearest_centroid(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return int32[N], each point's nearest centroid (ties: the first), and float32[N], how far."""
    parts = []
    for start in range(0, len(points), ROWS):
        part = points[start : start + ROWS]
        index, distance = _nearest(padded_rows(part, min(ROWS, len(points))), centroids)
        parts.append((np.asarray(index)[: len(part)], np.asarray(distance)[: len(part)]))
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))  # type: ignore


@jax.jit
def gram(x: jax.Array) -> jax.Array:
    """Return the products of the columns of points, float32[d, d] of [N, d]."""
    return jnp.matmul(x.T, x, precision=EXACT)


def square_distances(points: jax.Array, centroids: np.ndarray | jax.Array) -> jax.Array:
    """Return float32[..., K], never negative, of points [..., d]."""
    products = jnp.matmul(points, centroids.T, precision=EXACT)
    own = jnp.sum(jnp.square(points), axis=-1, keepdims=True)
    return jnp.maximum(own - 2 * products + jnp.sum(jnp.square(centroids), axis=1), 0.0)


def _first(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    chosen = np.random.default_rng(seed).choice(len(points), count, replace=False)
    return points[np.sort(chosen)]


def sums_by_owner(
    points: np.ndarray, owner: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many points each unit owns, int[K], and their sum, float64[K, d]."""
    sums = np.stack([np.bincount(owner, column, count) for column in points.T], axis=1)
    return np.bincount(owner, minlength=count), sums


@jax.jit
def _nearest(points: jax.Array, centroids: jax.Array) -> tuple[jax.Array, jax.Array]:
    squares = square_distances(points, centroids)
    index = jnp.argmin(squares, axis=1).astype(jnp.int32)
    return index, jnp.sqrt(jnp.min(squares, axis=1))


@jax.jit
def _ranked_sums(
    points: jax.Array, count: int, units: jax.Array, decay: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the units' weights [K] over the first `count` points, and weighted sums [K, d]."""
    rows, ranks = jnp.arange(len(points))[:, None], min(_GAS_RANKS, len(units))
    _, index = jax.lax.top_k(-square_distances(points, units), ranks)
    near = jnp.where(rows < count, jnp.exp(-jnp.arange(ranks) / decay), 0.0)
    weight = jnp.zeros((len(points), len(units))).at[rows, index].set(near)
    return jnp.sum(weight, axis=0), jnp.matmul(weight.T, points, precision=EXACT)
