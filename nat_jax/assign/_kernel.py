"""The complete auction for one problem as a single Pallas kernel, for NVIDIA GPUs (Triton).

The XLA loops of `_bidding` and `_paths` cost a GPU several launches for each of some hundred
rounds. Here one program goes through the same algorithm: bidding with falling eps, then shortest
augmenting paths. `jax.vmap` runs one program per problem.

A round of bids should take some 2,000 cycles at m = 256 and 4,000 at m = 1024, a step of a path 600
to 900: counted from the machine code, not measured.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from nat_jax.assign import _kernel_search
from nat_jax.assign._bidding import SETTLING_PASSES, SHORT, SLOTS, STALLED
from nat_jax.assign._kernel_search import INF, Table

_NUM_WARPS = 8  # next to no spilled registers up to 1024 columns; 16 are no faster


class Ended(NamedTuple):
    """What the program reached: a partial matching and prices that hold it within eps."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m], -1: free
    rounds: jax.Array  # int32


def solve(
    cost: jax.Array,
    prices: jax.Array,
    levels: jax.Array,
    max_rounds: jax.Array,
    grain: jax.Array,
    *,
    interpret: bool = False,
) -> Ended:
    """Match rows to columns at minimal total cost.

    Args:
        cost: float32[n, m], n <= m, of values in [-1, 1] or +inf.
        prices: float32[m], finite, to start from.
        levels: float32[k]; eps of each phase of bidding, k >= 1.
        max_rounds: int32; limit on the rounds.
        grain: float32; prices of the last phase are multiples of it (0: any).
        interpret: run on any device, slowly, for tests.

    Returns:
        The `Ended`. Rows without a path of allowed pairs, or cut off by `max_rounds`, have no
        column. When n < m, columns left out keep the lowest price if all prices were equal at the
        start and there was one phase, which never frees a column; else they may end dearer.
    """
    n, m = cost.shape
    width = max(pl.next_power_of_2(m), SLOTS)
    call = pl.pallas_call(
        partial(_kernel, n=n, m=m, width=width, on_device=not interpret),
        out_shape=(
            jax.ShapeDtypeStruct((1,), jnp.int32),
            jax.ShapeDtypeStruct((width + SLOTS,), jnp.float32),
            jax.ShapeDtypeStruct((width + SLOTS,), jnp.int32),
            jax.ShapeDtypeStruct((2 * width,), jnp.int32),
            jax.ShapeDtypeStruct((width + SLOTS,), jnp.int32),
            jax.ShapeDtypeStruct((width,), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="auction",
    )
    rounds, prices, owner, *_ = call(cost, prices, levels, max_rounds.reshape(1), grain.reshape(1))
    return Ended(prices[:m], owner[:m], rounds[0])


def _kernel(
    cost_ref: Any,
    start_ref: Any,
    levels_ref: Any,
    limit_ref: Any,
    grain_ref: Any,
    rounds_ref: Any,
    prices_ref: Any,
    owner_ref: Any,
    column_ref: Any,
    waiting_ref: Any,
    parent_ref: Any,
    *,
    n: int,
    m: int,
    width: int,
    on_device: bool,
) -> None:
    state = (prices_ref, owner_ref, column_ref, waiting_ref, parent_ref)
    table = Table(cost_ref, *state, n=n, m=m, width=width, on_device=on_device)
    phases = levels_ref.shape[0]
    limit, grain = limit_ref[0], grain_ref[0]
    columns = table.columns()
    start = plgpu.load(start_ref.at[columns], mask=columns < m, other=jnp.float32(0))
    table.prices[columns] = start
    unmatched = jnp.full(width, -1, jnp.int32)
    table.owner[columns] = unmatched

    def phase(k: jax.Array, s: _Before) -> _Before:
        table.barrier()
        prices, owner = table.prices[columns], table.owner[columns]
        # The last phase uses integer prices where costs are integers: its sums are then exact.
        unit = jnp.where(grain > 0, grain, 1)
        rounded = jnp.floor(prices / unit + 0.5) * unit
        prices = jnp.where((grain > 0) & (k == phases - 1), rounded, prices)
        table.prices[columns] = prices
        eps = levels_ref[k]
        first = _release(table, eps)
        limit_here = jnp.minimum(
            limit, s.rounds + jnp.where(eps > 0, jnp.int32(n), jnp.int32(n // SHORT))
        )
        first, rounds = _kernel_search.bid(table, first, eps, s.rounds, limit_here)
        return _Before(prices, owner, first, rounds)

    zero = jnp.int32(0)
    begin = _Before(start, unmatched, zero, zero)
    before = lax.fori_loop(zero, jnp.int32(phases), phase, begin)
    first = before.first
    if n == m:
        eps = levels_ref[phases - 1]
        first = lax.cond(
            n - first > n // STALLED, lambda: _settle(table, before, eps), lambda: first
        )
    rounds_ref[0] = _kernel_search.augment(table, first, before.rounds, limit)


class _Before(NamedTuple):
    """The start of a phase, and the counts accumulated over the phases before it."""

    prices: jax.Array  # float32[width]
    owner: jax.Array  # int32[width]
    first: jax.Array  # int32; ``waiting[first:n]`` are the rows that it left without a column
    rounds: jax.Array  # int32


class _Choices(NamedTuple):
    """The column some rows hold and the best column available to them."""

    rows: jax.Array  # int32[slots]
    column: jax.Array  # int32[slots], -1: none
    own: jax.Array  # float32[slots], cost of that pair alone, +inf without one
    held: jax.Array  # float32[slots], and with the price
    best: jax.Array  # float32[slots]
    noise: jax.Array  # float32[slots], by how much rounding may part the two


def _choices(table: Table, chunk: jax.Array) -> _Choices:
    rows = chunk * SLOTS + lax.iota(jnp.int32, SLOTS)
    inside = rows < table.n
    best = _kernel_search.least_of_rows(table.values(rows, inside))
    column = table.column[rows]
    holds = column >= 0
    place = jnp.maximum(column, 0)
    at = table.cost.at[jnp.where(inside, rows, 0), place]
    own = plgpu.load(at, mask=holds, other=INF)
    held = own + table.prices[place]
    noise = 2.0**-23 * (jnp.abs(own) + jnp.abs(best - own))
    return _Choices(rows, column, own, held, best, noise)


def _num_chunks(n: int) -> jax.Array:
    return jnp.int32(-(-n // SLOTS))


def _release(table: Table, eps: jax.Array) -> jax.Array:
    """Free the pairs that are more than `eps` worse than the row's best; list idle rows."""
    _kernel_search.find_columns(table)
    chunks = _num_chunks(table.n)

    def body(k: jax.Array, first: jax.Array) -> jax.Array:
        c = _choices(table, chunks - 1 - k)  # the list grows from its end
        idle = (c.rows < table.n) & ~((c.held < INF) & (c.held - c.best <= eps + c.noise))
        _kernel_search.put(
            table.owner, c.column, jnp.full(SLOTS, -1, jnp.int32), idle & (c.column >= 0)
        )
        return _kernel_search.list_rows(table, first, c.rows, idle)

    first = lax.fori_loop(jnp.int32(0), chunks, body, jnp.int32(table.n))
    table.barrier()
    return first


def _settle(table: Table, before: _Before, eps: jax.Array) -> jax.Array:
    """Return to the start of the last phase, with lower prices, if fewer rows wait then.

    With many equal costs the rough phases often end with an optimal matching at prices that do not
    show it: lowering these costs a few passes, augmenting every row again hundreds.

    Returns:
        Where the waiting rows begin.
    """
    columns = table.columns()
    last_prices, last_owner = table.prices[columns], table.owner[columns]
    table.barrier()
    table.prices[columns] = before.prices
    table.owner[columns] = before.owner
    _kernel_search.find_columns(table)

    def lower(k: jax.Array, changed: jax.Array) -> jax.Array:
        c = _choices(table, k)
        dear = (c.held < INF) & (c.held > c.best + c.noise)
        table.barrier()
        _kernel_search.put(table.prices, c.column, c.best - c.own, dear)
        table.barrier()
        return changed + jnp.sum(jnp.where(dear, 1, 0), dtype=jnp.int32)

    def body(s: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        changed = lax.fori_loop(jnp.int32(0), _num_chunks(table.n), lower, jnp.int32(0))
        return changed, s[1] + 1

    lax.while_loop(
        lambda s: (s[0] > 0) & (s[1] < SETTLING_PASSES), body, (jnp.int32(1), jnp.int32(0))
    )
    better = _release(table, eps) > before.first
    prices, owner = table.prices[columns], table.owner[columns]
    table.barrier()
    table.prices[columns] = jnp.where(better, prices, last_prices)
    table.owner[columns] = jnp.where(better, owner, last_owner)
    return _release(table, eps)  # the list belongs to the chosen one
