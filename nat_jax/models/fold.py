"""Fold batch norm into the linear maps that precede it.

The transfer protocol of VOC 2007 (Krähenbühl et al., ICLR 2016) uses networks without batch norm;
the paper folds its running statistics into the kernels before it transfers them (section 4).
"""

import dataclasses

import jax
import numpy as np

from nat_jax.models import Model, Params
from nat_jax.models.layers import EPSILON


def fold_batch_norm(model: Model, params: Params, batch_stats: Params) -> tuple[Model, Params]:
    """Return a network without batch norm that computes what this one does in evaluation mode.

    With m and v the running mean and variance, g and b the scale and bias of batch norm, and
    s = g / sqrt(v + 1e-5), each kernel becomes kernel * s by output channel and each bias
    (bias - m) * s + b. In bfloat16 the outputs agree only to that type's rounding.

    Args:
        model: a network with batch norm.
        params: its parameters, float32.
        batch_stats: its running means and variances, float32.

    Returns:
        The network's definition, and its parameters float32 on the host; it has no batch
        statistics: pass ``{}``.

    Raises:
        ValueError: the network has no batch norm.
    """
    if not model.spec.batch_norm:
        raise ValueError("fold_batch_norm: expected a network with batch norm; got one without")
    params, batch_stats = jax.device_get((params, batch_stats))
    folded = {
        name: _fold(block, batch_stats[name]["norm"]) if "norm" in block else block
        for name, block in params.items()
    }
    spec = dataclasses.replace(model.spec, batch_norm=False)
    return dataclasses.replace(model, spec=spec), folded


def _fold(block: Params, stats: Params) -> Params:
    linear, norm = block["map"], block["norm"]
    # In double precision, so that what is left is the rounding of the result.
    scale = norm["scale"] / np.sqrt(stats["var"].astype(np.float64) + EPSILON)
    kernel = linear["kernel"] * scale
    bias = (linear["bias"] - stats["mean"].astype(np.float64)) * scale + norm["bias"]
    return {"map": {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}}
