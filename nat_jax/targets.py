"""The noise: fixed unit-norm target rows, one per image.

Row ``j`` of the sphere targets is ``normalise(normal(fold_in(key, j)))``, a pure function of the
key and the row number, so a row can be computed anywhere and is never checkpointed. The paper
calls the rows C (section 3.2); the authors' code calls them codes.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

KINDS = ("sphere", "basis")
STORAGES = ("auto", "table", "virtual")

# Above this many bytes "auto" recomputes rows instead of storing them: 1 GiB in total.
TABLE_LIMIT_BYTES = 2**30

# Rows computed at a time when a table is built, which bounds the scratch memory.
_BUILD_CHUNK = 65_536


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
        (paper, section 3.2).
    """
    flat = rows.reshape(-1)
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(key, row), (dim,)))(flat)
    unit = noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)
    return unit.reshape(*rows.shape, dim)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SphereTable:
    """Sphere rows held in an array float32[>=N, D]; the array may be sharded over its rows."""

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
    of the images.
    """

    dim: int = dataclasses.field(metadata={"static": True})

    def gather(self, rows: jax.Array) -> jax.Array:
        return jax.nn.one_hot(rows % self.dim, self.dim)


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
        kind: "sphere" or "basis".
        num_records: N, the number of rows.
        dim: D, the feature dimension (for "basis" also the number of clusters k).
        key: typed PRNG key that fixes the sphere rows.
        storage: "table" holds the sphere rows, "virtual" recomputes those that are gathered,
            "auto" is a table up to 1 GiB in total. Basis rows are always virtual.
        sharding: where a table's rows live; N is padded to a multiple of the shards.

    Returns:
        The targets and the storage that was used.

    Raises:
        ValueError: for an unknown kind or storage.
    """
    if kind not in KINDS:
        raise ValueError(f"targets.kind: expected one of {', '.join(KINDS)}; got {kind!r}")
    if storage not in STORAGES:
        raise ValueError(f"targets.storage: expected one of {', '.join(STORAGES)}; got {storage!r}")
    if kind == "basis":
        return Basis(dim), "virtual"
    if storage == "auto":
        storage = "table" if num_records * dim * 4 <= TABLE_LIMIT_BYTES else "virtual"
    if storage == "virtual":
        return VirtualSphere(key, dim), storage
    return SphereTable(_build_table(key, num_records, dim, sharding)), storage


def _build_table(
    key: jax.Array, num_records: int, dim: int, sharding: jax.sharding.NamedSharding | None
) -> jax.Array:
    shards = 1 if sharding is None else sharding.num_devices
    padded = -(-num_records // shards) * shards

    def build(key: jax.Array) -> jax.Array:
        return jax.lax.map(
            lambda row: sphere_rows(key, row, dim),
            jnp.arange(padded, dtype=jnp.int32),
            batch_size=min(_BUILD_CHUNK, padded),
        )

    return jax.jit(build, out_shardings=sharding)(key)


def initial_assignment(kind: str, num_records: int, key: jax.Array) -> jax.Array:
    """Return the first permutation int32[N]: image i owns row ``assignment[i]``.

    Sphere rows are independent noise already, so the identity is as random as any permutation;
    basis rows repeat with period k and are dealt at random.
    """
    rows = jnp.arange(num_records, dtype=jnp.int32)
    return jax.random.permutation(key, rows) if kind == "basis" else rows
