"""What several processes must have in common, compared before it does harm.

Each check is a collective: all processes make the same calls in the same order, and all of them
raise, or none.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax.errors import UserError

PyTree = Any


class Disagreement(UserError, RuntimeError):
    """Processes of one run differ in what they must share."""


def meet() -> None:
    """Let all devices of all processes exchange something, when all have just been started.

    This finds out whether they can. It also sets up what they need for it: Gloo, on CPUs, gives up
    where one process comes to that more than 30 seconds after another, as in compiling a step.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    one = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.int32)
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(one))


def check_same(values: Mapping[str, Any], hint: str) -> None:
    """Check that all processes have equal values.

    Args:
        values: what JSON can hold, by the name that the message gives it. Of a mapping with
            strings as keys the message names the first key whose values differ.
        hint: what to do about a difference.

    Raises:
        Disagreement: naming what differs, and the processes that stand against process 0.
    """
    if jax.process_count() == 1:
        return
    name, others = _first_that_differs(values)
    if name is None:
        return
    value = values[name]
    if isinstance(value, Mapping):
        keys = {key: value.get(key) for key in _of_process_0(sorted(value))}
        # the keys themselves come last: where no value differs, some process has more of them
        name, others = _first_that_differs({**keys, f"keys of {name}": sorted(value)})
        assert name is not None
        value = keys.get(name, sorted(value))
    count = jax.process_count()
    raise Disagreement(
        f"{name}: process{'es' if len(others) > 1 else ''} {_listed(others)} of {count} "
        f"differ{'' if len(others) > 1 else 's'} from process 0; here it is "
        f"{_short(json.dumps(value, sort_keys=True))}. {hint}"
    )


def _first_that_differs(values: Mapping[str, Any]) -> tuple[str | None, list[int]]:
    """Return the first name whose value is not the same everywhere, and where it is another."""
    texts = [json.dumps(value, sort_keys=True) for value in values.values()]
    mine = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32) for text in texts]
    every = np.asarray(multihost_utils.process_allgather(np.stack(mine)))
    for number, name in enumerate(values):
        others = [p for p in range(len(every)) if (every[p, number] != every[0, number]).any()]
        if others:
            return name, others
    return None, []


def _of_process_0(names: list[str]) -> list[str]:
    """Return process 0's strings to all."""
    mine = np.frombuffer(json.dumps(names).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(mine.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(mine, length))
    return json.loads(np.asarray(text).tobytes())


def check_shared(folder: Path) -> None:
    """Check that all processes see the same folder.

    Raises:
        Disagreement: some do not see what process 0 writes into it.
    """
    if jax.process_count() == 1:
        return
    token = np.frombuffer(os.urandom(8), np.uint32)
    token = np.asarray(multihost_utils.broadcast_one_to_all(token))
    path = folder / f".seen-by-all-{token.tobytes().hex()}"
    if jax.process_index() == 0:
        path.touch()
    multihost_utils.sync_global_devices(f"nat_jax wrote {path.name}")
    seen = np.asarray(multihost_utils.process_allgather(np.array(path.exists())))
    if jax.process_index() == 0:
        path.unlink()
    if not seen.all():
        raise Disagreement(
            f"--workdir: process 0 writes into {folder.absolute()}, which is another folder for "
            f"process {_listed(np.flatnonzero(~seen).tolist())}. Give the path of a file system "
            "that all hosts share"
        )


def wait_for_all(what: str) -> None:
    """Wait until all processes have come here: for as long as they live; 30 minutes with Gloo."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"nat_jax: {what}")


def check_copies(tree: PyTree, what: str) -> None:
    """Check that all copies of each array are equal, on every device of every process.

    Each device hashes what it holds; 4 bytes an array and device are exchanged.

    Args:
        tree: arrays that are replicated, or sharded over one mesh; of a shard there may be several
            copies too.
        what: what they are, for the message.

    Raises:
        Disagreement: naming the first array whose copies differ, and where.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = [_plain(leaf) for _, leaf in leaves]
    shardings: tuple[Any, ...] = tuple(array.sharding for array in arrays)
    if not shardings or len(shardings[0].device_set) == 1:
        return
    devices = list(shardings[0].mesh.devices.flat)
    sums = np.asarray(_checksums(shardings)(*arrays))
    for number, ((path, _), array) in enumerate(zip(leaves, arrays, strict=True)):
        places = array.sharding.devices_indices_map(array.shape)
        copies: dict[str, dict[int, list[int]]] = {}  # part of the array -> checksum -> processes
        for device, value in zip(devices, sums[:, number], strict=True):
            owners = copies.setdefault(str(places[device]), {}).setdefault(int(value), [])
            owners.append(device.process_index)
        for owners_by_sum in copies.values():
            if len(owners_by_sum) > 1:
                few = sorted(owners_by_sum.values(), key=len)
                named = " against ".join(f"process {_listed(sorted(set(p)))}" for p in few)
                raise Disagreement(
                    f"{what}: the copies of {jax.tree_util.keystr(path, simple=True)!r} differ: "
                    f"that of {named}. Nothing was saved; the same command line goes on from the "
                    "last checkpoint. If it happens again, suspect the hardware of the first"
                )


def _plain(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


@functools.cache
def _checksums(shardings: tuple[NamedSharding, ...]) -> Any:
    """Compile a function of arrays with these shardings to checksums uint32[devices, arrays]."""
    mesh = shardings[0].mesh

    def on_device(*arrays: jax.Array) -> jax.Array:
        return jnp.stack([_checksum(array) for array in arrays])[None]

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=tuple(sharding.spec for sharding in shardings),
        out_specs=P(mesh.axis_names),
        check_vma=False,
    )
    return jax.jit(mapped, out_shardings=NamedSharding(mesh, P()))


def _checksum(array: jax.Array) -> jax.Array:
    """Sum a hash of each (position, value), modulo 2**32; a sum has no order that could vary."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    values = jax.lax.bitcast_convert_type(array, unsigned).reshape(-1).astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, values.size)
    return jnp.sum(_mix(values ^ _mix(position)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Let each of 32 bits depend on all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _listed(numbers: list[int]) -> str:
    """Name up to eight numbers."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
