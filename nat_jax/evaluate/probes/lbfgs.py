"""Multinomial logistic regression by L-BFGS: one answer, nothing to tune but the penalty."""

import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nat_jax.errors import InputError
from nat_jax.evaluate.features import (
    FeatureSet,
    check_sets,
    inverse_deviation,
    padded_length,
    padded_rows,
)

logger = logging.getLogger(__name__)


def lbfgs_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    l2: float = 3e-3,
    max_iterations: int = 200,
    tolerance: float = 3e-4,
) -> float:
    """Fit a linear classifier on standardised features and return top-1 accuracy.

    Minimises ``mean cross-entropy + l2 / 2 |W|^2`` (the bias is free; scikit-learn's
    LogisticRegression with C = 1 / (N l2)) by SciPy's L-BFGS-B from zero; loss and gradient are
    computed on the device in float32. Features are standardised by the training set's mean and
    standard deviation; constant ones are dropped. A tie goes to the smaller label. The device holds
    twice the training features.

    Args:
        train: features float32[N, F] to fit.
        test: features to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: unused, nothing here is random; probes share one signature.
        l2: penalty, 0 or more.
        max_iterations: of L-BFGS; stopping here is logged.
        tolerance: stop when no partial derivative is larger.

    Returns:
        Accuracy in [0, 1].

    Raises:
        InputError: an option out of range, or sets that do not fit (see `check_sets`).
    """
    del seed
    check_sets(train, test, num_classes)
    if l2 < 0 or max_iterations < 1 or tolerance < 0:
        raise InputError(
            "linear_probe by lbfgs: expected l2 >= 0, max_iterations >= 1, tolerance >= 0; "
            f"got {l2}, {max_iterations}, {tolerance}"
        )
    fit = solve(train, num_classes, l2, max_iterations, tolerance)
    if fit.slope > tolerance:
        logger.info(
            "linear_probe by lbfgs: stopped after %d of %d iterations with a largest derivative of "
            "%.1e (tolerance %.1e)",
            fit.iterations,
            max_iterations,
            fit.slope,
            tolerance,
        )
    features = padded_rows(test.features, padded_length(len(test)))
    predicted = np.asarray(_predict(fit.params, features, fit.mean, fit.scale))
    return float(np.mean(predicted[: len(test)] == test.labels))


class Fit(NamedTuple):
    """A classifier of standardised features, and how the fit ended."""

    params: np.ndarray  # float32[F + 1, classes]: the kernel, and the bias in the last row
    mean: jax.Array  # [F]
    scale: jax.Array  # [F]
    iterations: int
    slope: float  # largest absolute derivative at the end


def solve(
    train: FeatureSet, num_classes: int, l2: float, max_iterations: int, tolerance: float
) -> Fit:
    """Fit the classifier of `lbfgs_probe`."""
    from scipy import optimize  # a third of a second

    length = padded_length(len(train))
    weight = padded_rows(np.full(len(train), 1 / len(train), np.float32), length)
    x, mean, scale = _standardised(padded_rows(train.features, length), weight)
    data = x, padded_rows(train.labels, length), weight, np.float32(l2)
    shape = train.features.shape[1] + 1, num_classes

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _loss(flat.reshape(shape).astype(np.float32), *data)
        return float(value), np.asarray(gradient, np.float64).ravel()

    found = optimize.minimize(
        loss,
        np.zeros(shape).ravel(),
        jac=True,
        method="L-BFGS-B",
        # ftol: until the loss falls no more in float32
        options={"maxiter": max_iterations, "gtol": tolerance, "ftol": 0.0},
    )
    params = found.x.reshape(shape).astype(np.float32)
    return Fit(params, mean, scale, found.nit, float(np.abs(found.jac).max()))


@jax.jit
def _standardised(features: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return features [P, F] standardised, their mean and one over their deviation (0: constant).

    ``weight`` [P] sums to one and is zero for padding.
    """
    exact = jax.lax.Precision.HIGHEST
    mean = jnp.dot(weight, features, precision=exact)
    variance = jnp.dot(weight, jnp.square(features - mean), precision=exact)
    scale = inverse_deviation(mean, variance)
    return (features - mean) * scale, mean, scale


@jax.jit
def _loss(
    params: jax.Array, x: jax.Array, labels: jax.Array, weight: jax.Array, l2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the penalised loss and its gradient with respect to ``params``."""

    def loss(params: jax.Array) -> jax.Array:
        logits = _logits(params, x)
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(weight * nll) + 0.5 * l2 * jnp.sum(jnp.square(params[:-1]))

    return jax.value_and_grad(loss)(params)


def _logits(params: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.dot(x, params[:-1], precision=jax.lax.Precision.HIGHEST) + params[-1]


@jax.jit
def _predict(
    params: jax.Array, features: jax.Array, mean: jax.Array, scale: jax.Array
) -> jax.Array:
    return jnp.argmax(_logits(params, (features - mean) * scale), axis=1)
