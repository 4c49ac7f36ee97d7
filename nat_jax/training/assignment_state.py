"""Proof that an assignment is a permutation, and a checksum of it, shard by shard.

Nothing here sorts, makes a 64-bit copy, or brings a sharded assignment together in one place: each
process looks at the shards it holds, and what it keeps and sends is one bit a row.

The bits are added, not or-ed. Row r adds ``1 << r % 8`` to byte ``r // 8``, modulo 256, over all
shards and processes. Powers of two up to 128 that add up to 255 modulo 256 are at least eight: two
equal ones can be merged into the next until 1, 2, ..., 64 remain once each and 128 an odd number
of times. They are exactly eight only if nothing was merged, and then they differ. N entries fill
N / 8 bytes, so **if every byte ends as 255, every row occurs exactly once**, and no entry was out
of range. Sums, unlike unions, are what every machine's collectives can do.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Entries looked at together: their temporary arrays stay in a processor's cache.
_BLOCK = 2**17

# Bytes of the bitmap that travel together.
_CHUNK = 2**20

# Rows among which duplicates are looked for together, once it is known that there are some.
_RANGE = 2**20

_NAMED = 3  # how many of each kind of mistake a message names


class _Part(NamedTuple):
    """Consecutive entries of an assignment: those of images ``start``, ``start + 1``, ..."""

    start: int
    rows: np.ndarray


def flaw(assignment: jax.Array | np.ndarray) -> str | None:
    """Say why an assignment is not a permutation of 0..N-1; None if it is one.

    Of an assignment that is spread over processes each looks at its own shards, and all get the
    same answer; all must call this. Needs N/8 bytes on each.

    Args:
        assignment: int32[N]; replicated, or sharded in any way.
    """
    if assignment.ndim != 1 or not np.issubdtype(assignment.dtype, np.integer):
        return f"expected integers in one dimension; got {assignment.dtype}{assignment.shape}"
    spread, size = _is_spread(assignment), assignment.size
    bitmap = np.zeros(-(-size // 8), np.uint8)
    if size % 8 and not (spread and jax.process_index()):
        bitmap[-1] = 256 - (1 << size % 8)  # the last byte's bits that stand for no row
    for part in _blocks(assignment):
        rows = part.rows
        if rows.min() < 0 or rows.max() >= size:
            rows = rows[(rows >= 0) & (rows < size)]
        bits = np.left_shift(np.uint8(1), (rows & 7).astype(np.uint8))
        np.add.at(bitmap, (rows >> 3).astype(np.intp), bits)
    wrong = _wrong_ranges(bitmap, spread)
    return _describe(assignment, wrong, spread) if wrong else None


def checksum(assignment: jax.Array | np.ndarray) -> int:
    """Return 64 bits of what stands where in an assignment, the same however it is sharded.

    It is the sum of a hash of each (image, row), which every shard can begin by itself. Of an
    assignment that is spread over processes all get the same number, and all must call this.
    """
    total = 0
    for part in _blocks(assignment):
        image = np.arange(part.start, part.start + part.rows.size, dtype=np.uint64)
        total += int(_hash((image << np.uint64(32)) | part.rows.astype(np.uint32)).sum())
    total %= 2**64
    if not _is_spread(assignment):
        return total
    halves = np.array([total % 2**32, total >> 32], np.uint32)
    return sum(int(low) + (int(high) << 32) for low, high in _gather(halves)) % 2**64


def _hash(x: np.ndarray) -> np.ndarray:
    """Mix 64 bits so that each of them depends on all, in place (the finaliser of splitmix64)."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _is_spread(assignment: Any) -> bool:
    """Say whether other processes hold entries that this one has not."""
    if not isinstance(assignment, jax.Array):
        return False
    return not (assignment.is_fully_addressable or assignment.is_fully_replicated)


