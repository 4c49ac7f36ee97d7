"""Proof that an assignment is a permutation, and checksums, computed shard by shard.

Neither sorts, makes a 64-bit copy or gathers a sharded array: each process reads the shards it
holds, and for the proof stores and exchanges one bit a row.

The bits are added rather than or-ed. Row r adds ``1 << r % 8`` to byte ``r // 8``, modulo 256, over
all shards and processes. Powers of two up to 128 that add up to 255 modulo 256 are at least eight:
two equal ones can be merged into the next until 1, 2, ..., 64 remain once each and 128 an odd
number of times. They are exactly eight only if nothing was merged, and then they differ. N entries
fill N / 8 bytes, so **if every byte is 255 at the end, every row occurs exactly once**, and no
entry was out of range. Collectives on every kind of device can add; not all can or.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax.input.counter_random import mix64

# Entries read at a time: their temporary arrays stay in a processor's cache.
_BLOCK = 2**17

# Bytes of the bitmap exchanged at a time.
_CHUNK = 2**20


def permutation_error(assignment: jax.Array | np.ndarray) -> str | None:
    """Return why an assignment is not a permutation of 0..N-1; None if it is one.

    Needs N/8 bytes in each process. If the assignment is sharded over processes, each reads its own
    shards, all get the same answer, and all must call this.

    Args:
        assignment: int32[N]; replicated, or sharded in any way.
    """
    if assignment.ndim != 1 or not np.issubdtype(assignment.dtype, np.integer):
        return f"expected integers in one dimension; got {assignment.dtype}{assignment.shape}"
    across, size = _is_across_processes(assignment), assignment.size
    bitmap = np.zeros(-(-size // 8), np.uint8)
    if size % 8 and not (across and jax.process_index()):
        bitmap[-1] = 256 - (1 << size % 8)  # the bits of the last byte beyond the last row
    for _, rows in _blocks(assignment):
        if rows.min() < 0 or rows.max() >= size:
            rows = rows[(rows >= 0) & (rows < size)]
        bits = np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8))
        np.add.at(bitmap, (rows >> 3).astype(np.intp), bits)
    chunks = (bitmap[at : at + _CHUNK] for at in range(0, bitmap.size, _CHUNK))
    wrong = sum(
        int(np.count_nonzero((_sum(chunk) if across else chunk) != 255)) for chunk in chunks
    )
    if not wrong:
        return None
    return f"of its rows 0..{size - 1} at least {wrong} are missing or owned by several images"


def checksum(by_image: jax.Array | np.ndarray) -> int:
    """Return a 64-bit checksum of the assignment or the features, the same for every sharding.

    It is a sum of hashes of (place, value) pairs. If the array is sharded over processes, all get
    the same number, and all must call this.
    """
    total = 0
    for start, values in _blocks(by_image):
        place = np.arange(start, start + values.size, dtype=np.uint64)
        bits = 8 * values.itemsize
        total += int(mix64((place << np.uint64(bits)) | values.view(f"uint{bits}")).sum())
    total %= 2**64
    if not _is_across_processes(by_image):
        return total
    halves = multihost_utils.process_allgather(np.array([total % 2**32, total >> 32], np.uint32))
    return sum(int(low) + (int(high) << 32) for low, high in np.asarray(halves)) % 2**64


def _is_across_processes(by_image: Any) -> bool:
    """Return whether other processes hold entries that this one does not."""
    if not isinstance(by_image, jax.Array):
        return False
    return not (by_image.is_fully_addressable or by_image.is_fully_replicated)


def _blocks(by_image: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the entries that this process accounts for, each once: (first place, flat values)."""
    for image, shard in _shards(by_image):
        values = shard.reshape(-1)
        start = image * math.prod(shard.shape[1:])
        for at in range(0, values.size, _BLOCK):
            yield start + at, values[at : at + _BLOCK]


def _shards(by_image: Any) -> Iterator[tuple[int, np.ndarray]]:
    if not isinstance(by_image, jax.Array):
        yield 0, np.asarray(by_image)
        return
    across, done = _is_across_processes(by_image), set()
    for shard in by_image.addressable_shards:
        start = shard.index[0].start or 0
        # Several processes may hold copies of a shard; the one with the first accounts for it.
        if start not in done and not (across and shard.replica_id):
            done.add(start)
            yield start, np.asarray(shard.data)


def _sum(values: np.ndarray) -> np.ndarray:
    """Add up each process's values, modulo the type's range."""
    # All devices take part, those of a process with the same values: some TPUs refuse a program on
    # one device of each host.
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(
        np.array(devices).reshape(jax.process_count(), -1),
        ("process", "local"),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )
    stacked = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("process")), values[None]
    )
    return np.asarray(_add_up(stacked, NamedSharding(mesh, P())).addressable_data(0))


def _add_up_on(stacked: jax.Array, everywhere: NamedSharding) -> jax.Array:
    total = stacked.sum(axis=0, dtype=stacked.dtype)
    return jax.lax.with_sharding_constraint(total, everywhere)


_add_up = jax.jit(_add_up_on, static_argnums=1)
