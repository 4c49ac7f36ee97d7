import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax import models
from nat_jax.models import frontend
from nat_jax.models.layers import unit_norm


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)


def small(**options) -> models.Model:
    settings = dict(dim=8, image_size=16, frontend="sobel", widths=(4, 8), pools=2) | options
    return models.make_model("convnet", **settings)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(model, *arguments, **options):
    return model.apply(*arguments, **options)


def test_standardise_gives_zero_mean_and_unit_deviation_per_image(images):
    x = np.asarray(jax.jit(frontend.standardise)(images))
    np.testing.assert_allclose(x.mean(axis=(1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(1, 2, 3)), 1, atol=1e-4)


def test_standardise_is_finite_on_a_constant_image():
    constant = np.full((1, 4, 4, 3), 200, np.uint8)
    np.testing.assert_allclose(jax.jit(frontend.standardise)(constant), 0, atol=1e-3)


def test_sobel_of_a_vertical_edge_is_horizontal_only():
    edge = np.zeros((1, 9, 9, 3), np.uint8)
    edge[:, :, 5:] = 255
    inner = np.asarray(jax.jit(frontend.sobel)(edge))[0, 1:-1, 1:-1]
    assert np.abs(inner[..., 0]).max() > 1
    np.testing.assert_allclose(inner[..., 1], 0, atol=1e-5)


def test_sobel_matches_the_authors_kernel():
    kernel = frontend.sobel_kernel()
    expected = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 3
    for colour in range(3):
        np.testing.assert_allclose(kernel[:, :, colour, 0], expected, rtol=1e-6)
        np.testing.assert_allclose(kernel[:, :, colour, 1], expected.T, rtol=1e-6)


def test_highpass_removes_a_constant_but_not_a_spot():
    image = np.full((1, 11, 11, 3), 100, np.uint8)
    image[0, 5, 5] = 200
    filtered = np.asarray(jax.jit(frontend.highpass)(image))[0, :, :, 0]
    assert abs(filtered[5, 5]) > 1
    # Two pixels from the spot and the border the kernel sees a constant region.
    np.testing.assert_allclose(filtered[2, 2], 0, atol=1e-5)


def test_unit_norm_of_zero_has_a_finite_gradient():
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(unit_norm(x))))(np.zeros((1, 3), np.float32))
    assert np.all(np.isfinite(gradient))


def test_features_have_unit_norm_and_layers_their_names(images):
    model = small(fc_width=12)
    outputs, _ = apply(model, *model.init(jax.random.key(0)), images)
    assert model.layer_names == ("conv1", "conv2", "fc3", "z")
    assert tuple(outputs) == ("conv1", "conv2", "fc3", "logits", "z")
    assert outputs["conv2"].shape == (6, 4, 4, 8)
    assert outputs["z"].dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(outputs["z"], axis=1), 1, atol=1e-6)


def test_training_mode_uses_and_updates_batch_statistics(images):
    model = small()
    params, stats = model.init(jax.random.key(0))
    trained, new_stats = apply(model, params, stats, images, train=True)
    tested, same_stats = apply(model, params, stats, images)
    assert not np.allclose(trained["z"], tested["z"])
    jax.tree.map(np.testing.assert_array_equal, stats, same_stats)
    # Torch's momentum 0.1: the new mean is 0.9 * old (zero) + 0.1 * batch.

    @jax.jit
    def convolve(images, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        gradients = frontend.sobel(images)
        return jax.lax.conv_general_dilated(
            gradients, kernel, (1, 1), "SAME", dimension_numbers=dimensions
        )

    conv = np.asarray(convolve(images, params["conv1"]["map"]["kernel"]))
    batch_mean = np.mean(conv + np.asarray(params["conv1"]["map"]["bias"]), axis=(0, 1, 2))
    np.testing.assert_allclose(new_stats["conv1"]["norm"]["mean"], 0.1 * batch_mean, atol=1e-5)


def test_dropout_depends_on_the_key_and_only_in_training(images):
    model = small(fc_width=16, dropout=0.5)
    weights = model.init(jax.random.key(0))

    def z(train, seed):
        return apply(model, *weights, images, train=train, key=jax.random.key(seed))[0]["z"]

    assert not np.allclose(z(True, 1), z(True, 2))
    np.testing.assert_array_equal(z(True, 1), z(True, 1))
    np.testing.assert_array_equal(z(False, 1), z(False, 2))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(images):
    model = small(dtype="bfloat16")
    params, stats = model.init(jax.random.key(0))
    outputs, new_stats = apply(model, params, stats, images, train=True)
    assert outputs["conv1"].dtype == jnp.bfloat16
    assert outputs["z"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((params, new_stats))} == {jnp.dtype("float32")}


def test_alexnet_has_the_authors_shapes():
    model = models.make_model("alexnet", dim=2048, image_size=224, frontend="sobel")
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    shapes = {name: leaf["map"]["kernel"].shape for name, leaf in params.items() if name != "head"}
    assert shapes == {
        "conv1": (11, 11, 2, 96),
        "conv2": (5, 5, 96, 256),
        "conv3": (3, 3, 256, 384),
        "conv4": (3, 3, 384, 384),
        "conv5": (3, 3, 384, 256),
        "fc6": (9216, 4096),
        "fc7": (4096, 4096),
    }
    assert params["head"]["kernel"].shape == (4096, 2048)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8)
    outputs, _ = jax.eval_shape(lambda *a: model.apply(*a), params, stats, images)
    sides = {name: out.shape[1] for name, out in outputs.items() if out.ndim == 4}
    assert sides == {"conv1": 27, "conv2": 13, "conv3": 13, "conv4": 13, "conv5": 6}


def test_alexnet_starts_as_torch_does():
    model = models.make_model("alexnet", dim=8, image_size=64, frontend="rgb", fc_width=32)
    params, _ = jax.device_get(model.init(jax.random.key(0)))
    for name, fan_in in (("conv1", 3 * 11 * 11), ("conv3", 256 * 9)):
        kernel, bias = params[name]["map"]["kernel"], params[name]["map"]["bias"]
        for values in (kernel, bias):
            assert np.abs(values).max() <= fan_in**-0.5
        assert np.abs(kernel).max() > 0.95 * fan_in**-0.5
    scale = params["conv3"]["norm"]["scale"]
    assert 0 <= scale.min() < 0.1 < 0.9 < scale.max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="vgg"), "unknown model 'vgg'. Known: alexnet, convnet"),
        (dict(frontend="edges"), "unknown front end 'edges'. Known: rgb, highpass, sobel"),
        (dict(dtype="float16"), "expected one of float32, bfloat16; got 'float16'"),
        (dict(dim=1), "expected D >= 2; got 1"),
        (dict(depth=3), "convnet has no option depth. Known: widths, pools"),
        (dict(image_size=2), "an image of 2 pixels vanishes at conv2"),
    ],
)
def test_a_wrong_setting_is_named(change, message):
    settings = dict(name="convnet", dim=8, image_size=16, frontend="sobel") | change
    with pytest.raises(ValueError, match=message):
        models.make_model(settings.pop("name"), **settings)
