"""Batch norm with statistics over parts of the batch, as on the authors' two GPUs."""

import functools

import jax
import numpy as np
import pytest

from nat_jax import models

PARTS, B = 2, 12


def network(bn_groups: int, **settings) -> models.Model:
    options = dict(dim=8, image_size=16, frontend="sobel", widths=(4, 8), pools=2, fc_width=16)
    return models.make_model("convnet", bn_groups=bn_groups, **(options | settings))


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(model, *arguments, train=False):
    return model.apply(*arguments, train=train)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (B, 16, 16, 3), np.uint8)
    images[B // 2 :, :, 8:] = 0  # the halves differ, and so do their statistics
    return images


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_each_part_is_as_if_it_were_alone(images, dtype):
    together, alone = network(PARTS, dtype=dtype), network(1, dtype=dtype)
    params, stats = alone.init(jax.random.key(0))
    outputs, new_stats = apply(together, params, stats, images, train=True)
    halves = [apply(alone, params, stats, half, train=True) for half in np.split(images, PARTS)]
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for name, found in outputs.items():
        expected = np.concatenate([np.asarray(half[name], np.float32) for half, _ in halves])
        np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=tolerance)
        assert found.dtype == halves[0][0][name].dtype
    mean = jax.tree.map(lambda *parts: np.mean(parts, axis=0), *(stats for _, stats in halves))
    for found, expected in zip(*map(jax.tree.leaves, (new_stats, mean)), strict=True):
        np.testing.assert_allclose(found, expected, atol=tolerance)


def test_the_whole_batch_gives_something_else(images):
    params, stats = network(1).init(jax.random.key(0))
    parts, whole = (
        apply(network(n), params, stats, images, train=True)[0]["z"] for n in (PARTS, 1)
    )
    assert np.abs(parts - whole).max() > 0.1


def test_evaluation_knows_no_parts(images):
    params, stats = network(1).init(jax.random.key(0))
    parts, whole = (apply(network(n), params, stats, images[:5])[0]["z"] for n in (PARTS, 1))
    np.testing.assert_array_equal(parts, whole)


def test_parts_that_do_not_divide_are_refused(images):
    params, stats = network(1).init(jax.random.key(0))
    with pytest.raises(ValueError, match="bn_groups: expected a divisor of the batch of 12; got 5"):
        apply(network(5), params, stats, images, train=True)
    with pytest.raises(ValueError, match="model.bn_groups: expected at least 1; got 0"):
        network(0)
