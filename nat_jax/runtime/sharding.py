"""The device mesh, the shardings of arrays on it, and global batches.

One 2-D mesh ("data", "model") serves a laptop and a pod. Images are split over all of its devices,
so that each convolves images of its own. Features and everything else per image are split along
"data"; the devices along "model" share the matrices of wide fully connected layers.

The axes are of type Auto: the Explicit type, JAX's default, refuses
``targets[assignment[index]]`` on sharded operands.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax.errors import InputError

# Matrices of at least this many elements (4 MiB of float32) are split over "model". Below, a split
# saves less memory than its collectives cost time.
SPLIT_FROM = 2**20

# "auto" shards a permutation over "data" if it has this many bytes, with the features kept for it.
_SHARDED_FROM = 2**26

# Sharded permutations are as long as the next multiple of this number, whatever the devices: a
# checkpoint then fits any number of them that divides it. Costs 1.7 MB at the most.
PERMUTATION_UNIT = 2**12 * 3 * 5 * 7


def make_mesh(
    data: int = -1, model: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Return a mesh over all devices.

    Args:
        data: devices along the batch; -1 takes what ``model`` leaves.
        model: devices along large matrices; -1 takes what ``data`` leaves.
        devices: those to use; all of them, over all processes, if None.

    Raises:
        InputError: data * model is not the number of devices, or the devices along "model" are not
            all of one process.
    """
    devices = devices or jax.devices()
    count = len(devices)
    given = f"mesh.data = {data}, mesh.model = {model}"
    if min(data, model) < -1 or 0 in (data, model) or data == model == -1:
        raise InputError(
            "mesh: expected numbers of devices, one of which may be -1 for all that the other "
            f"leaves; got {given}"
        )
    if data == -1:
        data = count // model
    elif model == -1:
        model = count // data
    if data * model != count:
        fit = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        raise InputError(
            f"mesh: expected mesh.data * mesh.model to be the number of devices, {count}; got "
            f"{given}. Set --config.mesh.data=-1 and --config.mesh.model to one of: {fit}"
        )
    rows = np.array(_in_order(devices)).reshape(data, model)
    if any(len({device.process_index for device in row}) > 1 for row in rows):
        raise InputError(
            "mesh.model: expected the devices along it to belong to one process, as each process "
            f"has images of its own; got {given}. Set mesh.model to a divisor of the number of "
            "devices of each process"
        )
    return Mesh(rows, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def _in_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Order devices by process, and within one by their wiring, as JAX knows it for a TPU slice.

    Each process then has consecutive parts of the batch.
    """
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    wired = [
        d
        for n in sorted(slices)
        for d in mesh_utils.create_device_mesh((len(slices[n]),), slices[n])
    ]
    return sorted(wired, key=lambda device: device.process_index)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array of which every device holds a copy."""
    return NamedSharding(mesh, P())


def over_data(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is split along "data"."""
    return NamedSharding(mesh, P("data"))


def over_all(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array whose first axis is split over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def batch_shardings(mesh: Mesh, *, labels: bool = False) -> dict[str, NamedSharding]:
    """Return the shardings of the batch entries of a train step, with ``labels`` if supervised."""
    along = ("index", "weight", "label") if labels else ("index", "weight")
    return {"image": over_all(mesh), **dict.fromkeys(along, over_data(mesh))}


def param_shardings(mesh: Mesh, shapes: Any) -> Any:
    """Return the sharding of every parameter, optimiser slot or batch statistic.

    Large matrices, those of fully connected layers, are split over "model" by their outputs, and so
    are the optimiser's slots of the same shape. Everything else is replicated.

    Args:
        mesh: the devices.
        shapes: pytree of arrays or ``jax.ShapeDtypeStruct``.
    """

    def place(leaf: Any) -> NamedSharding:
        large = leaf.ndim == 2 and leaf.size >= SPLIT_FROM
        if large and leaf.shape[1] % mesh.shape["model"] == 0:
            return NamedSharding(mesh, P(None, "model"))
        return replicated(mesh)

    return jax.tree.map(place, shapes)


def permutation_storage(
    storage: str, num_records: int, mesh: Mesh, *, dim: int = 0
) -> tuple[str, int]:
    """Return how a permutation of the records is stored, and its length.

    A sharded one is padded. Entry i >= ``num_records`` is i, and stays so: no record has that
    index, and no batch that row. The padded array is a permutation too.

    Args:
        storage: "auto", "replicated" or "sharded".
        num_records: N.
        mesh: the devices.
        dim: dimension of the float16 features that are kept for each record, if any.

    Returns:
        "replicated" and N, or "sharded" and the padded length.

    Raises:
        InputError: the padded length is beyond int32, or does not divide by the devices.
    """
    if storage == "auto":
        size = num_records * (4 + 2 * dim)
        storage = "sharded" if size >= _SHARDED_FROM else "replicated"
    if storage == "replicated":
        return storage, num_records
    length = -(-num_records // PERMUTATION_UNIT) * PERMUTATION_UNIT
    shards = mesh.shape["data"]
    if length % shards:
        raise InputError(
            "assign.storage: expected a number of devices along mesh.data that divides "
            f"{PERMUTATION_UNIT:,}, as the permutation is sharded over them; got {shards}. Set "
            "mesh.data or mesh.model, or --config.assign.storage=replicated"
        )
    if length > np.iinfo(np.int32).max:
        most = np.iinfo(np.int32).max // PERMUTATION_UNIT * PERMUTATION_UNIT
        raise InputError(
            f"data: expected at most {most:,} records for a permutation that is sharded; got "
            f"{num_records:,}. Train on a part of them"
        )
    return storage, length


def global_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assemble each process's share of a batch into global arrays."""
    shardings = batch_shardings(mesh)
    return {
        name: jax.make_array_from_process_local_data(shardings.get(name, over_data(mesh)), value)
        for name, value in local.items()
    }


def abstract(tree: Any, shardings: Any) -> Any:
    """Return the shapes, dtypes and target shardings of ``tree``, for restoring it.

    Args:
        tree: pytree of arrays or ``jax.ShapeDtypeStruct``.
        shardings: a sharding for each leaf; or for all of them, or of each of its parts.
    """
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        jax.tree.broadcast(shardings, tree),
    )


def without_key_type(leaf: jax.Array) -> jax.Array:
    """Return the uint32 data of a typed PRNG key, and any other array as it is."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def to_host(tree: Any) -> Any:
    """Return all of each array as ``numpy.ndarray``, for work that a process does alone.

    All processes must call this: others may hold shards that this one lacks.

    Args:
        tree: pytree of arrays, sharded in any way.
    """

    def fetch(leaf: Any) -> np.ndarray:
        leaf = without_key_type(leaf)
        if isinstance(leaf, jax.Array) and not (
            leaf.is_fully_addressable or leaf.is_fully_replicated
        ):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)


def _local_mesh() -> Mesh:
    """Return the devices of this process that it can use without the other processes."""
    devices = standalone_devices(jax.local_devices(), jax.process_count())
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def standalone_devices(devices: Sequence[jax.Device], processes: int) -> Sequence[jax.Device]:
    """Return those of a process's devices that it can run a program of its own on.

    In a TPU pod that is one chip: the compiler refuses several, as they are wired to other hosts.
    """
    return devices[:1] if processes > 1 and devices[0].platform == "tpu" else devices


def on_local_devices(tree: Any) -> Any:
    """Copy arrays to the devices of this process, for work that it does alone."""
    everywhere = NamedSharding(_local_mesh(), P())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), everywhere), tree)


def local_batch(images: np.ndarray) -> jax.Array:
    """Split a batch over this process's devices, or copy it to each if it does not divide."""
    mesh = _local_mesh()
    spec = P("data") if len(images) % mesh.size == 0 else P()
    return jax.device_put(images, NamedSharding(mesh, spec))
