"""Convolution blocks, fully connected blocks and a unit-norm head, the parts of every network."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from nat_jax.errors import InputError
from nat_jax.models import on_cpu
from nat_jax.models.frontend import FRONTENDS

# The authors' nn.Normalize guards its division with 1e-10.
_NORM_FLOOR = 1e-10

# What batch norm adds to variances, as Torch 7 does.
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution block: convolution, batch norm, ReLU and optionally max-pooling.

    Attributes:
        features: output channels.
        kernel: side of the kernel.
        stride: of the convolution.
        pad: zeros at each edge.
        pool: window and stride of the max-pooling; None: no pooling.
    """

    features: int
    kernel: int
    stride: int = 1
    pad: int = 0
    pool: tuple[int, int] | None = None

    def output_side(self, side: int) -> int:
        """Return the side of the output map for an input map of side ``side``."""
        side = (side + 2 * self.pad - self.kernel) // self.stride + 1
        if self.pool is not None:
            window, stride = self.pool
            side = (side - window) // stride + 1
        return side


@dataclasses.dataclass(frozen=True)
class Dense:
    """A fully connected block: linear map, batch norm, ReLU and optionally dropout."""

    features: int
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Spec:
    """A network as data. Layers are named conv1, conv2, ..., then fc<n>, then z.

    Attributes:
        convs: the convolution blocks.
        denses: the fully connected blocks between the last convolution and the features.
        torch_init: the authors' initialisation (Torch 7: weights and biases uniform in
            +-1/sqrt(fan_in), batch-norm scales uniform in [0, 1]) instead of He initialisation.
        batch_norm: whether the blocks have it; ``fold.fold_batch_norm`` makes networks without.
    """

    convs: tuple[Conv, ...]
    denses: tuple[Dense, ...] = ()
    torch_init: bool = False
    batch_norm: bool = True


