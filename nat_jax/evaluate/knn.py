"""Exact nearest neighbours by cosine, and the kNN classifier on them."""

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.evaluate.features import (
    FeatureSet,
    check_finite,
    check_sets,
    padded_length,
    padded_rows,
)

_QUERY_CHUNK = 1024
_DATABASE_CHUNK = 16384  # 64 MiB of similarities at a time
_BLOCK_BYTES = 1 << 30  # of the database resident on the device


def knn(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    k: int = 20,
    temperature: float | None = 0.07,
) -> float:
    """Classify by the k nearest training features and return top-1 accuracy.

    Neighbours vote with weight exp(cosine / temperature) (Wu et al., CVPR 2018, section 3.4), or
    with weight one. A tie between classes goes to the smaller label; a tie for the k-th place to
    the smaller training row.

    Args:
        train: the neighbours; features float32[N, F].
        test: the records to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: unused, nothing here is random; probes share one signature.
        k: neighbours that vote, at most N.
        temperature: of the weights; None for plain votes.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: k or temperature out of range, or sets that do not fit (see `check_sets`).
    """
    del seed
    check_sets(train, test, num_classes)
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0 or None, got {temperature}")
    similarity, index = nearest(test.features, train.features, k)
    if temperature is None:
        weight = np.ones(similarity.shape)
    else:  # the largest subtracted, so that exp neither overflows nor loses every vote
        weight = np.exp((similarity - similarity[:, :1].astype(np.float64)) / temperature)
    return float(np.mean(_vote(train.labels[index], weight, num_classes) == test.labels))


def nearest(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar database rows of every query by cosine, exactly.

    Work streams through the device in chunks: memory there stays below about 2 GiB whatever the
    sizes. Time O(Q N F). float32 with full-precision products.

    Args:
        queries: float32[Q, F]; a row of zeros has cosine 0 with everything.
        database: float32[N, F].
        k: 1 .. N.

    Returns:
        (cosine float32[Q, k], row int32[Q, k]), most similar first, ties by smaller row.

    Raises:
        ValueError: k > N, dimensions that differ, or values that are not finite.
    """
    if not 1 <= k <= len(database):
        raise ValueError(
            f"k: expected 1 to {len(database)}, the number of neighbours to choose from; got {k}"
        )
    if queries.shape[1:] != database.shape[1:]:
        raise ValueError(
            f"expected queries and database of one dimension, got {queries.shape[1]} and "
            f"{database.shape[1]}"
        )
    check_finite(queries, "query")
    check_finite(database, "database")

    chunk = min(_DATABASE_CHUNK, padded_length(len(database)))
    block = chunk * max(1, _BLOCK_BYTES // (4 * chunk * database.shape[1]))
    rows = min(_QUERY_CHUNK, padded_length(len(queries)))
    starts = range(0, len(queries), rows)
    best: list[tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]] = [
        (np.full((rows, k), -np.inf, np.float32), np.zeros((rows, k), np.int32)) for _ in starts
    ]
    for first in range(0, len(database), block):
        part = database[first : first + block]
        chunks = [
            (_unit(padded_rows(part[at : at + chunk], chunk)), np.int32(first + at))
            for at in range(0, len(part), chunk)
        ]
        for slot, start in enumerate(starts):
            query = _unit(padded_rows(queries[start : start + rows], rows))
            for data, offset in chunks:
                best[slot] = _merge(*best[slot], query, data, offset, np.int32(len(database)))
            # Waiting bounds the work in flight, hence the memory.
            best[slot] = jax.device_get(best[slot])
    similarity = np.concatenate([value for value, _ in best])[: len(queries)]
    index = np.concatenate([row for _, row in best])[: len(queries)]
    return similarity, index


@jax.jit
def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    # Scaling by the largest value first keeps the squares of tiny and huge rows in range.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@jax.jit
def _merge(
    similarity: jax.Array,
    index: jax.Array,
    query: jax.Array,
    data: jax.Array,
    offset: jax.Array,
    total: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merge one database chunk (rows from `offset` on; rows >= total are padding) into the best."""
    k = similarity.shape[1]
    cosine = jax.lax.dot_general(
        query, data, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
    row = offset + jnp.arange(len(data), dtype=jnp.int32)
    cosine = jnp.where(row < total, cosine, -jnp.inf)
    new, at = jax.lax.top_k(cosine, min(k, len(data)))
    # Earlier rows stand first, and top_k prefers the first among equals.
    similarity = jnp.concatenate([similarity, new], axis=1)
    index = jnp.concatenate([index, row[at]], axis=1)
    similarity, at = jax.lax.top_k(similarity, k)
    return similarity, jnp.take_along_axis(index, at, axis=1)


def _vote(labels: np.ndarray, weight: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int[Q], the class of most weight per row of labels, weight [Q, k]."""
    winner = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), _QUERY_CHUNK):
        part = slice(start, start + _QUERY_CHUNK)
        count = len(labels[part])
        cell = np.arange(count)[:, None] * num_classes + labels[part]
        votes = np.bincount(cell.ravel(), weight[part].ravel(), count * num_classes)
        winner[part] = votes.reshape(count, num_classes).argmax(axis=1)
    return winner
