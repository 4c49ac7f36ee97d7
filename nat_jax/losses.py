"""The training loss."""

import jax
import jax.numpy as jnp


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
    views = features.reshape(len(weight), -1, features.shape[-1])
    distance = jnp.mean(jnp.sum(jnp.square(views - targets[:, None]), axis=-1), axis=1)  # [B]
    return 0.5 * jnp.sum(weight * distance) / jnp.maximum(jnp.sum(weight), 1.0)
