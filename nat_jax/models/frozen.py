"""A network with its weights, in evaluation mode, for evaluation, export and feature extraction."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import traverse_util

from nat_jax.errors import InputError
from nat_jax.models import Model, Params, on_cpu
from nat_jax.models.pooling import pool
from nat_jax.runtime import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenModel:
    """A network with its weights.

    Attributes:
        model: its definition.
        params: parameters, float32.
        batch_stats: batch norm's running means and variances, float32.
    """

    model: Model
    params: Params
    batch_stats: Params

    def extractor(
        self, layers: tuple[str, ...], max_features: int | None
    ) -> Callable[[np.ndarray], dict[str, jax.Array]]:
        """Return a compiled function from images to some layers' outputs.

        Args:
            layers: names out of ``model.layer_names``.
            max_features: feature maps of more values are average-pooled, see ``pooling.pool``; None
                leaves them as they are.

        Returns:
            A function of images uint8[B, H, W, 3] that returns the features of each layer,
            float[B, ...] by name, on all devices of this process.
        """
        outputs = compiled_layer_outputs(self.model.platform)

        def extract(images: np.ndarray) -> dict[str, jax.Array]:
            batch = sharding.local_batch(images)
            return outputs(self.model, layers, max_features, *self._on_devices, batch)

        return extract

    @functools.cached_property
    def _on_devices(self) -> tuple[Params, Params]:
        return sharding.on_local_devices((self.params, self.batch_stats))

    def named_weights(self) -> dict[str, np.ndarray]:
        """Return every array by its path, such as "params/conv1/map/kernel", on the host."""
        parts = {"params": self.params, "batch_stats": self.batch_stats}
        flat = traverse_util.flatten_dict(parts, sep="/")
        return {name: np.asarray(flat[name]) for name in sorted(flat)}

    def fingerprint(self) -> str:
        """Return a sha256 in hex over the definition, but for the platform, and the weights."""
        everywhere = dataclasses.replace(self.model, platform="")
        digest = hashlib.sha256(repr(everywhere).encode())
        for name, array in self.named_weights().items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


@functools.cache
def compiled_layer_outputs(platform: str) -> Callable[..., dict[str, jax.Array]]:
    """Return ``layer_outputs`` as a function of ``jax.jit`` for networks on a platform."""
    return jax.jit(
        layer_outputs,
        static_argnames=("model", "layers", "max_features"),
        compiler_options=on_cpu.compiler_options(platform),
    )


def layer_outputs(
    model: Model,
    layers: tuple[str, ...],
    max_features: int | None,
    params: Params,
    batch_stats: Params,
    images: jax.Array,
) -> dict[str, jax.Array]:
    """Return some layers' outputs; see ``FrozenModel.extractor``."""
    outputs, _ = model.apply(params, batch_stats, images)
    chosen = {name: outputs[name] for name in layers}
    if max_features is None:
        return chosen
    return {name: pool(x, max_features) if x.ndim == 4 else x for name, x in chosen.items()}


def resolve_layers(
    names: Sequence[str], model: Model, what: str = "eval.layers"
) -> tuple[str, ...]:
    """Turn layer names into those of a network, each once.

    Args:
        names: the names; "last_conv" is the last convolution, "all" every layer.
        model: the network.
        what: the key that error messages name.

    Raises:
        ValueError: no name, or an unknown one; the known ones are listed.
    """
    if not names:
        raise InputError(f"{what}: expected at least one; got none")
    short = {"last_conv": (model.last_conv,), "all": model.layer_names}
    resolved = tuple(layer for name in names for layer in short.get(name, (name,)))
    for name in resolved:
        if name not in model.layer_names:
            raise InputError(
                f"{what}: unknown layer {name!r}. Known: last_conv, {', '.join(model.layer_names)}"
            )
    return tuple(dict.fromkeys(resolved))
