"""The noise: fixed unit-norm target rows, one per image.

Row ``j`` of the sphere targets is ``normalise(normal(fold_in(key, j)))``, a pure function of the
key and the row number, so a row can be computed anywhere and is never checkpointed. The paper
calls the rows C (section 3.2); the authors' code calls them codes.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from nat_jax.errors import InputError

KINDS = ("sphere", "basis", "labels")
STORAGES = ("auto", "table", "virtual")

# Images and rows are numbered in int32.
MAX_RECORDS = 2**31 - 1

# Above this many bytes "auto" recomputes rows instead of storing them: 1 GiB in total.
TABLE_LIMIT_BYTES = 2**30

# Numbers computed at a time when a table is built, which bounds the scratch memory (64 MiB).
_BUILD_CHUNK = 2**24


class Targets(Protocol):
    """What the train step needs of the targets."""

    def gather(self, rows: jax.Array) -> jax.Array:
        """Return the unit rows float32[B, D] numbered by ``rows`` int32[B]."""
        ...


def sphere_rows(key: jax.Array, rows: jax.Array, dim: int) -> jax.Array:
    """Compute rows of the uniform distribution on the unit sphere.

    Args:
        key: typed PRNG key of the target set.
        rows: int32[...]; row numbers in [0, N).
        dim: D, the feature dimension.

    Returns:
        float32[..., D] of unit norm; a normalised Gaussian is uniform on the sphere
        (paper, section 3.2). Equal to 2 ulp whichever program computes them.
    """
    flat = rows.reshape(-1)

    def draw(row: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, row), (dim,), jnp.float32)

    noise = jax.vmap(draw)(flat)
    return (noise * _inverse_norm(noise)).reshape(*rows.shape, dim)


def _inverse_norm(x: jax.Array) -> jax.Array:
    """Return 1 / |x| over the last axis, float32[..., 1], the same in every program.

    Compilers add up floats in whatever order suits the shapes around them, which moved rows by 4
    ulp between one device and eight. Here the squares are added as integers, which has no order.
    """
    dim = x.shape[-1]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    exponent = jax.lax.bitcast_convert_type(largest, jnp.int32) & 0x7F800000
    scale = 2 * jax.lax.bitcast_convert_type(exponent, jnp.float32)  # a power of 2 above all of x
    bits = 31 - (dim - 1).bit_length()  # dim squares below 2**bits stay below 2**31
    squares = jnp.round(jnp.square(x / scale) * 2.0**bits).astype(jnp.uint32)
    total = jnp.sum(squares, axis=-1, keepdims=True, dtype=jnp.uint32).astype(jnp.float32)
    norm = scale * jnp.sqrt(total * 2.0**-bits)
    # behind the barrier, as some programs would turn a division by a root into another operation
    return 1 / jax.lax.optimization_barrier(norm)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SphereTable:
    """Sphere rows held in an array float32[>=N, D]; the array may be sharded over its rows.

    When sharded, each device gathers the requested rows in its shard and a sum over devices
    combines them, so a gather communicates B row numbers and B rows, never the table.
    """

    rows: jax.Array

    def gather(self, rows: jax.Array) -> jax.Array:
        return self.rows[rows]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VirtualSphere:
    """Sphere rows recomputed at each gather; no memory that grows with N."""

    key: jax.Array
    dim: int = dataclasses.field(metadata={"static": True})

    def gather(self, rows: jax.Array) -> jax.Array:
        return sphere_rows(self.key, rows, self.dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Basis:
    """Canonical-basis rows: row j is the one-hot vector e_(j mod k), with k = D.

    These are the paper's discrete targets (section 4.1), each of k clusters owning an equal share
    of the images. In supervised training, which numbers rows by class, they are one-hot labels.
    """

    dim: int = dataclasses.field(metadata={"static": True})

    def gather(self, rows: jax.Array) -> jax.Array:
        return jax.nn.one_hot(rows % self.dim, self.dim, dtype=jnp.float32)


def check_num_records(num_records: int) -> None:
    """Check that there are at most MAX_RECORDS records, as they are numbered in int32.

    Raises:
        ValueError: there are too many.
    """
    if num_records > MAX_RECORDS:
        raise InputError(
            f"data: expected at most {MAX_RECORDS:,} records, as images and target rows are "
            f"numbered in int32; got {num_records:,}. Train on a part of them"
        )


def make_targets(
    kind: str,
    num_records: int,
    dim: int,
    key: jax.Array,
    *,
    storage: str = "auto",
    sharding: jax.sharding.NamedSharding | None = None,
) -> tuple[Targets, str]:
    """Build the target rows.

    Args:
        kind: "sphere", "basis" or "labels".
        num_records: N, the number of rows.
        dim: D, the feature dimension (for "basis" also the number of clusters k, for "labels" of
            classes).
        key: typed PRNG key that fixes the sphere rows.
        storage: "table" holds the sphere rows, "virtual" recomputes those that are gathered,
            "auto" is a table up to 1 GiB in total. Other rows are always virtual.
        sharding: where a table's rows live; N is padded to a multiple of the shards.

    Returns:
        The targets and the storage that was used.

    Raises:
        ValueError: for an unknown kind or storage, or more records than int32 can number.
    """
    check_num_records(num_records)
    if kind not in KINDS:
        raise InputError(f"targets.kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if storage not in STORAGES:
        raise InputError(f"targets.storage: expected one of {', '.join(STORAGES)}; got {storage!r}")
    if kind != "sphere":
        return Basis(dim), "virtual"
    if storage == "auto":
        storage = "table" if num_records * dim * 4 <= TABLE_LIMIT_BYTES else "virtual"
    if storage == "virtual":
        return VirtualSphere(key, dim), storage
    return SphereTable(_build_table(key, num_records, dim, sharding)), storage


def _build_table(
    key: jax.Array, num_records: int, dim: int, sharding: jax.sharding.NamedSharding | None
) -> jax.Array:
    if sharding is None:
        return jax.jit(_rows_from, static_argnums=(2, 3))(key, jnp.int32(0), num_records, dim)
    (axis,) = sharding.spec
    per_device = -(-num_records // sharding.mesh.shape[axis])

    def build(key: jax.Array) -> jax.Array:
        first = jax.lax.axis_index(axis) * per_device
        return _rows_from(key, first, per_device, dim)

    # Without shard_map, the compiler makes every device compute the full table and keep its shard.
    build = jax.shard_map(
        build,
        mesh=sharding.mesh,
        in_specs=jax.P(),
        out_specs=sharding.spec,
        check_vma=False,
    )
    return jax.jit(build)(key)


def _rows_from(key: jax.Array, first: jax.Array, count: int, dim: int) -> jax.Array:
    return jax.lax.map(
        lambda row: sphere_rows(key, row, dim),
        first + jnp.arange(count, dtype=jnp.int32),
        batch_size=max(1, min(_BUILD_CHUNK // dim, count)),
    )


def initial_assignment(
    kind: str, num_records: int, key: jax.Array, *, length: int | None = None
) -> jax.Array:
    """Return the first permutation int32[N]: image i owns row ``assignment[i]``.

    Sphere rows are independent noise already, so the identity is as random as any permutation;
    basis rows repeat with period k and are assigned at random. With labels, the assignment is
    unused.

    Args:
        kind: "sphere", "basis" or "labels".
        num_records: N.
        key: typed PRNG key of the random assignment.
        length: padded length of the permutation, at least N; entry i >= N is i.

    Raises:
        ValueError: more records than int32 can number.
    """
    check_num_records(num_records)
    length = num_records if length is None else length
    if kind != "basis":
        return jnp.arange(length, dtype=jnp.int32)  # each device makes its share of it
    rows = jax.random.permutation(key, jnp.arange(num_records, dtype=jnp.int32))
    return jnp.concatenate([rows, jnp.arange(num_records, length, dtype=jnp.int32)])
