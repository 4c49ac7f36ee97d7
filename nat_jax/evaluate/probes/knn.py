"""Exact nearest neighbours by cosine, and the kNN classifier on them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.errors import InputError
from nat_jax.evaluate.features import (
    FeatureSet,
    check_finite,
    check_sets,
    padded_length,
    padded_rows,
)

_QUERY_CHUNK = 1024
_DATABASE_CHUNK = 16384  # 64 MiB of similarities at a time
_CHUNK_BYTES = 512 << 20  # of the database on their way to the device
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
    the smaller training row. Bounds on memory are those of `nearest`.

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
        InputError: k or temperature out of range, or sets that do not fit (see `check_sets`).
    """
    del seed
    swept = knn_sweep(train, test, num_classes=num_classes, ks=(k,), temperatures=(temperature,))
    return swept[k, temperature]


def knn_sweep(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    ks: Sequence[int] = (1, 5, 10, 20, 50, 100, 200),
    temperatures: Sequence[float | None] = (0.07, None),
) -> dict[tuple[int, float | None], float]:
    """Classify as `knn` does for several k and kinds of votes, at the cost of the largest k.

    Args:
        train: the neighbours; features float32[N, F].
        test: the records to classify.
        num_classes: labels are 0 .. num_classes - 1.
        ks: numbers of neighbours that vote, each at most N.
        temperatures: of the weights; None for plain votes.

    Returns:
        The accuracy in [0, 1] by (k, temperature).

    Raises:
        InputError: as `knn`, or nothing to sweep.
    """
    check_sets(train, test, num_classes)
    if not ks or not temperatures:
        raise InputError(f"expected at least one k and one temperature, got {ks}, {temperatures}")
    for temperature in temperatures:
        if temperature is not None and not temperature > 0:
            raise InputError(f"temperature: expected a number above 0 or None, got {temperature}")
    for k in (min(ks), max(ks)):
        _check_k(k, len(train))
    similarity, index = _search(test.features, train.features, max(ks))
    right = dict.fromkeys(((k, t) for k in ks for t in temperatures), 0)
    for start in range(0, len(test), _QUERY_CHUNK):
        part = slice(start, start + _QUERY_CHUNK)
        labels = train.labels[index[part]]
        for temperature in temperatures:
            weight = _weights(similarity[part], temperature)
            for k in ks:
                found = _vote(labels[:, :k], weight[:, :k], num_classes)
                right[k, temperature] += int(np.sum(found == test.labels[part]))
    return {setting: count / len(test) for setting, count in right.items()}


def nearest(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k most similar database rows of every query by cosine, exactly.

    Both may be mapped from files: they stream through the device in chunks and are never copied as
    a whole. The device holds a block of the database (1 GiB, twice while it is scaled), 1,024
    queries and 64 MiB of similarities; the host the answers, 8 k bytes for each query. So a million
    by a million stays near 2 GiB on the device up to F = 16,384 and takes 1.6 GB of the host for
    k = 200. Time O(Q N F); the queries are read once for each block. float32 with full-precision
    products.

    Args:
        queries: float32[Q, F]; a row of zeros has cosine 0 with everything.
        database: float32[N, F].
        k: 1 .. N.

    Returns:
        (cosine float32[Q, k], row int32[Q, k]), most similar first, ties by smaller row.

    Raises:
        InputError: k > N, dimensions that differ, or values that are not finite.
    """
    _check_k(k, len(database))
    if queries.shape[1:] != database.shape[1:]:
        raise InputError(
            f"expected queries and database of one dimension, got {queries.shape[1]} and "
            f"{database.shape[1]}"
        )
    check_finite(queries, "query")
    check_finite(database, "database")
    return _search(queries, database, k)


def _check_k(k: int, count: int) -> None:
    if not 1 <= k <= count:
        raise InputError(
            f"k: expected 1 to {count}, the number of neighbours to choose from; got {k}"
        )


def _search(queries: np.ndarray, database: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    chunk, block = _chunk_and_block(*database.shape)
    rows = min(_QUERY_CHUNK, padded_length(len(queries)))
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    index = np.zeros((len(queries), k), np.int32)
    for first in range(0, len(database), block):
        part = database[first : first + block]
        chunks = [
            (_unit(padded_rows(part[at : at + chunk], chunk)), np.int32(first + at))
            for at in range(0, len(part), chunk)
        ]
        for start in range(0, len(queries), rows):
            now = slice(start, start + rows)
            query = _unit(padded_rows(queries[now], rows))
            best = padded_rows(similarity[now], rows), padded_rows(index[now], rows)
            for data, offset in chunks:
                best = _merge(*best, query, data, offset, np.int32(len(database)))
            # Reading the result waits for it, which bounds the work in flight, hence the memory.
            for kept, found in zip((similarity, index), best, strict=True):
                kept[now] = np.asarray(found)[: len(kept[now])]
    return similarity, index


def _chunk_and_block(rows: int, dimension: int) -> tuple[int, int]:
    """Return how many rows of a database are compared at once, and how many are resident."""
    fitting = max(128, _CHUNK_BYTES // (4 * max(1, dimension)))
    chunk = min(_DATABASE_CHUNK, padded_length(rows), 1 << fitting.bit_length() - 1)
    return chunk, chunk * max(1, _BLOCK_BYTES // (4 * chunk * max(1, dimension)))


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


def _weights(similarity: np.ndarray, temperature: float | None) -> np.ndarray:
    """Return the votes' weights float64[Q, k] for similarities that fall along each row."""
    if temperature is None:
        return np.ones(similarity.shape)
    # The largest subtracted, so that exp neither overflows nor loses every vote.
    return np.exp((similarity - similarity[:, :1].astype(np.float64)) / temperature)


def _vote(labels: np.ndarray, weight: np.ndarray, num_classes: int) -> np.ndarray:
    """Return int[Q], the class of most weight per row of labels, weight [Q, k]."""
    cell = np.arange(len(labels))[:, None] * num_classes + labels
    votes = np.bincount(cell.ravel(), weight.ravel(), len(labels) * num_classes)
    return votes.reshape(len(labels), num_classes).argmax(axis=1)
