"""Ridge regression on one-hot labels: a linear probe in one pass over the features."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from nat_jax.errors import InputError
from nat_jax.evaluate.features import (
    FeatureSet,
    check_sets,
    inverse_deviation,
    padded_length,
    padded_rows,
    row_chunks,
)

_CHUNK_BYTES = 512 << 20


def ridge_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    l2: float = 0.1,
) -> float:
    """Fit one-hot labels by ridge regression and return top-1 accuracy of the largest output.

    Minimises ``mean |W x + b - y|^2 + l2 |W|^2`` exactly (the bias is free; scikit-learn's Ridge
    with alpha = N l2) over features standardised by the training set; constant ones are dropped. A
    tie goes to the smaller label. The features stream through the device in chunks of 0.5 GiB,
    which it multiplies in float32; the sums of these products and the solution are float64 on the
    host. Memory is that of a chunk and of an n x n matrix, n = min(N, F): any number of records
    will do. Time O(N F n + n^3).

    Args:
        train: features float32[N, F] to fit; may be mapped from a file.
        test: features to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: unused, nothing here is random; probes share one signature.
        l2: penalty, above 0.

    Returns:
        Accuracy in [0, 1].

    Raises:
        InputError: l2 out of range, or sets that do not fit (see `check_sets`).
    """
    del seed
    check_sets(train, test, num_classes)
    if not l2 > 0:
        raise InputError(f"linear_probe by ridge: expected l2 above 0, got {l2}")
    fit = solve(train, num_classes, l2)
    right = 0
    for part, labels, count in _chunks(test):
        outputs = np.asarray(_outputs(part, *fit))
        right += int(np.sum(outputs.argmax(axis=1)[:count] == labels[:count]))
    return right / len(test)


class Fit(NamedTuple):
    """A linear map of standardised features: ``((x - mean) scale) kernel + bias``."""

    mean: np.ndarray  # float32[F]
    scale: np.ndarray  # float32[F], 0 for a constant feature
    kernel: np.ndarray  # float32[F, classes]
    bias: np.ndarray  # float32[classes]


def solve(train: FeatureSet, num_classes: int, l2: float) -> Fit:
    """Fit the map of `ridge_probe`."""
    mean, scale = _moments(train)
    share = np.bincount(train.labels, minlength=num_classes) / len(train)
    if len(train) <= train.features.shape[1]:
        kernel = _dual(train, mean, scale, share, l2)
    else:
        kernel = _primal(train, mean, scale, share, l2)
    return Fit(mean, scale, kernel.astype(np.float32), share.astype(np.float32))


def _chunks(data: FeatureSet) -> Iterator[tuple[np.ndarray, np.ndarray, np.int32]]:
    """Yield padded features [P, F] and labels [P] of consecutive records, and how many they are."""
    start = 0
    for part in row_chunks(data.features, _CHUNK_BYTES):
        labels, rows = data.labels[start : start + len(part)], padded_length(len(part))
        yield padded_rows(part, rows), padded_rows(labels, rows), np.int32(len(part))
        start += len(part)


def _moments(train: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    """Return each feature's mean and one over its deviation (0 where it is constant)."""
    shift = train.features[0].astype(np.float32)  # near the mean, as large sums lose digits
    mean = (shift + _sums(train, shift)[0] / len(train)).astype(np.float32)
    variance = _sums(train, mean)[1] / len(train)
    return mean, np.asarray(inverse_deviation(mean, variance.astype(np.float32)))


def _sums(train: FeatureSet, shift: np.ndarray) -> np.ndarray:
    """Return the sums float64[2, F] of ``features - shift`` and of its squares."""
    total = np.zeros((2, len(shift)))
    for part, _, count in _chunks(train):
        total += np.asarray(_chunk_sums(part, count, shift))
    return total


@jax.jit
def _chunk_sums(features: jax.Array, count: jax.Array, shift: jax.Array) -> jax.Array:
    """Return float32[2, F] of the first `count` rows."""
    inside = jnp.arange(len(features)) < count
    away = jnp.where(inside[:, None], features - shift, 0.0)
    return jnp.stack([jnp.sum(away, axis=0), jnp.sum(jnp.square(away), axis=0)])


def _primal(
    train: FeatureSet, mean: np.ndarray, scale: np.ndarray, share: np.ndarray, l2: float
) -> np.ndarray:
    """Solve (X^T X / N + l2) W = X^T Y / N, for X [N, F] with N > F."""
    gram = np.zeros((len(mean), len(mean)))
    against = np.zeros((len(mean), len(share)))
    for chunk in _chunks(train):
        more, with_labels = _products(*chunk, mean, scale, num_classes=len(share))
        gram += np.asarray(more)
        against += np.asarray(with_labels)
    gram /= len(train)
    gram[np.diag_indices_from(gram)] += l2
    # Centred features are orthogonal to the bias, so Y needs no centring.
    return _solved(gram, against / len(train))


def _dual(
    train: FeatureSet, mean: np.ndarray, scale: np.ndarray, share: np.ndarray, l2: float
) -> np.ndarray:
    """Solve by W = X^T (X X^T + N l2)^-1 (Y - mean Y), for X [N, F] with N <= F."""
    x = ((train.features - mean) * scale).astype(np.float64)
    kernel = x @ x.T
    kernel[np.diag_indices_from(kernel)] += len(x) * l2
    return x.T @ _solved(kernel, np.eye(len(share))[train.labels] - share)


def _solved(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    try:
        factor = scipy.linalg.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise InputError(
            f"linear_probe by ridge: the penalty is lost in the rounding of the products "
            f"({error}); raise l2"
        ) from error
    return scipy.linalg.cho_solve(factor, right, overwrite_b=True, check_finite=False)


@functools.partial(jax.jit, static_argnames="num_classes")
def _products(
    features: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    mean: jax.Array,
    scale: jax.Array,
    *,
    num_classes: int,
) -> tuple[jax.Array, jax.Array]:
    """Return X^T X [F, F] and X^T Y [F, classes] of the first `count` rows."""
    inside = jnp.arange(len(labels)) < count
    x = jnp.where(inside[:, None], (features - mean) * scale, 0.0)
    exact = jax.lax.Precision.HIGHEST
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=x.dtype)
    return jnp.dot(x.T, x, precision=exact), jnp.dot(x.T, one_hot, precision=exact)


@jax.jit
def _outputs(
    features: jax.Array, mean: jax.Array, scale: jax.Array, kernel: jax.Array, bias: jax.Array
) -> jax.Array:
    x = (features - mean) * scale
    return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias
