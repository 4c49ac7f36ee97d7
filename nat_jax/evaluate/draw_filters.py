"""The task filters (the paper's figure 4): what the first layer looks for in an image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax import report
from nat_jax.models.frontend import kernel_of
from nat_jax.models.frozen import FrozenModel
from nat_jax.report.rows import UNTRAINED
from nat_jax.runtime import atomic_files

_PICTURE = "filters_composed.png"


def composed(network: FrozenModel) -> np.ndarray:
    """Return the first layer's kernels joined with the front end's: what they see of an image.

    Both are linear, so one kernel does what the two do one after the other; at the image's border,
    where each of the two adds zeros of its own, it does so only about.

    Returns:
        float32[kh, kw, 3, Cout] on the standardised colours; for the front end "rgb" the kernels
        themselves.
    """
    kernel = first_kernel(network)
    front = kernel_of(network.model.frontend)
    if front is None:
        return kernel
    height, width = (a + b - 1 for a, b in zip(kernel.shape, front.shape[:2], strict=False))
    product = np.zeros((height, width, front.shape[2], kernel.shape[3]), np.float32)
    for row in range(front.shape[0]):
        for column in range(front.shape[1]):
            part = np.einsum("pqso,cs->pqco", kernel, front[row, column])
            product[row : row + kernel.shape[0], column : column + kernel.shape[1]] += part
    return product


def first_kernel(network: FrozenModel) -> np.ndarray:
    """Return the first layer's kernels float32[kh, kw, Cin, Cout]."""
    return np.asarray(network.params["conv1"]["map"]["kernel"], np.float32)


def draw_filters(
    networks: Mapping[str, FrozenModel], evaluated: str, workdir: Path
) -> dict[str, Any]:
    """Draw the raw and the composed filters of some networks, one below the other.

    Args:
        networks: by name, the untrained one among them.
        evaluated: the name of the one that is drawn on top.
        workdir: ``pictures/filters_composed.png`` goes there.

    Returns:
        "metric", "value" and "untrained": how far training has moved the kernels from where they
        began, relative to their norm; "pictures".
    """
    order = [evaluated, *(name for name in networks if name not in (evaluated, UNTRAINED))]
    if evaluated != UNTRAINED:
        order.append(UNTRAINED)
    parts = []
    for name in order:
        network, title = networks[name], report.network_name(name)
        parts.append(report.filters(first_kernel(network), f"{title}: kernels of the first layer"))
        if kernel_of(network.model.frontend) is not None:
            # A front end that takes the mean of the colours leaves three equal planes.
            grey = composed(network).sum(axis=2, keepdims=True)
            parts.append(
                report.filters(grey, f"{title}: joined with the {network.model.frontend} filter")
            )
    atomic_files.write(workdir / "pictures" / _PICTURE, report.stacked(parts))
    before = first_kernel(networks[UNTRAINED])
    moved = np.linalg.norm(first_kernel(networks[evaluated]) - before) / np.linalg.norm(before)
    return {
        "metric": "distance of the first layer's kernels from the untrained ones, by their norm",
        "value": round(float(moved), 6),
        "untrained": 0.0,
        "pictures": [_PICTURE],
    }
