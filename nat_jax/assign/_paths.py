"""The second search: shortest augmenting paths, for the last rows and for too dear free columns.

As in Jonker and Volgenant ("A shortest augmenting path algorithm for dense and sparse linear
assignment problems", 1987). They end the price wars that a few last rows would fight, and need no
eps. Problems and prices are as in `_bidding`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nat_jax.assign._bidding import columns_of_rows, pack


class Matching(NamedTuple):
    """State between two augmenting paths."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m], -1: free
    col4row: jax.Array  # int32[n], -1: none
    tried: jax.Array  # int32, rows of the list already processed
    infeasible: jax.Array  # bool, some row has no path over allowed pairs
    cut_off: jax.Array  # bool, the limit on rounds came before the prices were even
    rounds: jax.Array  # int32


class Tree(NamedTuple):
    """State of the search for one row's shortest augmenting path (Dijkstra over columns)."""

    reach: jax.Array  # float32[m], length of the shortest path so far; +inf once scanned
    parent: jax.Array  # int32[m], the row from which the column was reached
    settled: jax.Array  # float32[m], distance of a scanned column; +inf before
    nearest: jax.Array  # float32, distance of `column`
    column: jax.Array  # int32, the column reached last
    going: jax.Array  # bool
    rounds: jax.Array  # int32


def augment(
    cost: jax.Array,
    prices: jax.Array,
    owner: jax.Array,
    rounds: jax.Array,
    *,
    max_rounds: jax.Array,
) -> Matching:
    """Match the rows that are left, each along a shortest augmenting path.

    Pairs that are within eps of a row's best stay so. Rows that cannot be matched with allowed
    pairs, or not within `max_rounds`, are left at -1. Each path takes at most n + 1 rounds.
    """
    n = cost.shape[0]
    col4row = columns_of_rows(owner, n)
    todo, number = pack(jnp.arange(n, dtype=jnp.int32), col4row < 0, n)

    def goes_on(s: Matching) -> jax.Array:
        return (s.tried < number) & (s.rounds < max_rounds)

    def body(s: Matching) -> Matching:
        row = todo[s.tried]
        first = cost[row] + s.prices
        first = jnp.where(first < jnp.inf, first - jnp.min(first), jnp.inf)
        settled = jnp.full_like(s.prices, jnp.inf)
        return _follow(cost, s, row, first, settled, s.owner < 0, max_rounds)

    no = jnp.bool(False)
    begin = Matching(prices, owner, col4row, jnp.int32(0), no, no, rounds)
    return lax.while_loop(goes_on, body, begin)


def even_out(cost: jax.Array, s: Matching, *, max_rounds: jax.Array) -> Matching:
    """Bring the prices of columns left out down to the lowest, if need be by taking other columns.

    As if a row without preferences waited for each column that is to be left out: it holds one of
    lowest price, or it has to find one along a shortest augmenting path.
    """
    n, m = cost.shape

    def lower_where_unwanted() -> jax.Array:
        best = jnp.min(cost + s.prices[None], axis=1)
        wanted_at = -jnp.min(cost - best[:, None], axis=0)
        lower = jnp.maximum(jnp.minimum(s.prices, wanted_at), jnp.min(s.prices))
        return jnp.where(s.owner < 0, lower, s.prices)

    def dearer(s: Matching) -> jax.Array:
        # The difference decides, not a comparison: two subnormal prices may differ by nothing.
        return jnp.where(s.owner < 0, s.prices - jnp.min(s.prices), 0)

    def goes_on(s: Matching) -> jax.Array:
        return jnp.any(dearer(s) > 0) & ~s.infeasible & (s.rounds < max_rounds) & (s.tried < m)

    def body(s: Matching) -> Matching:
        too_dear = dearer(s) > 0
        held = (s.owner < 0) & ~too_dear
        first = jnp.where(held, jnp.inf, s.prices - jnp.min(s.prices))
        settled = jnp.where(held, 0, jnp.full_like(s.prices, jnp.inf))
        return _follow(cost, s, jnp.int32(n), first, settled, too_dear, max_rounds)

    every_row_has_one = jnp.all(s.col4row >= 0)
    needed = every_row_has_one & jnp.any(dearer(s) > 0)
    prices = lax.cond(needed, lower_where_unwanted, lambda: s.prices)
    begin = s._replace(prices=prices, tried=jnp.int32(0))
    ended = lax.while_loop(lambda s: every_row_has_one & goes_on(s), body, begin)
    cut_off = every_row_has_one & ~ended.infeasible & jnp.any(dearer(ended) > 0)
    return ended._replace(cut_off=cut_off)


