"""Data-dependent rescaling of a network without batch norm, for transfer learning.

After Krähenbühl et al., Data-dependent initializations of convolutional neural networks (ICLR
2016): first every channel of the newly initialised layers, then complete layers, so that all of
them learn at the same rate. Layers that were trained keep their channels as they are.
"""

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax.models import Model, Params

logger = logging.getLogger(__name__)

# Of a channel's deviation to the layer's; below, a channel is constant but for rounding.
_CONSTANT = 1e-5
HEAD = "head"


def layers_with_weights(model: Model) -> tuple[str, ...]:
    """Return the names of a network's linear maps, first to last; that to z is "head"."""
    return (*model.layer_names[:-1], HEAD)


def rescale_channels(
    model: Model,
    params: Params,
    images: jax.Array | np.ndarray,
    *,
    layers: Sequence[str] | None = None,
    bias: float = 0.1,
) -> Params:
    """Rescale every channel to unit variance and a common mean over some images, layer by layer.

    What a linear map returns for a channel, over all images and pixels, has mean m and deviation s
    before; its kernel is divided by s, and its bias becomes (old - m) / s + ``bias``, so that mean
    and deviation are ``bias`` and 1. A channel that is constant keeps its kernel, with a warning.

    Args:
        model: a network without batch norm, such as ``fold_batch_norm`` returns.
        params: its parameters, float32.
        images: uint8[B, H, W, 3], all used at once; the authors of the method take 160.
        layers: names from ``layers_with_weights``, such as those initialised afresh; all if None.
            The others stay as they are.
        bias: mean of every channel; the authors' 0.1 keeps ReLUs alive.

    Returns:
        The parameters, float32 on the host.

    Raises:
        ValueError: unknown layer, or the network has batch norm.
    """
    chosen = _checked(model, layers)

    @jax.jit
    def measure(params: Params, images: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = {}

        def normalise(name: str, x: jax.Array) -> jax.Array:
            if name not in chosen:
                return x
            channels = x.astype(jnp.float32).reshape(-1, x.shape[-1])
            mean = jnp.mean(channels, axis=0)
            deviation = jnp.std(channels, axis=0)
            least = _CONSTANT * jnp.sqrt(jnp.mean(jnp.square(channels)))
            deviation = jnp.where(deviation > least, deviation, 0.0)
            found[name] = mean, deviation
            return ((x - mean) / jnp.where(deviation > 0, deviation, 1.0) + bias).astype(x.dtype)

        model.apply(params, {}, images, watch=normalise)
        return found

    params, found = jax.device_get((params, measure(params, jnp.asarray(images))))
    for name, (mean, deviation) in found.items():
        if constant := int(np.sum(deviation == 0)):
            logger.warning(
                "rescaling: %d of %d channels of %s are the same everywhere in these images and "
                "keep their kernels",
                constant,
                len(deviation),
                name,
            )
        scale = np.where(deviation > 0, deviation, np.float32(1))
        old = _linear(params, name)
        new = {"kernel": old["kernel"] / scale, "bias": (old["bias"] - mean) / scale + bias}
        params = _with(params, name, {k: v.astype(np.float32) for k, v in new.items()})
    return params


def balance_layers(
    model: Model, params: Params, images: jax.Array | np.ndarray, key: jax.Array
) -> Params:
    """Scale the layers so that a gradient changes all of them at the same relative rate.

    A layer's rate is rms(gradient of its kernel) / rms(kernel), the gradient being that of white
    noise at the network's top, before features are brought to unit norm. The outputs there come to
    unit deviation. One round is exact, as scaling a layer scales whatever follows: all layers'
    outputs are what they were but for a factor each, and features z are what they were.

    Args:
        model: a network without batch norm.
        params: its parameters, float32.
        images: uint8[B, H, W, 3], all used at once.
        key: PRNG key of the noise.

    Returns:
        The parameters, float32 on the host.

    Raises:
        ValueError: the network has batch norm, or a layer gets no gradient on these images.
    """
    names = _checked(model, None)

    @jax.jit
    def measure(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        def top(params: Params) -> jax.Array:
            found = {}

            def note(name: str, x: jax.Array) -> jax.Array:
                found[name] = x.astype(jnp.float32)
                return x

            model.apply(params, {}, images, watch=note)
            return found[HEAD]

        output, pull_back = jax.vjp(top, params)
        (gradient,) = pull_back(jax.random.normal(key, output.shape, output.dtype))
        rates = [
            _rms(_linear(gradient, name)["kernel"]) / _rms(_linear(params, name)["kernel"])
            for name in names
        ]
        return jnp.stack(rates), jnp.std(output)

    params = jax.device_get(params)
    rates, deviation = jax.device_get(measure(params, jnp.asarray(images)))
    if not (np.all(rates > 0) and np.all(np.isfinite(rates)) and deviation > 0):
        stuck = [name for name, rate in zip(names, rates, strict=True) if not rate > 0]
        raise ValueError(
            "balance_layers: expected a gradient in every layer, and outputs that differ; got none "
            f"in {', '.join(stuck) or 'the last'}. Rescale the channels first, or take other images"
        )
    # With these, the product of the scales is 1 / deviation, and every rate becomes the same.
    target = np.exp(np.mean(np.log(rates))) * deviation ** (2 / len(names))
    so_far = 1.0  # by how much a layer's output grows: its bias has to grow alike
    for name, scale in zip(names, np.sqrt(rates / target), strict=True):
        so_far *= scale
        old = _linear(params, name)
        new = {"kernel": old["kernel"] * scale, "bias": old["bias"] * so_far}
        params = _with(params, name, {k: v.astype(np.float32) for k, v in new.items()})
    return params


def _checked(model: Model, layers: Sequence[str] | None) -> tuple[str, ...]:
    if model.spec.batch_norm:
        raise ValueError(
            "rescaling: expected a network without batch norm, which would undo it; fold it first "
            "(nat_jax.models.fold.fold_batch_norm)"
        )
    known = layers_with_weights(model)
    for name in layers or ():
        if name not in known:
            raise ValueError(f"rescaling: unknown layer {name!r}. Known: {', '.join(known)}")
    return known if layers is None else tuple(layers)


def _linear(params: Params, name: str) -> Params:
    return params[name] if name == HEAD else params[name]["map"]


def _with(params: Params, name: str, linear: Params) -> Params:
    return {**params, name: linear if name == HEAD else {**params[name], "map": linear}}


def _rms(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x)))
