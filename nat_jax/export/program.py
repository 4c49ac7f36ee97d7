"""A network's features as a StableHLO program, which needs JAX but not nat_jax.

The program takes the weights as an argument, as ``weights.npz`` has them, so that they are on disk
once. It runs on CPUs, NVIDIA GPUs and TPUs, with any number of images. JAX promises to run it for
six months after the version that wrote it; bundles have no such end.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from flax import traverse_util
from jax import export

from nat_jax.models.frozen import FrozenModel, layer_outputs, resolve_layers

PROGRAM = "features.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def program(network: FrozenModel, layers: Sequence[str], max_features: int | None = None) -> bytes:
    """Return the program: ``jax.export.deserialize(bytearray).call(weights, images)``.

    It takes {name: float32[...]}, the arrays of ``weights.npz``, and uint8[B, S, S, 3] for any B;
    it returns {layer: float[B, ...]}, in evaluation mode.

    Args:
        network: whose definition is written.
        layers: names out of ``model.layer_names``, or "last_conv".
        max_features: feature maps of more values are average-pooled; None leaves them as they are.

    Raises:
        ValueError: unknown layer.
    """
    # Not the form of max-pooling that suits a CPU's gradients: one program is for all.
    model = dataclasses.replace(network.model, platform=PLATFORMS[-1])
    chosen = resolve_layers(layers, model)

    def features(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, jax.Array]:
        parts = {"batch_stats": {}, **traverse_util.unflatten_dict(weights, sep="/")}
        return layer_outputs(
            model, chosen, max_features, parts["params"], parts["batch_stats"], images
        )

    weights = {
        name: jax.ShapeDtypeStruct(array.shape, array.dtype)
        for name, array in network.named_weights().items()
    }
    size = model.image_size
    shape = export.symbolic_shape(f"batch, {size}, {size}, 3")
    images = jax.ShapeDtypeStruct(shape, np.uint8)
    exported = export.export(jax.jit(features), platforms=PLATFORMS)(weights, images)
    return bytes(exported.serialize())
