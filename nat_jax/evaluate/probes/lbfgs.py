"""Multinomial logistic regression by L-BFGS: one answer, nothing to tune but the penalty."""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nat_jax.assign._problem import enable_x64
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
    LogisticRegression with C = 1 / (N l2)) by full-batch L-BFGS from zero, in float32. Features are
    standardised by the training set's mean and standard deviation; constant ones are dropped. A
    tie goes to the smaller label. The device holds twice the training features.

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
    length = padded_length(len(train))
    with enable_x64(False):  # optax would make everything float64
        fit = _fit(
            padded_rows(train.features, length),
            padded_rows(train.labels, length),
            np.float32(len(train)),
            np.float32(l2),
            np.int32(max_iterations),
            np.float32(tolerance),
            num_classes=num_classes,
        )
    if fit.slope > tolerance:
        logger.info(
            "linear_probe by lbfgs: stopped after %d of %d iterations with a largest derivative of "
            "%.1e (tolerance %.1e)",
            fit.iterations,
            max_iterations,
            fit.slope,
            tolerance,
        )
    predicted = _predict(fit, padded_rows(test.features, padded_length(len(test))))
    return float(np.mean(np.asarray(predicted)[: len(test)] == test.labels))


class _Fit(NamedTuple):
    params: dict[str, jax.Array]  # kernel [F, classes], bias [classes]
    mean: jax.Array  # [F]
    scale: jax.Array  # [F]
    iterations: jax.Array
    slope: jax.Array  # largest absolute derivative at the end


class _Carry(NamedTuple):
    params: dict[str, jax.Array]
    state: optax.OptState
    iteration: jax.Array
    slope: jax.Array
    falling: jax.Array  # the last step lowered the loss


@functools.partial(jax.jit, static_argnames="num_classes")
def _fit(
    features: jax.Array,
    labels: jax.Array,
    count: jax.Array,
    l2: jax.Array,
    max_iterations: jax.Array,
    tolerance: jax.Array,
    *,
    num_classes: int,
) -> _Fit:
    """Fit the first `count` rows of features [P, F]; the others are padding."""
    weight = (jnp.arange(len(labels)) < count) / count  # [P], sums to one
    mean, scale = _moments(features, weight)
    x = (features - mean) * scale

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(_logits(params, x), labels)
        return jnp.sum(weight * nll) + 0.5 * l2 * jnp.sum(jnp.square(params["kernel"]))

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)  # reuses the line search's last one
    params = {
        "kernel": jnp.zeros((features.shape[1], num_classes), jnp.float32),
        "bias": jnp.zeros((num_classes,), jnp.float32),
    }

    def step(carry: _Carry) -> _Carry:
        value, grad = value_and_grad(carry.params, state=carry.state)
        updates, state = solver.update(
            grad, carry.state, carry.params, value=value, grad=grad, value_fn=loss
        )
        params = optax.apply_updates(carry.params, updates)
        slope = _largest(optax.tree.get(state, "grad"))
        falling = optax.tree.get(state, "value") < value
        return _Carry(params, state, carry.iteration + 1, slope, falling)

    def unfinished(carry: _Carry) -> jax.Array:
        # A step that gains nothing has reached the resolution of float32.
        return (carry.iteration < max_iterations) & (carry.slope > tolerance) & carry.falling

    start = _Carry(params, solver.init(params), jnp.int32(0), jnp.float32(jnp.inf), jnp.bool_(True))
    end = jax.lax.while_loop(unfinished, step, start)
    return _Fit(end.params, mean, scale, end.iteration, end.slope)


def _moments(features: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the mean and one over the standard deviation (0 for a constant feature), [F] each."""
    exact = jax.lax.Precision.HIGHEST
    mean = jnp.dot(weight, features, precision=exact)
    variance = jnp.dot(weight, jnp.square(features - mean), precision=exact)
    return mean, inverse_deviation(mean, variance)


def _logits(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    product = jnp.dot(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
    return product + params["bias"]


def _largest(tree: dict[str, jax.Array]) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


@jax.jit
def _predict(fit: _Fit, features: jax.Array) -> jax.Array:
    return jnp.argmax(_logits(fit.params, (features - fit.mean) * fit.scale), axis=1)
