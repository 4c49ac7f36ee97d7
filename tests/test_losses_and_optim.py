import jax
import numpy as np
import pytest

from nat_jax import optim
from nat_jax.losses import squared_loss
from nat_jax.models.layers import unit_norm

loss = jax.jit(squared_loss)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_squared_loss_is_one_minus_cosine_on_the_sphere():
    z, c = (np.asarray(jax.jit(unit_norm)(normal(seed, 5, 7))) for seed in (0, 1))
    expected = 1 - np.mean(np.sum(z * c, axis=1))
    np.testing.assert_allclose(loss(z, c, np.ones(5, np.float32)), expected, rtol=1e-6)


def test_records_of_weight_zero_do_not_count():
    z = np.eye(3, dtype=np.float32)
    c, spoiled, weight = np.roll(z, 1, axis=0), z.copy(), np.float32([1, 1, 0])
    spoiled[2] = 100
    assert float(loss(spoiled, c, weight)) == float(loss(z, c, weight)) == 1.0
    assert float(loss(spoiled, c, np.ones(3, np.float32))) > 100
    assert float(loss(z, c, np.zeros(3, np.float32))) == 0.0


def test_authors_learning_rate_on_a_summed_loss_is_512_times_smaller():
    batch = 256
    z, c = normal(0, batch, 4), normal(1, batch, 4)
    ours = jax.jit(jax.grad(squared_loss))(z, c, np.ones(batch, np.float32))
    authors = 2 * (z - c)  # the gradient of their sum of squares
    np.testing.assert_allclose(5.12 * np.asarray(ours), 0.01 * authors, rtol=1e-5)


def test_inverse_schedule_is_the_papers():
    schedule = optim.make_schedule(
        optim.Optimizer(2.0, schedule="inverse", decay_start=10, gamma=0.5)
    )
    found = jax.jit(schedule)(np.int32([0, 10, 12, 20]))
    np.testing.assert_allclose(found, [2, 2, 1, 2 / 6], rtol=1e-6)


def test_warm_up_then_cosine_reaches_zero():
    schedule = optim.make_schedule(
        optim.Optimizer(1.0, schedule="cosine", warmup_steps=10, total_steps=110)
    )
    found = jax.jit(schedule)(np.int32([0, 5, 10, 60, 110]))
    np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0], atol=1e-6)


def test_momentum_and_weight_decay_follow_their_definition():
    settings = optim.Optimizer(0.1, momentum=0.9, weight_decay=0.01)
    sgd = optim.make_optimizer(settings)
    update = jax.jit(sgd.update)
    params = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    gradient = jax.tree.map(lambda p: np.full_like(p, 0.5), params)
    state = sgd.init(params)
    kernel, bias, velocity, bias_velocity = 1.0, 1.0, 0.0, 0.0
    for _ in range(3):
        updates, state = jax.device_get(update(gradient, state, params))
        params = jax.tree.map(np.add, params, updates)
        velocity = 0.9 * velocity + 0.5 + 0.01 * kernel
        bias_velocity = 0.9 * bias_velocity + 0.5
        kernel, bias = kernel - 0.1 * velocity, bias - 0.1 * bias_velocity
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-6)


def test_a_gradient_is_measured_without_a_change():
    small, large = normal(0, 3), np.full((1024, 1024), 0.125, np.float32)
    measure = jax.jit(optim.gradient_and_norm)
    gradient, norm = measure({"small": small, "large": large})
    np.testing.assert_array_equal(gradient["small"], small)
    np.testing.assert_array_equal(gradient["large"], large)
    expected = np.sqrt(sum(np.square(leaf.astype(np.float64)).sum() for leaf in (small, large)))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
    broken = large.copy()
    broken[5, 7] = np.nan
    gradient, norm = measure({"small": small, "large": broken})
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
