"""The two searches of the auction: bidding for most rows, shortest paths for the last few.

Both work on one problem ``cost`` float32[n, m] with n <= m, minimised, of values in [-1, 1] (beyond
2**126 in [-4, 4]) or +inf for a forbidden pair, and on prices float32[m]; a row prefers the columns
with the smallest ``cost + prices``. Bidding is the auction of Bertsekas ("The auction algorithm",
1988) with `slots` rows at a time, so that a round costs slots * m instead of n * m. Shortest
augmenting paths as in Jonker and Volgenant ("A shortest augmenting path algorithm for dense and
sparse linear assignment problems", 1987) end the price wars that a few last rows would fight, and
need no eps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SLOTS = 16  # rows that bid in one round
SHORT = 8  # the part of n rounds that bidding without an eps gets
STALLED = 16  # the last phase has stalled if more than one row in so many is still waiting
SETTLING_PASSES = 16
RISE_WITHOUT_RIVAL = 2.0  # by how much a row that has no second choice raises a price


class Bidding(NamedTuple):
    """State of the auction."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m], -1: free
    bidders: jax.Array  # int32[slots], -1: nobody is left for this slot
    called: jax.Array  # int32, how many of the idle rows have come up to bid
    rounds: jax.Array  # int32


def pack(rows: jax.Array, wanted: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Pack the rows where `wanted` to the front of an int32[size]; return it and their number."""
    place = jnp.where(wanted, jnp.cumsum(wanted, dtype=jnp.int32) - 1, size)
    packed = jnp.zeros(size, jnp.int32).at[place].set(rows, mode="drop")
    return packed, jnp.sum(wanted, dtype=jnp.int32)


def columns_of_rows(owner: jax.Array, num_rows: int) -> jax.Array:
    """Invert `owner`: int32[num_rows], -1 for a row without a column."""
    columns = jnp.arange(owner.shape[0], dtype=jnp.int32)
    place = jnp.where(owner >= 0, owner, num_rows)
    return jnp.full(num_rows, -1, jnp.int32).at[place].set(columns, mode="drop")


def valid(owner: jax.Array, num_rows: int) -> jax.Array:
    """Return `owner` without what is no row, and with one column at most for each row."""
    owner = jnp.where(owner < num_rows, owner, -1)
    columns = jnp.arange(owner.shape[0], dtype=jnp.int32)
    return jnp.where(columns_of_rows(owner, num_rows)[owner] == columns, owner, -1)


def _first_choices(
    cost: jax.Array, prices: jax.Array, owner: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compare each held pair with its row's best: float32[m] each, for free columns arbitrary.

    Returns:
        What the pair costs its row, what the row's best pair would, and by how much the two may
        differ by rounding alone: over such differences ties would be fought forever.
    """
    own = cost[owner, jnp.arange(owner.shape[0])]
    best = jnp.min(cost + prices[None], axis=1)[owner]
    return own + prices, best, 2.0**-23 * (jnp.abs(own) + jnp.abs(best - own))


def claim(cost: jax.Array, prices: jax.Array) -> jax.Array:
    """Return an `owner` in which each row that its best column goes to has that one."""
    n, m = cost.shape
    values = cost + prices[None]
    best = jnp.min(values, axis=1)
    columns = jnp.arange(m, dtype=jnp.float32)[None]  # minima of integers are slow on XLA:CPU
    first = jnp.min(jnp.where(values == best[:, None], columns, float(m)), axis=1)
    place = jnp.where(best < jnp.inf, first.astype(jnp.int32), m)
    rows = jnp.arange(n, dtype=jnp.int32)
    return jnp.full(m, -1, jnp.int32).at[place].max(rows, mode="drop")


def release(cost: jax.Array, prices: jax.Array, owner: jax.Array, eps: jax.Array) -> jax.Array:
    """Return `owner` without the pairs that are more than `eps` worse than the row's best."""
    held, best, noise = _first_choices(cost, prices, owner)
    return jnp.where((owner >= 0) & (held - best <= eps + noise), owner, -1)


def settle(cost: jax.Array, prices: jax.Array, owner: jax.Array, max_passes: int) -> jax.Array:
    """Return lower prices of held columns, so that each is its row's best (Bellman and Ford).

    For an optimal matching that ends after as many passes as the longest shortest path has pairs.

    Args:
        cost: float32[n, m].
        prices: float32[m]; +inf for a price not yet known.
        owner: int32[m].
        max_passes: limit on the passes over `cost`.
    """

    def body(s: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        prices, _, passes = s
        held, best, noise = _first_choices(cost, prices, owner)
        dear = (owner >= 0) & (held > best + noise)
        own = cost[owner, jnp.arange(owner.shape[0])]
        return jnp.where(dear, best - own, prices), jnp.any(dear), passes + 1

    prices, _, _ = lax.while_loop(
        lambda s: s[1] & (s[2] < max_passes), body, (prices, jnp.bool_(True), jnp.int32(0))
    )
    return prices


def bid(
    cost: jax.Array,
    prices: jax.Array,
    owner: jax.Array,
    eps: jax.Array,
    *,
    slots: int,
    rounds: jax.Array,
    max_rounds: jax.Array,
) -> Bidding:
    """Let waiting rows bid, `slots` at a time, until fewer than `slots` wait.

    Args:
        cost: float32[n, m].
        prices: float32[m].
        owner: int32[m]; pairs that already hold within `eps`.
        eps: float32; what a winner pays beyond its second choice.
        slots: rows that bid in one round.
        rounds: int32; the count so far.
        max_rounds: int32; the count at which to stop.

    Returns:
        The state; every pair holds within `eps` (and rounding).
    """
    n = cost.shape[0]
    idle = columns_of_rows(owner, n) < 0
    queue, number = pack(jnp.arange(n, dtype=jnp.int32), idle, n)

    def goes_on(s: Bidding) -> jax.Array:
        return jnp.all(s.bidders >= 0) & (s.rounds < max_rounds)

    def body(s: Bidding) -> Bidding:
        return _bidding_round(cost, eps, queue, number, s)

    nobody = jnp.full(slots, -1, jnp.int32)
    bidders, called = _call_up(nobody, queue, number, jnp.int32(0))
    return lax.while_loop(goes_on, body, Bidding(prices, owner, bidders, called, rounds))


def _call_up(
    bidders: jax.Array, queue: jax.Array, number: jax.Array, called: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Fill the empty slots with the next rows of the queue, as long as there are any."""
    slot = jnp.arange(len(bidders))
    empty = bidders < 0
    before = jnp.sum(empty[None] & (slot[None] < slot[:, None]), axis=1, dtype=jnp.int32)
    place = called + before
    following = jnp.where(place < number, queue[jnp.minimum(place, len(queue) - 1)], -1)
    return jnp.where(empty, following, bidders), called + jnp.sum(empty, dtype=jnp.int32)


def _bidding_round(
    cost: jax.Array, eps: jax.Array, queue: jax.Array, number: jax.Array, s: Bidding
) -> Bidding:
    # Minima and comparisons: `argmax` and `top_k` are many times slower on XLA:CPU, as are minima
    # of integers.
    m, slots = cost.shape[1], len(s.bidders)
    values = cost[s.bidders] + s.prices[None]  # [slots, m]
    best = jnp.min(values, axis=1)
    # Among equally good columns a free one comes first, and each slot starts to look elsewhere.
    columns = jnp.arange(m, dtype=jnp.int32)[None]
    head = (jnp.arange(slots, dtype=jnp.int32) * (m // slots))[:, None]
    order = jnp.where(columns < head, columns + m, columns).astype(jnp.float32)
    order = order + jnp.where(s.owner < 0, 0.0, 2.0 * m)[None]
    first = jnp.min(jnp.where(values == best[:, None], order, 4.0 * m), axis=1)
    column = first.astype(jnp.int32) % m
    others = jnp.where(columns == column[:, None], jnp.inf, values)
    rise = jnp.minimum(jnp.min(others, axis=1) - best, RISE_WITHOUT_RIVAL) + eps
    able = best < jnp.inf  # a row without any allowed column leaves the auction
    offer = jnp.where(able, s.prices[column] + rise, -jnp.inf)

    slot = jnp.arange(slots)
    mine, theirs = offer[:, None], offer[None]
    beaten_by = (theirs > mine) | ((theirs == mine) & (slot[None] < slot[:, None]))
    wins = able & ~jnp.any((column[:, None] == column[None]) & beaten_by, axis=1)
    place = jnp.where(wins, column, m)
    back = jnp.where(able, jnp.where(wins, s.owner[column], s.bidders), -1)
    bidders, called = _call_up(back, queue, number, s.called)
    return Bidding(
        prices=s.prices.at[place].set(offer, mode="drop"),
        owner=s.owner.at[place].set(s.bidders, mode="drop"),
        bidders=bidders,
        called=called,
        rounds=s.rounds + 1,
    )


class Matching(NamedTuple):
    """State between two augmenting paths."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m], -1: free
    col4row: jax.Array  # int32[n], -1: none
    tried: jax.Array  # int32, rows of the list dealt with
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
