"""The device mesh, where arrays live on it, and global batches.

One 2-D mesh ("data", "model") serves a laptop and a pod. Its axes are of type Auto: the Explicit
type, JAX's default, refuses ``targets[assignment[index]]`` on sharded operands.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(
    data: int = -1, model: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return a mesh over all devices.

    Args:
        data: devices along the batch; -1 takes what ``model`` leaves.
        model: devices along large kernels.
        devices: those to use; all of them, over all processes, if None.

    Raises:
        ValueError: if data * model is not the number of devices.
    """
    devices = devices or jax.devices()
    count = len(devices)
    if data == -1:
        data = count // model
    if data * model != count:
        raise ValueError(
            f"mesh.data: expected {count // model}, the number of devices"
            f"{f' divided by {model}' if model > 1 else ''}; got {data}. "
            "Set --config.mesh.data=-1 to use all devices"
        )
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((data, model), ("data", "model"), axis_types=types, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is split along "data"."""
    return NamedSharding(mesh, P("data"))


def global_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assemble each process's share of a batch into global arrays sharded along "data"."""
    sharding = over_data(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in local.items()
    }


def abstract(tree: Any, sharding: NamedSharding) -> Any:
    """Return the shapes and dtypes of ``tree`` as they shall be restored under ``sharding``."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _local_mesh() -> Mesh:
    return Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))


def on_local_devices(tree: Any) -> Any:
    """Copy replicated arrays onto every device of this process, for work it does alone."""
    everywhere = NamedSharding(_local_mesh(), P())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), everywhere), tree)


def local_batch(images: np.ndarray) -> jax.Array:
    """Split a batch over this process's devices, or copy it to all where it does not divide."""
    mesh = _local_mesh()
    spec = P("data") if len(images) % mesh.size == 0 else P()
    return jax.device_put(images, NamedSharding(mesh, spec))