def unit_norm(x: jax.Array) -> jax.Array:
    """Scale rows [..., D] to unit length in float32, whatever the compute dtype."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, _NORM_FLOOR**2))


Init = Callable[..., jax.Array]

# (layer name, output [B, ..., C] of its linear map) -> the value passed on in its place.
Watch = Callable[[str, jax.Array], jax.Array]


def _initialisers(fan_in: int, torch_init: bool) -> tuple[Init, Init, Init]:
    """Return initialisers of kernels, biases and batch-norm scales."""
    init = jax.nn.initializers
    if not torch_init:
        return init.he_normal(), init.zeros, init.ones
    bound = fan_in**-0.5

    def symmetric(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return symmetric, symmetric, init.uniform(1.0)


def _unwatched(name: str, output: jax.Array) -> jax.Array:
    return output


def batch_statistics(norm: nnx.BatchNorm, x: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Return what training-mode batch norm subtracts, and by what it multiplies the rest.

    Each part of the batch has statistics of its own. Only the means over each image's pixels are
    regrouped, so that devices exchange [B, C] values at the most, however the parts lie on them.

    Args:
        norm: whose running statistics follow the mean over the parts.
        x: [B, ..., C].
        parts: how many consecutive parts B is divided into.

    Returns:
        Two float32[B, ..., C], of one pixel; [1, ..., C] for one part.

    Raises:
        ValueError: B cannot be divided.
    """
    batch, pixels = x.shape[0], tuple(range(1, x.ndim - 1))
    if batch % parts:
        raise InputError(
            f"model.bn_groups: expected a divisor of the batch of {batch}; got {parts}"
        )

    def mean_of_part(x: jax.Array) -> jax.Array:
        if parts == 1:
            return jnp.mean(x, axis=(0, *pixels))[None]
        each_image = jnp.mean(x, axis=pixels)
        return jnp.mean(each_image.reshape(parts, -1, x.shape[-1]), axis=1)

    def to_each_image(of_part: jax.Array) -> jax.Array:
        each = of_part if parts == 1 else jnp.repeat(of_part, batch // parts, axis=0)
        return jnp.expand_dims(each, pixels)

    x = x.astype(jnp.float32)
    mean = mean_of_part(x)
    variance = jnp.maximum(mean_of_part(jnp.square(x)) - jnp.square(mean), 0.0)
    for running, new in ((norm.mean, mean), (norm.var, variance)):
        running[...] = norm.momentum * running[...] + (1 - norm.momentum) * jnp.mean(new, axis=0)
    scale = jax.lax.rsqrt(variance + norm.epsilon) * norm.scale[...]  # type: ignore[index]
    return to_each_image(mean), to_each_image(scale)


class Block(nnx.Module):
    """A linear map (convolution or matrix), optional batch norm, and ReLU.

    The map keeps its bias, as in the authors' code, although batch norm cancels it.
    """

    def __init__(
        self,
        map_: nnx.Conv | nnx.Linear,
        features: int,
        scale_init: Init,
        *,
        batch_norm: bool,
        bn_groups: int,
        platform: str,
        dtype,
        rngs,
    ):
        self.map, self.bn_groups, self.platform = map_, bn_groups, platform
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, epsilon=EPSILON, dtype=dtype)
        self.norm = norm(features, scale_init=scale_init, rngs=rngs) if batch_norm else None

    def after_map(
        self, x: jax.Array, *, train: bool, pool: tuple[int, int] | None = None
    ) -> jax.Array:
        """Apply batch norm, ReLU and, with ``pool``, max-pooling to the linear map's output."""
        if pool is not None and self.platform == "cpu":
            return on_cpu.normalise_pool(x, *self._normalisation(x, train=train), *pool)
        if self.norm is not None and train and self.bn_groups > 1:
            mean, scale, bias = self._normalisation(x, train=True)
            x = ((x.astype(jnp.float32) - mean) * scale + bias).astype(x.dtype)
        elif self.norm is not None:
            x = self.norm(x, use_running_average=not train)
        x = nnx.relu(x)
        if pool is not None:
            window, stride = pool
            x = nnx.max_pool(x, (window, window), (stride, stride), "VALID")
        return x

    def _normalisation(
        self, x: jax.Array, *, train: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return what batch norm subtracts from ``x``, multiplies by and adds, each float32."""
        if self.norm is None:
            return jnp.float32(0), jnp.float32(1), jnp.float32(0)
        bias = self.norm.bias[...]  # type: ignore[index]
        if train:
            return *batch_statistics(self.norm, x, self.bn_groups), bias
        scale = jax.lax.rsqrt(self.norm.var[...] + self.norm.epsilon) * self.norm.scale[...]  # type: ignore[index]
        return self.norm.mean[...], scale, bias


class Layers(nnx.Module):
    """Front end, convolution blocks, fully connected blocks, unit features."""

    def __init__(
        self,
        spec: Spec,
        *,
        dim: int,
        image_size: int,
        frontend: str,
        dtype: jnp.dtype,
        platform: str,
        bn_groups: int,
        rngs: nnx.Rngs,
    ):
        self.spec, self.frontend, self.dtype, self.platform = spec, frontend, dtype, platform
        block = functools.partial(
            Block,
            batch_norm=spec.batch_norm,
            bn_groups=bn_groups,
            platform=platform,
            dtype=dtype,
            rngs=rngs,
        )
        convolve = on_cpu if platform == "cpu" else jax.lax
        channels, side = FRONTENDS[frontend][1], image_size
        for name, conv in self._named_convs():
            kernel, bias, scale = _initialisers(channels * conv.kernel**2, spec.torch_init)
            layer = nnx.Conv(
                channels,
                conv.features,
                (conv.kernel, conv.kernel),
                strides=(conv.stride, conv.stride),
                padding=((conv.pad, conv.pad), (conv.pad, conv.pad)),
                kernel_init=kernel,
                bias_init=bias,
                dtype=dtype,
                conv_general_dilated=convolve.conv_general_dilated,
                rngs=rngs,
            )
            setattr(self, name, block(layer, conv.features, scale))
            channels, side = conv.features, conv.output_side(side)
            if side < 1:
                raise InputError(
                    f"model: an image of {image_size} pixels vanishes at {name}. "
                    "Raise data.image_size or take fewer or smaller layers"
                )
        width = channels * side * side
        for name, dense in self._named_denses():
            kernel, bias, scale = _initialisers(width, spec.torch_init)
            linear = nnx.Linear(
                width, dense.features, kernel_init=kernel, bias_init=bias, dtype=dtype, rngs=rngs
            )
            setattr(self, name, block(linear, dense.features, scale))
            width = dense.features
        kernel, bias, _ = _initialisers(width, spec.torch_init)
        self.head = nnx.Linear(
            width, dim, kernel_init=kernel, bias_init=bias, dtype=dtype, rngs=rngs
        )

    def _named_convs(self) -> list[tuple[str, Conv]]:
        return [(f"conv{i}", conv) for i, conv in enumerate(self.spec.convs, start=1)]

    def _named_denses(self) -> list[tuple[str, Dense]]:
        first = len(self.spec.convs) + 1
        return [(f"fc{i}", dense) for i, dense in enumerate(self.spec.denses, start=first)]

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        watch: Watch = _unwatched,
    ) -> dict[str, jax.Array]:
        """Return every layer's output by name.

        Args:
            images: uint8[B, H, W, 3].
            train: batch statistics and dropout instead of running statistics.
            key: PRNG key of the dropout masks; needed when ``train`` and the network has dropout.
            watch: sees, and may change, the output of every linear map; that to z is "head".

        Returns:
            ``conv<i>`` [B, h, w, C], after ReLU and the block's pooling; ``fc<i>`` [B, F], after
            ReLU; ``logits`` float32[B, D], what the head returns; ``z``, the same of unit norm.
        """
        outputs = {}
        x = FRONTENDS[self.frontend][0](images, self.platform).astype(self.dtype)
        for name, conv in self._named_convs():
            block = getattr(self, name)
            x = block.after_map(watch(name, block.map(x)), train=train, pool=conv.pool)
            outputs[name] = x
        x = x.reshape(x.shape[0], -1)
        for i, (name, dense) in enumerate(self._named_denses()):
            block = getattr(self, name)
            x = block.after_map(watch(name, block.map(x)), train=train)
            outputs[name] = x
            if train and dense.dropout:
                if key is None:
                    raise ValueError("dropout in training mode needs a PRNG key; pass key=")
                keep = jnp.float32(1.0 - dense.dropout)  # the mask is drawn in its dtype
                mask = jax.random.bernoulli(jax.random.fold_in(key, i), keep, x.shape)
                x = jnp.where(mask, x / keep, 0.0).astype(x.dtype)
        outputs["logits"] = watch("head", self.head(x)).astype(jnp.float32)
        outputs["z"] = unit_norm(outputs["logits"])
        return outputs
