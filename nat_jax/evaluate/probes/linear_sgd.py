"""A linear classifier by SGD, as Zhang et al. probe layers."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureSet, check_sets, inverse_deviation
from nat_jax.evaluate.probes import sgd
from nat_jax.evaluate.stream import TrainEpoch

_BIAS_RATE = 2.0  # biases learn twice as fast, as in Caffe's models


def sgd_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    epochs: int = 28,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    decay_every: int = 8,
    decay: float = 0.1,
    momentum: float = 0.9,
    l2: float = 5e-4,
) -> float:
    """Train a linear classifier by SGD and return top-1 accuracy (Zhang et al., ECCV 2016).

    Batch norm without scale and shift, then one linear layer from zero. Minimises
    ``mean cross-entropy + l2 / 2 |W|^2`` by ``m = momentum m + rate (g + l2 W)``, ``W = W - m``;
    the bias is not penalised and learns at twice the rate. The published 140,000 steps of 256
    images with a tenth of the rate after every 40,000 are 28 epochs of ImageNet and steps of 8.
    Batch norm takes each batch's mean and variance in training (an incomplete one is left out) and
    their averages over all batches in the test. Small sets have few steps in 28 epochs: give more.

    Args:
        train: features float32[N, F] to fit.
        test: features to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the order.
        epochs: passes over the training set.
        batch_size: min(batch_size, N) is used.
        learning_rate: of the first epochs.
        decay_every: epochs after which the rate is multiplied by `decay`, again and again.
        decay: in (0, 1].
        momentum: heavy-ball momentum.
        l2: penalty, 0 or more.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: an option out of range, sets that do not fit (see `check_sets`), or weights
            that diverge.
    """
    check_sets(train, test, num_classes)
    recipe = _recipe(epochs, learning_rate, decay_every, decay, momentum, l2)
    sgd.check_options("linear_probe by sgd", at_least_1={"batch_size": batch_size})
    net = Linear(train.features.shape[1], num_classes)
    state = sgd.fit(net, train, recipe, batch_size=batch_size, seed=seed)
    return sgd.accuracy(net, state, test)


def fit_layers(
    train_epoch: TrainEpoch,
    *,
    num_classes: int,
    seed: int,
    epochs: int,
    learning_rate: float,
    decay_every: int,
    decay: float,
    momentum: float,
    l2: float,
) -> dict[str, tuple[sgd.Classifier, sgd.State]]:
    """Train the classifier of `sgd_probe` on every layer of a stream; see `sgd.fit_stream`."""
    return sgd.fit_stream(
        lambda features: Linear(features, num_classes),
        train_epoch,
        _recipe(epochs, learning_rate, decay_every, decay, momentum, l2),
        num_classes=num_classes,
        seed=seed,
    )


def _recipe(
    epochs: int,
    learning_rate: float,
    decay_every: int,
    decay: float,
    momentum: float,
    l2: float,
) -> sgd.Recipe:
    sgd.check_options(
        "linear_probe by sgd",
        at_least_1={"epochs": epochs, "decay_every": decay_every},
        below_1={"momentum": momentum},
    )
    if not 0 < decay <= 1 or l2 < 0 or not 0 < learning_rate < math.inf:
        raise InputError(
            "linear_probe by sgd: expected decay in (0, 1], l2 >= 0 and learning_rate above 0; "
            f"got {decay}, {l2}, {learning_rate}"
        )
    return sgd.Recipe(
        epochs, lambda epoch: learning_rate * decay ** (epoch // decay_every), momentum, l2
    )


class _Moments(NamedTuple):
    """Averages over the batches that were seen: mean and variance of each feature, [F]."""

    batches: jax.Array
    mean: jax.Array
    variance: jax.Array


class Linear(NamedTuple):
    """Batch norm without scale and shift, and a linear map, as `sgd` trains them."""

    features: int
    classes: int

    def init(self, key: jax.Array) -> tuple[dict[str, jax.Array], _Moments]:
        """Return zeros: the problem is convex, so any start will do."""
        params = {
            "kernel": jnp.zeros((self.features, self.classes), jnp.float32),
            "bias": jnp.zeros(self.classes, jnp.float32),
        }
        nothing = jnp.zeros(self.features, jnp.float32)
        return params, _Moments(jnp.float32(0), nothing, nothing)

    def apply(
        self,
        params: dict[str, jax.Array],
        stats: _Moments,
        features: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, _Moments]:
        """Return logits and moments; with a key in training mode, by the batch's own moments."""
        mean, variance = stats.mean, stats.variance
        if key is not None:
            mean = jnp.mean(features, axis=0)
            variance = jnp.mean(jnp.square(features - mean), axis=0)
            seen = stats.batches + 1
            stats = _Moments(
                seen,
                stats.mean + (mean - stats.mean) / seen,
                stats.variance + (variance - stats.variance) / seen,
            )
        x = (features - mean) * inverse_deviation(mean, variance)
        logits = jnp.dot(x, params["kernel"], precision=jax.lax.Precision.HIGHEST)
        return logits + params["bias"], stats

    def descend(
        self,
        params: dict[str, jax.Array],
        trace: dict[str, jax.Array],
        grads: dict[str, jax.Array],
        rates: jax.Array,
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return (params, trace) after a step as `sgd_probe` states it."""
        rate, momentum, l2 = rates
        steps = {
            "kernel": rate * (grads["kernel"] + l2 * params["kernel"]),
            "bias": _BIAS_RATE * rate * grads["bias"],
        }
        trace = {name: momentum * trace[name] + steps[name] for name in steps}
        return {name: params[name] - trace[name] for name in steps}, trace
