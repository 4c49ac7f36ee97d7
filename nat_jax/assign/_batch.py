"""Batches: a solver of one problem with n <= m, run on problems of any shape and number."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from nat_jax.assign._assignment import Assignment, Status
from nat_jax.assign._certificate import Solved


def solve_all(
    solve: Callable[..., Solved],
    cost: jax.Array,
    *per_problem: jax.Array,
    shared: tuple[jax.Array, ...] = (),
) -> Assignment:
    """Run ``solve(cost, *per_problem, *shared)`` on every problem of a batch.

    Args:
        solve: a solver of one problem with n <= m.
        cost: [..., n, m].
        per_problem: arrays with the leading dimensions of `cost`.
        shared: arguments that are the same for all problems.
    """
    *batch, n, m = cost.shape
    if cost.size == 0:
        return _nothing(tuple(batch), n, m)
    arrays = [lax.stop_gradient(x) for x in (wide(cost), *per_problem)]
    shared = tuple(lax.stop_gradient(x) for x in shared)
    single = _with_vmap_rule(solve)
    if not batch:
        solved = single(*arrays, *shared)
    else:
        flat = [x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in arrays]
        axes = (0,) * len(flat) + (None,) * len(shared)
        solved = jax.vmap(single, in_axes=axes)(*flat, *shared)
        solved = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), solved)
    return _pack(solved) if n <= m else _pack_exchanged(solved, n)


def wide(cost: jax.Array) -> jax.Array:
    """Transpose problems with more rows than columns."""
    n, m = cost.shape[-2:]
    return cost if n <= m else jnp.swapaxes(cost, -1, -2)


def _with_vmap_rule(solve: Callable[..., Solved]) -> Callable[..., Solved]:
    """Attach a vmap rule to `solve`: batched on accelerators, sequential on the CPU.

    Loops run side by side go on until the slowest problem ends, which gains nothing on a CPU.
    """
    single = jax.custom_batching.custom_vmap(solve)

    def in_turn(*problems: jax.Array) -> Solved:
        return lax.map(lambda problem: single(*problem), problems)

    def rule(size: int, batched: list[bool], *args: jax.Array) -> tuple[Solved, Solved]:
        problems = [
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(args, batched, strict=True)
        ]
        solved = lax.platform_dependent(*problems, cpu=in_turn, default=jax.vmap(solve))
        return solved, jax.tree.map(lambda _: True, solved)

    single.def_vmap(rule)
    return single


def _pack(solved: Solved) -> Assignment:
    return Assignment(
        col4row=solved.col4row,
        cost=solved.total,
        prices=solved.prices,
        gap=solved.gap,
        rounds=solved.rounds,
        status=solved.status,
    )


def _pack_exchanged(solved: Solved, num_rows: int) -> Assignment:
    """Turn the solution of the transposed problem into that of one with n > m."""
    place = solved.col4row  # row of each column
    columns = jnp.broadcast_to(jnp.arange(place.shape[-1], dtype=jnp.int32), place.shape)
    empty = jnp.full((*place.shape[:-1], num_rows), -1, jnp.int32)
    col4row = jnp.put_along_axis(empty, place, columns, axis=-1, inplace=False)
    return _pack(solved._replace(col4row=col4row, prices=-solved.row_values))


def _nothing(batch: tuple[int, ...], n: int, m: int) -> Assignment:
    zero = jnp.zeros(batch, jnp.float32)
    none = jnp.zeros(batch, jnp.int32)
    return Assignment(
        col4row=jnp.full((*batch, n), -1, jnp.int32),
        cost=zero,
        prices=jnp.zeros((*batch, m), jnp.float32),
        gap=zero,
        rounds=none,
        status=jnp.full(batch, Status.OPTIMAL_WITHIN_EPS, jnp.int32),
    )
