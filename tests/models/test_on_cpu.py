"""The CPU's forms of layers against XLA's own, and that accelerators keep theirs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nat_jax.models import frontend, make_model, on_cpu


def random(*shape: int, seed: int = 0, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def with_gradients(function, *arguments):
    """Return a function's value, and the gradients of its sum with varying weights."""

    def weighted(*arguments):
        y = function(*arguments)
        return jnp.sum(y.astype("float32") * jnp.cos(jnp.arange(y.size).reshape(y.shape))), y

    numbers = tuple(range(len(arguments)))
    (_, y), gradients = jax.jit(jax.value_and_grad(weighted, numbers, has_aux=True))(*arguments)
    return [np.asarray(x, np.float32) for x in (y, *gradients)]


def assert_close(found, expected, tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def plain(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(
    ("side", "size", "stride", "pad", "channels", "patch_bytes", "dtype"),
    [
        (7, 3, 1, 1, 2, 1, "float32"),  # few values in a patch: the product with all patches
        (2, 3, 1, 1, 4, 1, "float32"),  # a kernel larger than the image: likewise
        (8, 3, 2, 1, 4, 1, "float32"),  # the others image by image
        (9, 5, 1, 2, 4, 1, "float32"),
        (31, 11, 4, 2, 2, 1, "float32"),
        (10, 5, 2, 0, 2, 30_000, "float32"),  # two images at once
        (8, 3, 1, 1, 4, 1_000_000, "float32"),  # all at once
        (8, 3, 1, 1, 4, 1, "bfloat16"),
    ],
)
def test_convolution(monkeypatch, side, size, stride, pad, channels, patch_bytes, dtype):
    monkeypatch.setattr(on_cpu, "_PATCH_BYTES", patch_bytes)
    x = random(6, side, side + 1, channels, dtype=dtype)
    kernel = random(size, size, channels, 5, seed=1, dtype=dtype)
    strides, padding = (stride, stride), ((pad, pad), (pad, pad))

    def ours(x, kernel):
        return on_cpu.conv_general_dilated(x, kernel, strides, padding)

    found = with_gradients(ours, x, kernel)
    expected = with_gradients(lambda x, kernel: plain(x, kernel, strides, padding), x, kernel)
    assert_close(found, expected, 2e-6 if dtype == "float32" else 1e-2)
    with pytest.raises(AssertionError):
        assert_close(found, [expected[0], expected[1], expected[2][::-1]], 1e-2)


def pooled_last(x, mean, scale, bias, window, stride):
    y = nnx.relu((x.astype(jnp.float32) - mean) * scale + bias).astype(x.dtype)
    return nnx.max_pool(y, (window, window), (stride, stride), "VALID")


@pytest.mark.parametrize(
    ("window", "stride", "side", "images"),
    [(2, 2, 6, 1), (2, 2, 7, 4), (3, 2, 7, 1), (3, 2, 8, 4), (3, 1, 6, 1), (2, 3, 7, 1)],
)
def test_pooling_before_normalisation(window, stride, side, images):
    """Statistics of the batch or of each of 4 images, and scales of both signs."""
    x = random(4, side, side + 2, 3)
    mean, bias = random(images, 1, 1, 3, seed=1), random(3, seed=3)
    scale = random(images, 1, 1, 3, seed=2) * np.float32([1, -1, 1])
    arguments = x, mean, scale, bias
    found = with_gradients(lambda *a: on_cpu.normalise_pool(*a, window, stride), *arguments)
    expected = with_gradients(lambda *a: pooled_last(*a, window, stride), *arguments)
    assert_close(found, expected, 2e-6)
    with pytest.raises(AssertionError):
        assert_close(found, [expected[0], -expected[1], *expected[2:]], 1e-2)


def test_equal_values_share_no_gradient():
    x = jnp.ones((1, 4, 4, 1))
    (gradient,) = jax.grad(
        lambda x: jnp.sum(on_cpu.normalise_pool(x, *np.float32([0, 1, 0]), 2, 2)), argnums=(0,)
    )(x)
    first = np.zeros((4, 4))
    first[::2, ::2] = 1
    np.testing.assert_array_equal(gradient[0, :, :, 0], first)


@pytest.mark.parametrize("name", ["sobel", "highpass"])
def test_front_end(name):
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 11, 3), np.uint8)
    ours, theirs = (frontend.FRONTENDS[name][0](images, p) for p in ("cpu", "gpu"))
    assert_close([ours], [theirs], 2e-6)


def test_a_network_is_the_same_on_all_platforms():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    ours, theirs = (
        make_model(
            "convnet",
            dim=6,
            image_size=16,
            frontend="sobel",
            platform=platform,
            widths=(4, 6),
            pools=1,
        )
        for platform in ("cpu", "gpu")
    )
    params, stats = ours.init(jax.random.key(0))

    def run(model):
        def loss(params):
            outputs, new = model.apply(params, stats, images, train=True)
            return jnp.sum(outputs["z"][:, 0]), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    found, expected = map(run, (ours, theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


@pytest.mark.parametrize(("platform", "own_forms"), [("cpu", True), ("gpu", False), ("tpu", False)])
def test_accelerators_keep_the_forms_of_xla(platform, own_forms):
    model = make_model("alexnet", dim=8, image_size=67, frontend="sobel", platform=platform)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, 67, 67, 3), np.uint8)

    def features(params, stats, images):
        return model.apply(params, stats, images, train=True, key=jax.random.key(0))[0]["z"]

    program = str(jax.make_jaxpr(features)(*shapes, images))
    assert ("custom_vjp_call" in program) == own_forms
    assert ("reduce_window_max" in program) != own_forms


def test_compiler_options_are_of_cpus_and_change_no_result():
    x, kernel = random(4, 6, 6, 8), random(3, 3, 8, 16)
    convolve = functools.partial(plain, strides=(1, 1), padding=((1, 1), (1, 1)))
    chosen = jax.jit(convolve, compiler_options=on_cpu.compiler_options("cpu"))(x, kernel)
    assert_close([chosen], [convolve(x, kernel)], 1e-5)
    assert on_cpu.compiler_options("gpu") is on_cpu.compiler_options("tpu") is None


def test_an_xla_that_does_not_know_the_options_compiles_with_its_own(monkeypatch):
    monkeypatch.setattr(on_cpu, "_YNNPACK", "no such type")
    on_cpu.compiler_options.cache_clear()
    assert on_cpu.compiler_options("cpu") is None
    on_cpu.compiler_options.cache_clear()