def _follow(
    cost: jax.Array,
    s: Matching,
    row: jax.Array,
    first: jax.Array,
    settled: jax.Array,
    ends: jax.Array,
    max_rounds: jax.Array,
) -> Matching:
    """Change the matching along the shortest path from `row` to a column of `ends`.

    Args:
        cost: float32[n, m].
        s: the state before.
        row: int32; n: a row without preferences, whose column counts as free.
        first: float32[m], the length of the path's first step to each column.
        settled: float32[m], distances known beforehand, +inf for the others.
        ends: bool[m].
        max_rounds: limit on the count of rounds.
    """
    tree = _shortest_path(cost, row, s, first, settled, ends, max_rounds)
    reached = tree.nearest < jnp.inf
    found = ~tree.going & reached
    lift = jnp.where(found, jnp.maximum(tree.nearest - tree.settled, 0), 0)
    owner, col4row = _flip(tree, row, found, s.owner, s.col4row)
    return Matching(
        prices=s.prices + lift,
        owner=owner,
        col4row=col4row,
        tried=s.tried + 1,
        infeasible=s.infeasible | ~reached,
        cut_off=s.cut_off,
        rounds=tree.rounds,
    )


def _shortest_path(
    cost: jax.Array,
    row: jax.Array,
    s: Matching,
    first: jax.Array,
    settled: jax.Array,
    ends: jax.Array,
    max_rounds: jax.Array,
) -> Tree:
    m = cost.shape[1]
    # Among equally near columns one that ends the search comes first.
    order = jnp.arange(m, dtype=jnp.int32) + jnp.where(ends, 0, m)
    root = Tree(
        reach=first,
        parent=jnp.full(m, row),
        settled=settled,
        nearest=jnp.float32(0),
        column=jnp.int32(0),
        going=jnp.bool(True),
        rounds=s.rounds,
    )

    def goes_on(t: Tree) -> jax.Array:
        return t.going & (t.rounds < max_rounds)

    def body(t: Tree) -> Tree:
        nearest = jnp.min(t.reach)
        place = jnp.min(jnp.where(t.reach == nearest, order, 2 * m))
        taken = place >= m
        column = jnp.where(taken, place - m, place)
        going = taken & (nearest < jnp.inf)
        via = s.owner[column]
        values = cost[via] + s.prices
        own = cost[via, column] + s.prices[column]  # not values[column]: keeps the loop fused
        # A pair held within eps may look dear to its row: no step of the path is negative.
        detour = nearest + jnp.maximum(values - own, 0)
        settled = t.settled.at[column].set(jnp.where(going, nearest, jnp.inf))
        shorter = (detour < t.reach) & (settled == jnp.inf)
        return Tree(
            reach=jnp.where(shorter, detour, t.reach).at[column].set(jnp.inf),
            parent=jnp.where(shorter, via, t.parent),
            settled=settled,
            nearest=nearest,
            column=column,
            going=going,
            rounds=t.rounds + 1,
        )

    return lax.while_loop(goes_on, body, root)


def _flip(
    tree: Tree, row: jax.Array, found: jax.Array, owner: jax.Array, col4row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Swap matched and unmatched pairs along the path from the column reached back to `row`."""
    n = col4row.shape[0]

    def body(
        s: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        owner, col4row, column, _ = s
        taker = tree.parent[column]
        previous = col4row[taker]
        owner = owner.at[column].set(jnp.where(taker < n, taker, -1))
        col4row = col4row.at[taker].set(column, mode="drop")
        return owner, col4row, previous, taker != row

    owner, col4row, _, _ = lax.while_loop(
        lambda s: s[3], body, (owner, col4row, tree.column, found)
    )
    return owner, col4row
