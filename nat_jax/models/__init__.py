"""Networks as pure functions over plain dicts of arrays.

Flax NNX defines the modules in this package; nothing outside it sees a module. A network is a
``Spec`` returned by one of ``MODELS``; ``Model`` turns it into ``init`` and ``apply``.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nat_jax.errors import InputError
from nat_jax.models.alexnet import alexnet
from nat_jax.models.convnet import convnet
from nat_jax.models.frontend import FRONTENDS
from nat_jax.models.layers import Layers, Spec, Watch

MODELS: dict[str, Callable[..., Spec]] = {
    "alexnet": alexnet,
    "convnet": convnet,
}
DTYPES = ("float32", "bfloat16")

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """A network's definition; hashable, so that equal definitions share compiled functions.

    Attributes:
        spec: the layers.
        dim: D, the feature dimension.
        image_size: side of the square input in pixels.
        frontend: a key of ``FRONTENDS``.
        dtype: compute dtype; parameters and batch statistics are float32 throughout.
        platform: "cpu", "gpu" or "tpu"; on CPUs layers are written in other forms (``on_cpu``).
        bn_groups: equal parts of a training batch that batch norm takes its statistics over.
    """

    spec: Spec
    dim: int
    image_size: int
    frontend: str
    dtype: str
    platform: str
    bn_groups: int = 1

    def init(self, key: jax.Array) -> tuple[Params, Params]:
        """Return fresh parameters and batch statistics, compiled as one program."""
        return _init(self, key)

    def apply(
        self,
        params: Params,
        batch_stats: Params,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        watch: Watch | None = None,
    ) -> tuple[dict[str, jax.Array], Params]:
        """Return every layer's output, and the head's, by name, and the new batch statistics.

        Args:
            params: as returned by ``init``.
            batch_stats: running means and variances.
            images: uint8[B, H, W, 3].
            train: use the batch's own statistics (over the global batch, or each of its
                ``bn_groups`` parts) and dropout.
            key: PRNG key of the dropout masks.
            watch: see ``layers.Layers``.
        """
        graphdef, *states = nnx.split(_abstract_layers(self), nnx.Param, nnx.BatchStat, ...)
        params_state, stats_state, rest = states
        nnx.replace_by_pure_dict(params_state, params)
        nnx.replace_by_pure_dict(stats_state, batch_stats)
        # copy=True: variables of an outer trace cannot be updated inside a gradient's trace.
        network = nnx.merge(graphdef, params_state, stats_state, rest, copy=True)
        watching = {} if watch is None else {"watch": watch}
        outputs = network(images, train=train, key=key, **watching)
        return outputs, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Return the names of the layers that are features, first to last."""
        convs, denses = len(self.spec.convs), len(self.spec.denses)
        names = [f"conv{i + 1}" for i in range(convs)]
        return (*names, *(f"fc{convs + i + 1}" for i in range(denses)), "z")

    @property
    def last_conv(self) -> str:
        """Return the name of the last convolutional layer."""
        return f"conv{len(self.spec.convs)}"


def make_model(
    name: str,
    *,
    dim: int,
    image_size: int,
    frontend: str,
    dtype: str = "float32",
    platform: str | None = None,
    bn_groups: int = 1,
    **options: Any,
) -> Model:
    """Look a network up by name and check its settings.

    Args:
        name: a key of ``MODELS``.
        dim: D, the feature dimension.
        image_size: side of the square input in pixels.
        frontend: a key of ``FRONTENDS``.
        dtype: "float32" or "bfloat16".
        platform: where it will run; the default backend if None.
        bn_groups: parts of a training batch, each with batch-norm statistics of its own.
        **options: arguments of the network's function, for instance ``widths`` of "convnet"; lists,
            as JSON has them, become tuples.

    Raises:
        ValueError: unknown name, front end, dtype or option; an image too small for the layers.
    """
    if name not in MODELS:
        raise InputError(f"model.name: unknown model {name!r}. Known: {', '.join(MODELS)}")
    if frontend not in FRONTENDS:
        raise InputError(
            f"model.frontend: unknown front end {frontend!r}. Known: {', '.join(FRONTENDS)}"
        )
    if dtype not in DTYPES:
        raise InputError(f"model.dtype: expected one of {', '.join(DTYPES)}; got {dtype!r}")
    if bn_groups < 1:
        raise InputError(f"model.bn_groups: expected at least 1; got {bn_groups}")
    if dim < 2:
        raise InputError(f"model.dim: expected D >= 2; got {dim}")
    known = inspect.signature(MODELS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(
            f"model: {name} has no option {', '.join(unknown)}. Known: {', '.join(known)}"
        )
    spec = MODELS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
    platform = platform or jax.default_backend()
    model = Model(spec, dim, image_size, frontend, dtype, platform, bn_groups)
    _abstract_layers(model)  # raises if the image is too small for the layers
    return model


def _layers(model: Model, rngs: nnx.Rngs) -> Layers:
    return Layers(
        model.spec,
        dim=model.dim,
        image_size=model.image_size,
        frontend=model.frontend,
        dtype=jnp.dtype(model.dtype),
        platform=model.platform,
        bn_groups=model.bn_groups,
        rngs=rngs,
    )


@functools.cache
def _abstract_layers(model: Model) -> Layers:
    return nnx.eval_shape(lambda: _layers(model, nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Model, key: jax.Array) -> tuple[Params, Params]:
    network = _layers(model, nnx.Rngs(params=key))
    params, batch_stats = nnx.state(network, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
