import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nat_jax import optim
from nat_jax.losses import squared_loss
from nat_jax.models.layers import unit_norm


def test_squared_loss_is_one_minus_cosine_on_the_sphere():
    z = unit_norm(jax.random.normal(jax.random.key(0), (5, 7)))
    c = unit_norm(jax.random.normal(jax.random.key(1), (5, 7)))
    expected = 1 - np.mean(np.sum(np.asarray(z) * np.asarray(c), axis=1))
    np.testing.assert_allclose(squared_loss(z, c, jnp.ones(5)), expected, rtol=1e-6)


def test_records_of_weight_zero_do_not_count():
    z, c = jnp.eye(3), jnp.roll(jnp.eye(3), 1, axis=0)
    spoiled = z.at[2].set(100.0)
    weight = jnp.array([1.0, 1.0, 0.0])
    assert squared_loss(spoiled, c, weight) == squared_loss(z, c, weight) == 1.0
    assert squared_loss(spoiled, c, jnp.ones(3)) > 100
    assert squared_loss(z, c, jnp.zeros(3)) == 0.0


def test_authors_learning_rate_on_a_summed_loss_is_512_times_smaller():
    batch = 256
    z = jax.random.normal(jax.random.key(0), (batch, 4))
    c = jax.random.normal(jax.random.key(1), (batch, 4))
    ours = jax.grad(lambda z: squared_loss(z, c, jnp.ones(batch)))(z)
    authors = jax.grad(lambda z: jnp.sum((z - c) ** 2))(z)
    np.testing.assert_allclose(5.12 * ours, 0.01 * authors, rtol=1e-5)


def test_inverse_schedule_is_the_papers():
    schedule = optim.make_schedule(
        optim.Optimizer(2.0, schedule="inverse", decay_start=10, gamma=0.5)
    )
    np.testing.assert_allclose([schedule(t) for t in (0, 10, 12, 20)], [2, 2, 1, 2 / 6], rtol=1e-6)


def test_warm_up_then_cosine_reaches_zero():
    schedule = optim.make_schedule(
        optim.Optimizer(1.0, schedule="cosine", warmup_steps=10, total_steps=110)
    )
    np.testing.assert_allclose(
        [schedule(t) for t in (0, 5, 10, 60, 110)], [0, 0.5, 1, 0.5, 0], atol=1e-6
    )


def test_momentum_and_weight_decay_follow_their_definition():
    settings = optim.Optimizer(0.1, momentum=0.9, weight_decay=0.01)
    sgd = optim.make_optimizer(settings)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 0.5), params)
    state = sgd.init(params)
    kernel, bias, velocity, bias_velocity = 1.0, 1.0, 0.0, 0.0
    for _ in range(3):
        updates, state = sgd.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + 0.5 + 0.01 * kernel
        bias_velocity = 0.9 * bias_velocity + 0.5
        kernel, bias = kernel - 0.1 * velocity, bias - 0.1 * bias_velocity
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-6)


def test_a_gradient_is_measured_without_a_change():
    small, large = jax.random.normal(jax.random.key(0), (3,)), jnp.full((1024, 1024), 0.125)
    gradient, norm = jax.jit(optim.gradient_and_norm)({"small": small, "large": large})
    np.testing.assert_array_equal(gradient["small"], small)
    np.testing.assert_array_equal(gradient["large"], large)
    np.testing.assert_allclose(norm, optax.tree.norm([small, large]), rtol=1e-6)
    broken = large.at[5, 7].set(jnp.nan)
    gradient, norm = jax.jit(optim.gradient_and_norm)({"small": small, "large": broken})
    assert np.isnan(norm) and np.isnan(gradient["large"]).all()
    np.testing.assert_array_equal(gradient["small"], small)


def test_equal_settings_share_one_optimizer():
    assert optim.make_optimizer(optim.Optimizer(0.3)) is optim.make_optimizer(optim.Optimizer(0.3))
    assert optim.make_optimizer(optim.Optimizer(0.3)) is not optim.make_optimizer(
        optim.Optimizer(0.4)
    )


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="expected one of constant, inverse, cosine; got 'step'"):
        optim.Optimizer(0.1, schedule="step")
