"""The first of two searches: rows without a column bid for one.

The auction of Bertsekas ("The auction algorithm", 1988) with `slots` rows at a time, so that a
round costs slots * m instead of n * m.

Here and in `_paths` a problem is ``cost`` float32[n, m] with n <= m, minimised, of values in
[-1, 1] (beyond 2**126 in [-4, 4]) or +inf for a forbidden pair; with prices float32[m], a row
prefers the columns with the smallest ``cost + prices``.
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
    bidders: jax.Array  # int32[slots], -1: no row is left for this slot
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
    """Return `owner` with invalid rows and repeated rows removed."""
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
    """Return an `owner` in which each row holds its best column, as far as these differ."""
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

    unmatched = jnp.full(slots, -1, jnp.int32)
    bidders, called = _call_up(unmatched, queue, number, jnp.int32(0))
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
