"""`_bidding` and `_paths` as one Pallas program carries them out, in registers and cache.

What a round waits for is the latency of loads and of reductions across warps. So a row that bids is
spread over the lanes of one warp, whose minimum of integers is one instruction; prices, owners and
lists lie in memory that only this program touches (the nearest cache holds them, as it does most of
a small problem's costs) and are gathered and scattered there. Triton orders memory accesses of one
thread only: a barrier stands between a write and the reads of other threads, and between reads and
the write that follows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import triton as plgpu

from nat_jax.assign._bidding import RISE_WITHOUT_RIVAL, SLOTS
from nat_jax.assign._paths import Tree

INF = np.float32(np.inf)
_LANES = 128  # columns that a warp loads at once
_ROW_BITS = 12  # of an integer that holds a row (plus one), and above it a column
_ROW_MASK = (1 << _ROW_BITS) - 1
_NONE = np.int32(np.iinfo(np.int32).max)


class Table(NamedTuple):
    """References to the problem and to the state of its solution.

    Arrays that are scattered to have spare places at their end for masked-out values: an unmasked
    store to distinct places is right in interpret mode too.
    """

    cost: Any  # float32[n, m]
    prices: Any  # float32[width + slots]
    owner: Any  # int32[width + slots], -1: free
    column: Any  # int32[2 * width], of each row, -1: none; not kept up while rows bid
    waiting: Any  # int32[width + slots]; from some place to n, rows without a column
    parent: Any  # int32[width]; a row by which a column was reached
    n: int
    m: int
    width: int  # m padded to a power of two; padding columns are forbidden
    on_device: bool

    def columns(self) -> jax.Array:
        return lax.iota(jnp.int32, self.width)

    def folded_columns(self) -> jax.Array:
        """Number the columns, int32[folds, lanes]."""
        lanes = min(self.width, _LANES)
        shape = (self.width // lanes, lanes)
        fold, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        return fold * lanes + lane

    def values(self, rows: jax.Array, wanted: jax.Array) -> jax.Array:
        """Load ``cost + prices`` of rows, float32[folds, slots, lanes]; +inf where not `wanted`."""
        columns = self.folded_columns()
        inside = _per_row(wanted) & _per_column(columns < self.m)
        at = self.cost.at[_per_row(jnp.where(wanted, rows, 0)), _per_column(columns)]
        return plgpu.load(at, mask=inside, other=INF) + _per_column(self.prices[columns])

    def row(self, row: jax.Array) -> jax.Array:
        """Load one row of the costs, float32[width]."""
        columns = self.columns()
        return plgpu.load(self.cost.at[row, columns], mask=columns < self.m, other=INF)

    def barrier(self) -> None:
        """Let all threads come here, and see what any of them has written."""
        if self.on_device:
            plgpu.debug_barrier()


def _per_row(x: jax.Array) -> jax.Array:
    return x[None, :, None]


def _per_column(x: jax.Array) -> jax.Array:
    return x[:, None]


def put(ref: Any, place: jax.Array, values: jax.Array, wanted: jax.Array) -> None:
    """Write ``ref[place] = values`` where `wanted`."""
    number = len(values)
    aside = ref.shape[0] - number + lax.iota(jnp.int32, number)
    plgpu.store(ref.at[jnp.where(wanted, place, aside)], values)


def _ranks(wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Count the slots that are wanted: before each, int32[slots], and in all."""
    slot = lax.iota(jnp.int32, SLOTS)
    bits = jnp.sum(jnp.where(wanted, 1 << slot, 0), dtype=jnp.int32)
    return lax.population_count(bits & ((1 << slot) - 1)), lax.population_count(bits)


def list_rows(table: Table, first: jax.Array, rows: jax.Array, wanted: jax.Array) -> jax.Array:
    """Write the `wanted` of the rows before ``waiting[first]``; return where they begin."""
    before, number = _ranks(wanted)
    put(table.waiting, first - number + before, rows, wanted)
    return first - number


class _Bidding(NamedTuple):
    """State between rounds."""

    hand: jax.Array  # int32[slots], the row that bids next, -1: none
    bidders: jax.Array  # int32, rows in hand
    first: jax.Array  # int32, where the rows begin that still wait
    rounds: jax.Array  # int32


