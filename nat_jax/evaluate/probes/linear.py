"""Linear classifiers of frozen features.

The fits differ in cost and in what they are comparable with. "lbfgs" has one answer, whatever the
seed and the batches, and needs no learning rate: the default, for features that fit on a device
twice. "sgd" is how Zhang et al. and their successors trained their probes, takes features of any
number, in memory or from a stream of fresh crops (`linear_probe_stream`), and is what to compare
with published figures. "ridge" takes one pass and no iterations.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureBatch, FeatureSet, TrainEpoch, inverse_deviation
from nat_jax.evaluate.probes import sgd
from nat_jax.evaluate.probes.lbfgs import lbfgs_probe
from nat_jax.evaluate.probes.ridge import ridge_probe

_BIAS_RATE = 2.0  # biases learn twice as fast, as in Caffe's models


def linear_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    fit: str = "lbfgs",
    **options: Any,
) -> float:
    """Fit a linear classifier and return top-1 accuracy.

    Args:
        train: features float32[N, F] to fit.
        test: features to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the order of "sgd"; nothing else is random.
        fit: a key of FITS.
        **options: of that fit: see `lbfgs_probe`, `linear_probe_stream`, `ridge_probe`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        InputError: unknown fit or option, an option out of range, or sets that do not fit (see
            `features.check_sets`).
    """
    unknown = sorted(set(options) - set(fit_options(fit)))
    if unknown:
        raise InputError(
            f"linear_probe: {fit} has no option {', '.join(unknown)}; "
            f"known: {', '.join(fit_options(fit))}"
        )
    return FITS[fit](train, test, num_classes=num_classes, seed=seed, **options)


def fit_options(fit: str) -> dict[str, Any]:
    """Return the options of a fit and their defaults.

    Raises:
        InputError: unknown fit; the known ones are listed.
    """
    if fit not in FITS:
        raise InputError(f"linear_probe: unknown fit {fit!r}; known: {', '.join(FITS)}")
    return sgd.keyword_options(FITS[fit])


def linear_probe_stream(
    train_epoch: TrainEpoch,
    test: Iterable[FeatureBatch],
    *,
    num_classes: int,
    seed: int = 0,
    epochs: int = 28,
    learning_rate: float = 0.01,
    decay_every: int = 8,
    decay: float = 0.1,
    momentum: float = 0.9,
    l2: float = 5e-4,
) -> dict[str, float]:
    """Train a linear classifier on every layer of a stream by SGD (Zhang et al., ECCV 2016).

    Batch norm without scale and shift, then one linear layer from zero. Minimises
    ``mean cross-entropy + l2 / 2 |W|^2`` by ``m = momentum m + rate (g + l2 W)``, ``W = W - m``;
    the bias is not penalised and learns at twice the rate. The published 140,000 steps of 256
    images with a tenth of the rate after every 40,000 are 28 epochs of ImageNet and steps of 8;
    small sets have few steps in 28 epochs: set more. Batch norm takes each batch's mean and
    variance in training and their averages over all batches in the test.

    Args:
        train_epoch: returns the batches of an epoch, features {layer: float[B, F]}; in the
            published protocol fresh crops and flips, with maps pooled to about 9,600 values.
        test: batches with features float[B, V, F] for V views of each record, whose logits are
            summed, or [B, F] for one.
        num_classes: labels are 0 .. num_classes - 1.
        seed: unused, as the classifiers begin at zero; streams share one signature.
        epochs: passes over the training set.
        learning_rate: of the first epochs.
        decay_every: epochs after which the rate is multiplied by `decay`, again and again.
        decay: in (0, 1].
        momentum: heavy-ball momentum.
        l2: penalty, 0 or more.

    Returns:
        A dict of accuracies in [0, 1] by layer.

    Raises:
        InputError: an option out of range, an empty stream, labels out of range, or weights that
            diverge.
    """
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
    trained = sgd.fit(
        "linear_probe by sgd",
        lambda features: Linear(features, num_classes, momentum, l2),
        train_epoch,
        epochs,
        lambda epoch: learning_rate * decay ** (epoch // decay_every),
        num_classes=num_classes,
        seed=seed,
    )
    return sgd.accuracy(trained, test, num_classes=num_classes)


sgd_probe = sgd.in_memory("linear_probe by sgd", linear_probe_stream)

FITS: dict[str, Callable[..., float]] = {
    "lbfgs": lbfgs_probe,
    "sgd": sgd_probe,
    "ridge": ridge_probe,
}


class _Moments(NamedTuple):
    """Averages over the batches seen so far: mean and variance of each feature, [F]."""

    batches: jax.Array
    mean: jax.Array
    variance: jax.Array


class Linear(NamedTuple):
    """Batch norm without scale and shift, and a linear map, as `sgd` trains them."""

    features: int
    classes: int
    momentum: float
    l2: float

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

    def optimizer(self, rate: jax.Array | float) -> optax.GradientTransformation:
        """Return the rule that `linear_probe_stream` states."""
        return optax.chain(
            optax.add_decayed_weights(self.l2, {"kernel": True, "bias": False}),
            optax.masked(optax.scale(_BIAS_RATE), {"kernel": False, "bias": True}),
            optax.scale(-rate),
            optax.trace(self.momentum),
        )
