"""Checks that all processes of a run have the same config, data, folder and state.

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

from nat_jax.errors import UserError, some_of
from nat_jax.runtime import sharding

PyTree = Any


class Disagreement(UserError, RuntimeError):
    """Processes of one run differ in what they must share."""


def warm_up_collectives() -> None:
    """Run one collective over all devices of all processes, right after the start.

    This checks that they can communicate, and sets up their connections: Gloo, on CPUs, gives up
    where one process comes to that more than 30 seconds after another, as after compiling a step.
    """
    mesh = Mesh(np.array(jax.devices()), ("all",), axis_types=(AxisType.Auto,))
    ones = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, P("all")), lambda _: np.ones(1, np.int32)
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(ones))


def check_same(values: Mapping[str, Any], hint: str) -> None:
    """Check that all processes have equal values.

    Args:
        values: JSON values by the name that the message shows. Of a mapping the message names the
            first key whose values differ.
        hint: how to fix a difference.

    Raises:
        Disagreement: naming what differs, and the processes that differ from process 0.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(values, sort_keys=True).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint32)
    mine = np.append(digest, np.uint32(len(text)))
    every = np.asarray(multihost_utils.process_allgather(mine))
    if (every == every[0]).all():
        return
    padded = np.frombuffer(text.ljust(every[:, -1].max()), np.uint8)
    texts = np.asarray(multihost_utils.process_allgather(padded))
    first, *others = (_flat(json.loads(each.tobytes())) for each in texts)
    for name in sorted(first.keys() | set().union(*others)):
        expected = first.get(name)
        differing = [p for p, other in enumerate(others, 1) if other.get(name) != expected]
        if differing:
            got = others[differing[0] - 1].get(name)
            raise Disagreement(
                f"{name}: process {some_of(differing, 8)} of {jax.process_count()} differs from "
                f"process 0: {_short(got)} instead of {_short(expected)}. {hint}"
            )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace each mapping in ``values`` by its entries."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(value if isinstance(value, Mapping) else {name: value})
    return flat


def check_shared(folder: Path) -> None:
    """Check that all processes see the same folder.

    Raises:
        Disagreement: some do not see the file that process 0 writes into it.
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
            f"process {some_of(np.flatnonzero(~seen), 8)}. Give the path of a file system "
            "that all hosts share"
        )


def wait_for_all(name: str) -> None:
    """Wait for all processes; without a time limit while they live, with Gloo for 30 minutes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"nat_jax: {name}")


def all_true(value: bool) -> bool:
    """Return whether a value is true in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).all())


def check_copies(tree: PyTree, what: str) -> None:
    """Check that all copies of each array are equal, on every device of every process.

    Each device hashes the data it holds; 4 bytes an array and device are exchanged.

    Args:
        tree: arrays that are replicated, or sharded over one mesh; a shard may have several copies
            too.
        what: name of the tree in the message.

    Raises:
        Disagreement: naming the first array whose copies differ, and the processes.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = [sharding.without_key_type(leaf) for _, leaf in leaves]
    shardings: tuple[Any, ...] = tuple(array.sharding for array in arrays)
    if not shardings or len(shardings[0].device_set) == 1:
        return
    devices = list(shardings[0].mesh.devices.flat)
    sums = np.asarray(_checksums(shardings)(*arrays))
    for number, ((path, _), array) in enumerate(zip(leaves, arrays, strict=True)):
        places = array.sharding.devices_indices_map(array.shape)
        copies: dict[str, dict[int, set[int]]] = {}  # part of the array -> checksum -> processes
        for device, value in zip(devices, sums[:, number], strict=True):
            by_checksum = copies.setdefault(str(places[device]), {})
            by_checksum.setdefault(int(value), set()).add(device.process_index)
        for by_checksum in copies.values():
            if len(by_checksum) > 1:
                name = jax.tree_util.keystr(path, simple=True)
                owners = sorted(by_checksum.values(), key=len)
                named = " against ".join(f"process {some_of(sorted(each), 8)}" for each in owners)
                raise Disagreement(
                    f"{what}: the copies of {name!r} differ: that of {named}. Nothing was saved; "
                    "the same command line goes on from the last checkpoint. If it happens again, "
                    "suspect the hardware of the first"
                )


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
    """Return the sum of a hash of each (position, value), modulo 2**32, in any order."""
    if array.dtype == bool:
        array = array.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    values = jax.lax.bitcast_convert_type(array, unsigned).reshape(-1).astype(jnp.uint32)
    position = jax.lax.iota(jnp.uint32, values.size)
    return jnp.sum(_mix(values ^ _mix(position)), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """Mix 32 bits so that each depends on all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