def bid(
    table: Table, first: jax.Array, eps: jax.Array, rounds: jax.Array, max_rounds: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Let waiting rows bid until the slots cannot be filled.

    Returns:
        Where the waiting rows begin, and the rounds so far.
    """
    enough = min(SLOTS, table.n)

    def refill(b: _Bidding) -> _Bidding:
        empty = b.hand < 0
        before, number = _ranks(empty)
        place = b.first + before
        takes = empty & (place < table.n)
        row = table.waiting[jnp.where(takes, place, 0)]
        taken = jnp.minimum(number, table.n - b.first)
        return b._replace(
            hand=jnp.where(takes, row, b.hand),
            bidders=SLOTS - number + taken,
            first=b.first + taken,
        )

    def goes_on(b: _Bidding) -> jax.Array:
        return (b.bidders >= enough) & (b.rounds < max_rounds)

    def body(b: _Bidding) -> _Bidding:
        return refill(b._replace(hand=_round(table, b.hand, eps), rounds=b.rounds + 1))

    hand = jnp.full(SLOTS, -1, jnp.int32)
    b = lax.while_loop(goes_on, body, refill(_Bidding(hand, jnp.int32(0), first, rounds)))
    table.barrier()
    first = list_rows(table, b.first, b.hand, b.hand >= 0)
    table.barrier()
    return first, b.rounds


def _round(table: Table, hand: jax.Array, eps: jax.Array) -> jax.Array:
    """Let the rows in hand bid; return those that bid next."""
    width = table.width
    columns = table.folded_columns()
    slot = lax.iota(jnp.int32, SLOTS)
    # Among equally good columns a free one comes first, and each slot starts to look elsewhere.
    head = slot * (width // SLOTS)
    order = ((_per_column(columns) - _per_row(head)) & (width - 1)) << _ROW_BITS
    owner = table.owner[columns]
    order = order + _per_column(jnp.where(owner < 0, 0, 2 * width << _ROW_BITS) + owner + 1)

    values = _sortable(table.values(hand, hand >= 0))
    best = _over_columns(values)
    place = _over_columns(jnp.where(values == _per_row(best), order, _NONE))
    column = ((place >> _ROW_BITS) + head) & (width - 1)
    evicted = (place & _ROW_MASK) - 1
    others = jnp.where(_per_column(columns) == _per_row(column), _NONE, values)
    second = _unsortable(_over_columns(others))
    best = _unsortable(best)
    able = best < INF  # a row without any allowed column leaves the auction
    rise = jnp.where(second < INF, second - best, RISE_WITHOUT_RIVAL)
    rise = jnp.where(able, jnp.minimum(rise, RISE_WITHOUT_RIVAL) + eps, -INF)
    offer = table.prices[column] + rise

    mine, theirs = rise[:, None], rise[None]
    beaten_by = (theirs > mine) | ((theirs == mine) & (slot[None] < slot[:, None]))
    rivals = (column[:, None] == column[None]) & beaten_by
    wins = able & (jnp.sum(jnp.where(rivals, 1, 0), axis=1, dtype=jnp.int32) == 0)
    table.barrier()
    put(table.prices, column, offer, wins)
    put(table.owner, column, hand, wins)
    table.barrier()
    return jnp.where(able, jnp.where(wins, evicted, hand), -1)


def _sortable(x: jax.Array) -> jax.Array:
    """Map float32 to int32 of the same order: a warp has a single instruction for their minimum."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & _NONE)


def _unsortable(bits: jax.Array) -> jax.Array:
    """Undo `_sortable`; `_NONE` maps to NaN."""
    return lax.bitcast_convert_type(bits ^ ((bits >> 31) & _NONE), jnp.float32)


def _over_columns(x: jax.Array) -> jax.Array:
    """Return the least of each row of an int32[folds, slots, lanes]."""
    return jnp.min(jnp.min(x, axis=0), axis=1)


def least_of_rows(x: jax.Array) -> jax.Array:
    return _unsortable(_over_columns(_sortable(x)))


def _least(x: jax.Array) -> jax.Array:
    return _unsortable(jnp.min(_sortable(x)))


class _Matching(NamedTuple):
    """State between two augmenting paths."""

    prices: jax.Array  # float32[width]
    owner: jax.Array  # int32[width]
    first: jax.Array  # int32, where the rows begin that still wait
    rounds: jax.Array  # int32


def augment(table: Table, first: jax.Array, rounds: jax.Array, max_rounds: jax.Array) -> jax.Array:
    """Match the waiting rows, each along a shortest augmenting path; return the rounds so far."""
    columns = table.columns()

    def goes_on(s: _Matching) -> jax.Array:
        return (s.first < table.n) & (s.rounds < max_rounds)

    def body(s: _Matching) -> _Matching:
        row = table.waiting[s.first]
        tree = _shortest_path(table, s, row, max_rounds)
        found = ~tree.going & (tree.nearest < INF)
        lift = jnp.where(found, jnp.maximum(tree.nearest - tree.settled, 0), 0)
        prices = s.prices + lift
        table.barrier()
        table.prices[columns] = prices
        table.parent[columns] = tree.parent
        table.barrier()
        _flip(table, row, tree.column, found)
        table.barrier()
        return _Matching(prices, table.owner[columns], s.first + 1, tree.rounds)

    find_columns(table)
    begin = _Matching(table.prices[columns], table.owner[columns], first, rounds)
    return lax.while_loop(goes_on, body, begin).rounds


def _shortest_path(table: Table, s: _Matching, row: jax.Array, max_rounds: jax.Array) -> Tree:
    columns, width = table.columns(), table.width
    # Among equally near columns a free one ends the search: it comes first.
    order = (columns + jnp.where(s.owner < 0, 0, width) << _ROW_BITS) + s.owner + 1
    first = table.row(row) + s.prices
    root = Tree(
        reach=jnp.where(first < INF, first - _least(first), INF),
        parent=jnp.broadcast_to(row, width),
        settled=jnp.full(width, INF),
        nearest=jnp.float32(0),
        column=jnp.int32(0),
        going=jnp.bool_(True),
        rounds=s.rounds,
    )

    def goes_on(t: Tree) -> jax.Array:
        return t.going & (t.rounds < max_rounds)

    def body(t: Tree) -> Tree:
        nearest = _least(t.reach)
        place = jnp.min(jnp.where(t.reach == nearest, order, _NONE))
        column = (place >> _ROW_BITS) & (width - 1)
        via = (place & _ROW_MASK) - 1
        going = (via >= 0) & (nearest < INF)
        via = jnp.maximum(via, 0)
        here = columns == column
        own = table.cost[via, jnp.minimum(column, table.m - 1)] + table.prices[column]
        # A pair held within eps may look dear to its row: no step of the path is negative.
        detour = nearest + jnp.maximum(table.row(via) + s.prices - own, 0)
        settled = jnp.where(here & going, nearest, t.settled)
        shorter = going & (detour < t.reach) & (settled == INF)
        reach = jnp.where(shorter, detour, t.reach)
        return Tree(
            reach=jnp.where(here, INF, reach),
            parent=jnp.where(shorter, via, t.parent),
            settled=settled,
            nearest=nearest,
            column=column,
            going=going,
            rounds=t.rounds + 1,
        )

    return lax.while_loop(goes_on, body, root)


def _flip(table: Table, row: jax.Array, column: jax.Array, found: jax.Array) -> None:
    """Swap matched and unmatched pairs along the path from the free column back to `row`."""

    def body(
        s: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        column, _, pairs = s
        taker = table.parent[column]
        previous = table.column[taker]
        table.barrier()
        table.owner[column] = taker
        table.column[taker] = column
        return previous, taker != row, pairs + 1

    lax.while_loop(lambda s: s[1] & (s[2] < table.n), body, (column, found, jnp.int32(0)))


def find_columns(table: Table) -> None:
    """Bring ``table.column`` up to date with the owners."""
    columns = table.columns()
    table.barrier()
    table.column[columns] = jnp.full(table.width, -1, jnp.int32)
    table.barrier()
    owner = table.owner[columns]
    put(table.column, owner, columns, owner >= 0)
    table.barrier()
