"""The training losses."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def squared_loss(features: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the mean half squared distance between features and their targets.

    ``1/(2n) sum_i |z_i - c_i|^2`` (paper, equation 2), n counting the records of weight 1. The
    authors' code sums over batch and dimension without the half, so that its learning rate 0.01 at
    batch 256 is 0.01 * 2 * 256 = 5.12 here.

    Args:
        features: float32[B, D], unit norm; or [B, V, D], V views that count a V-th each.
        targets: float32[B, D], unit norm.
        weight: float32[B]; 1, or 0 for a record to leave out.

    Returns:
        float32 scalar in [0, 2].
    """
    distance = jnp.sum(jnp.square(_views(features, weight) - targets[:, None]), axis=-1)
    return 0.5 * _mean(distance, weight)


def softmax_loss(logits: jax.Array, targets: jax.Array, weight: jax.Array) -> jax.Array:
    """Return the mean cross-entropy between softmax(logits) and targets that are distributions.

    Args:
        logits: float32[B, D], or [B, V, D], V views that count a V-th each.
        targets: float32[B, D], one-hot rows.
        weight: float32[B]; 1, or 0 for a record to leave out.

    Returns:
        float32 scalar, 0 or more.
    """
    views = _views(logits, weight)
    each = jnp.broadcast_to(targets[:, None], views.shape)
    return _mean(optax.losses.softmax_cross_entropy(views, each), weight)


def _views(outputs: jax.Array, weight: jax.Array) -> jax.Array:
    return outputs.reshape(len(weight), -1, outputs.shape[-1])


def _mean(of_views: jax.Array, weight: jax.Array) -> jax.Array:
    """Average [B, V] over the views and the records that count."""
    each = jnp.mean(of_views, axis=1)
    return jnp.sum(weight * each) / jnp.maximum(jnp.sum(weight), 1.0)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and the output of the network that it takes.

    Attributes:
        output: "z", unit features, or "logits", the same before they are normalised.
        function: of (output, targets, weight).
    """

    output: str
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


# The paper compares the two for supervised training, "square" on unit features (table 1).
LOSSES = {"square": Loss("z", squared_loss), "softmax": Loss("logits", softmax_loss)}
