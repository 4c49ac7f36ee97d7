"""Batch norm folded away: the same layers to 1e-5; rescaling: unit variance, equal rates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax import models
from nat_jax.models import fold, rescale

NETWORKS = {
    "convnet": dict(image_size=12, widths=(5, 7), pools=1, fc_width=9),
    "alexnet": dict(image_size=67, fc_width=16),
}
NAMES = ("convnet", pytest.param("alexnet", marks=pytest.mark.slow))


def pictures(size: int, count: int = 12) -> np.ndarray:
    """Return noise of several grains, so that every layer has something to see."""
    rng = np.random.default_rng(0)
    grains = [
        rng.integers(0, 256, (count, -(-size // grain), -(-size // grain), 3))
        for grain in (1, 4, 16)
    ]
    blocks = [
        grain.repeat(by, axis=1).repeat(by, axis=2)[:, :size, :size]
        for grain, by in zip(grains, (1, 4, 16), strict=True)
    ]
    return np.mean(blocks, axis=0).astype(np.uint8)


@functools.cache
def as_trained(name: str, **changes):
    """Return a network whose batch norm does something, and images for it."""
    settings = NETWORKS[name] | changes
    model = models.make_model(name, dim=6, frontend="sobel", **settings)
    params, batch_stats = model.init(jax.random.key(0))
    rng = np.random.default_rng(1)
    for name, stats in batch_stats.items():
        shape = stats["norm"]["mean"].shape
        for norm, spread, positive in (
            (stats["norm"], "mean", "var"),
            (params[name]["norm"], "bias", "scale"),
        ):
            norm[spread] = rng.normal(0, 0.3, shape).astype(np.float32)
            norm[positive] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return model, params, batch_stats, pictures(model.image_size)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch_stats, images):
    return model.apply(params, batch_stats, images)


def largest_difference(name: str, **changes) -> tuple[float, models.Model, models.Params]:
    model, params, batch_stats, images = as_trained(name, **changes)
    folded, plain = fold.fold_batch_norm(model, params, batch_stats)
    before, _ = jax.device_get(apply(model, params, batch_stats, images))
    after, stats = jax.device_get(apply(folded, plain, {}, images))
    assert stats == {}
    assert {name: x.shape for name, x in before.items()} == {n: x.shape for n, x in after.items()}
    # As a share of the layer's own size, where that exceeds 1.
    worst = max(
        float(
            np.max(np.abs(after[layer] - before[layer])) / max(1.0, np.max(np.abs(before[layer])))
        )
        for layer in model.layer_names
    )
    return worst, folded, plain


@pytest.mark.parametrize("name", NAMES)
def test_folding_keeps_every_layer(name):
    worst, folded, plain = largest_difference(name)
    assert worst < 1e-5
    assert all("norm" not in block for block in plain.values())
    assert not folded.spec.batch_norm
    assert {leaf.dtype for leaf in jax.tree.leaves(plain)} == {np.dtype("float32")}


@pytest.mark.slow
def test_folding_keeps_the_paper_s_network():
    worst, _, _ = largest_difference("alexnet", image_size=224, fc_width=4096)
    assert worst < 1e-5


def test_another_epsilon_would_be_seen(monkeypatch):
    monkeypatch.setattr(fold, "EPSILON", 1e-2)
    assert largest_difference("convnet")[0] > 1e-4


def test_what_is_folded_has_no_batch_norm_to_fold():
    model, params, batch_stats, _ = as_trained("convnet")
    folded, plain = fold.fold_batch_norm(model, params, batch_stats)
    with pytest.raises(ValueError, match="expected a network with batch norm"):
        fold.fold_batch_norm(folded, plain, {})


def without_batch_norm(name: str):
    """Return a network whose channels are far from unit variance."""
    model, params, batch_stats, images = as_trained(name)
    folded, plain = fold.fold_batch_norm(model, params, batch_stats)
    rng = np.random.default_rng(2)
    plain = jax.tree.map(lambda x: x * rng.uniform(0.2, 5, x.shape[-1]).astype(np.float32), plain)
    return folded, plain, images


@functools.partial(jax.jit, static_argnums=0)
def watched(model, params, images):
    found = {}
    model.apply(params, {}, images, watch=lambda name, x: found.setdefault(name, x))
    return found


def linear_outputs(model, params, images) -> dict[str, np.ndarray]:
    found = watched(model, params, images)
    named = {name: found[name] for name in rescale.layers_with_weights(model)}
    return {name: np.asarray(x).reshape(-1, x.shape[-1]) for name, x in named.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_channel_has_unit_variance_after_rescaling(name):
    model, params, images = without_batch_norm(name)
    before = linear_outputs(model, params, images)
    after = linear_outputs(model, rescale.rescale_channels(model, params, images), images)
    for layer in after:
        assert not np.allclose(before[layer].std(axis=0), 1, atol=0.1), layer
        np.testing.assert_allclose(after[layer].std(axis=0), 1, atol=2e-3, err_msg=layer)
        np.testing.assert_allclose(after[layer].mean(axis=0), 0.1, atol=2e-3, err_msg=layer)


def test_layers_that_are_not_named_stay():
    model, params, images = without_batch_norm("convnet")
    new = rescale.rescale_channels(model, params, images, layers=("fc3", "head"), bias=0.0)
    for name in ("conv1", "conv2"):
        jax.tree.map(np.testing.assert_array_equal, params[name], new[name])
    found = linear_outputs(model, new, images)
    for name in ("fc3", "head"):
        np.testing.assert_allclose(found[name].std(axis=0), 1, atol=2e-3)
        np.testing.assert_allclose(found[name].mean(axis=0), 0, atol=2e-3)


def test_a_channel_that_never_changes_is_said_and_kept(caplog):
    model, params, images = without_batch_norm("convnet")
    params["conv1"]["map"]["kernel"] *= np.arange(5) != 2
    new = rescale.rescale_channels(model, params, images)
    assert "1 of 5 channels of conv1" in caplog.text
    np.testing.assert_array_equal(new["conv1"]["map"]["kernel"][..., 2], 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))


@functools.partial(jax.jit, static_argnums=0)
def top_gradient(model, params, images, key):
    def top(params):
        head = watched(model, params, images)["head"]
        return jnp.sum(head * jax.random.normal(key, head.shape, head.dtype))

    return jax.grad(top)(params)


def rates(model, params, images, key) -> np.ndarray:
    """Return rms(gradient) / rms(kernel) of each layer by differentiation of the top itself."""
    gradient = jax.device_get(top_gradient(model, params, images, key))
    kernels = [
        tree.get("map", tree)["kernel"]
        for source in (gradient, params)
        for _, tree in sorted(source.items())
    ]
    rms = np.array([np.sqrt(np.mean(np.square(kernel))) for kernel in kernels])
    half = len(rms) // 2
    return rms[:half] / rms[half:]


@pytest.mark.parametrize("name", NAMES)
def test_balanced_layers_learn_at_one_rate_and_features_stay(name):
    model, params, images = without_batch_norm(name)
    key = jax.random.key(3)
    before = rates(model, params, images, key)
    new = rescale.balance_layers(model, params, images, key)
    after = rates(model, new, images, key)
    assert before.max() / before.min() > 2
    assert after.max() / after.min() < 1.01
    np.testing.assert_allclose(np.std(linear_outputs(model, new, images)["head"]), 1, atol=1e-3)
    z = [apply(model, p, {}, images)[0]["z"] for p in (params, new)]
    np.testing.assert_allclose(*z, atol=1e-5)


def test_a_layer_without_a_gradient_is_named():
    model, params, images = without_batch_norm("convnet")
    params["conv2"]["map"]["bias"][:] = -1e6
    with pytest.raises(ValueError, match="expected a gradient in every layer.*conv1, conv2"):
        rescale.balance_layers(model, params, images, jax.random.key(0))


def test_rescaling_refuses_batch_norm_and_unknown_layers():
    model, params, images = without_batch_norm("convnet")
    with pytest.raises(ValueError, match="unknown layer 'z'. Known: conv1, conv2, fc3, head"):
        rescale.rescale_channels(model, params, images, layers=("z",))
    normed = dataclasses.replace(model, spec=dataclasses.replace(model.spec, batch_norm=True))
    with pytest.raises(ValueError, match="without batch norm.*fold it first"):
        rescale.rescale_channels(normed, params, images)
    with pytest.raises(ValueError, match="without batch norm.*fold it first"):
        rescale.balance_layers(normed, params, images, jax.random.key(0))