def _parts(assignment: Any) -> Iterator[_Part]:
    """Yield the entries that this process answers for, each once."""
    if not isinstance(assignment, jax.Array):
        yield _Part(0, np.asarray(assignment))
        return
    spread, done = _is_spread(assignment), set()
    for shard in assignment.addressable_shards:
        start = shard.index[0].start or 0
        # Copies of a shard that is spread may belong to several processes; one answers for it.
        if start not in done and not (spread and shard.replica_id):
            done.add(start)
            yield _Part(start, np.asarray(shard.data))


def _blocks(assignment: Any) -> Iterator[_Part]:
    for part in _parts(assignment):
        for at in range(0, part.rows.size, _BLOCK):
            yield _Part(part.start + at, part.rows[at : at + _BLOCK])


def _wrong_ranges(bitmap: np.ndarray, spread: bool) -> list[int]:
    """Return which ranges of ``_RANGE`` rows have a byte that is not full, over all processes."""
    wrong: set[int] = set()
    for at in range(0, bitmap.size, _CHUNK):
        chunk = bitmap[at : at + _CHUNK]
        full = (_sum(chunk) if spread else chunk) == 255
        wrong.update(((at + np.flatnonzero(~full)) // (_RANGE // 8)).tolist())
    return sorted(wrong)


def _describe(assignment: Any, wrong: list[int], spread: bool) -> str:
    """Name the first few images and rows that are wrong. All processes take part."""
    size = assignment.size
    strays = _images_with(assignment, lambda rows: (rows < 0) | (rows >= size), spread)
    found = [f"image {image} has row {row}" for image, row in strays[:_NAMED]]
    for row in _repeated(assignment, wrong, spread):
        owners = _images_with(assignment, functools.partial(np.equal, row), spread)
        images = [image for image, _ in owners]
        named = " and ".join(map(str, images[:_NAMED]))
        more = " and others" if len(images) > _NAMED else ""
        found.append(f"row {row} belongs to images {named}{more}")
    return "; ".join(found) + f" (rows are 0..{size - 1})"


def _repeated(assignment: Any, wrong: list[int], spread: bool) -> list[int]:
    """Return the first few rows that occur more than once.

    A range with more entries than rows has one, and so has a range with as many that is wrong. If
    there is neither, there are entries out of range, which are named instead.
    """
    size = assignment.size
    entries = np.zeros(-(-size // _RANGE), np.int32)
    for part in _blocks(assignment):
        rows = part.rows[(part.rows >= 0) & (part.rows < size)]
        entries += np.bincount(rows // _RANGE, minlength=entries.size).astype(np.int32)
    entries = _sum(entries) if spread else entries
    room = np.minimum(_RANGE, size - _RANGE * np.arange(entries.size))
    full = entries > room
    full[wrong] |= entries[wrong] == room[wrong]
    if not full.any():
        return []
    number = int(np.argmax(full))
    first, count = number * _RANGE, room[number]
    owners = np.zeros(count, np.int32)
    for part in _blocks(assignment):
        rows = part.rows[(part.rows >= first) & (part.rows < first + count)]
        owners += np.bincount(rows - first, minlength=count).astype(np.int32)
    owners = _sum(owners) if spread else owners
    return [int(row) + first for row in np.flatnonzero(owners > 1)[:_NAMED]]


def _images_with(
    assignment: Any, condition: Callable[[np.ndarray], np.ndarray], spread: bool
) -> list[tuple[int, int]]:
    """Return the first few (image, row) whose row fulfils a condition; one more than is named."""
    found = np.full((_NAMED + 1, 2), -1, np.int32)
    count = 0
    for part in _blocks(assignment):
        for at in np.flatnonzero(condition(part.rows))[: len(found) - count]:
            found[count] = part.start + at, part.rows[at]
            count += 1
    every = _gather(found).reshape(-1, 2) if spread else found
    return sorted((int(image), int(row)) for image, row in every if image >= 0)[: len(found)]


def _gather(values: np.ndarray) -> np.ndarray:
    """Return each process's values, stacked."""
    return np.asarray(multihost_utils.process_allgather(values))


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
