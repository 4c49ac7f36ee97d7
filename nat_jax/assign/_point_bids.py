"""Bidding among points: the auction without a cost matrix, on short lists of columns.

A row looks at all columns once, in products of a batch of rows with all columns, and keeps the
best column of each of `LANES` lanes and the largest value among the columns it did not keep, its
bound. Prices only rise, so the bound holds from then on: the row bids from its list, at 256 values
instead of m, until the list's best falls below the bound. Then it looks again.

Here a row maximises ``value = x[i] @ y[j] - price[j]``.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nat_jax.assign._bidding import pack

LANES = 256
_BATCH = 256  # rows of one product with all columns
_FEW = 16  # the same where fewer rows are left
# Many equal rows outbid each other by eps, again and again. After so many looks and rounds for each
# row on average, eps doubles with every further two looks or one round, up to 2**10 times.
_LOOKS = 8
_ROUNDS = 8
_DOUBLINGS = 10
_OUT_OF_REACH = 1e30  # the price of a column that only fills up the last lanes


class _State(NamedTuple):
    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m], -1: free
    column: jax.Array  # int32[n], -1: unmatched
    stale: jax.Array  # bool[n], the row must look before it bids
    values: jax.Array  # float32[n, LANES], of the listed columns at price 0
    listed: jax.Array  # int32[n, LANES], the columns
    bound: jax.Array  # float32[n], no other column has a larger value
    looks: jax.Array  # int32
    rounds: jax.Array  # int32


# The bidding rows and how many have been called up; prices, owner, column, stale, rounds.
_Bidders = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def bid(
    x: jax.Array,
    y: jax.Array,
    prices: jax.Array,
    column: jax.Array,
    *,
    eps: jax.Array,
    leave: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Match rows to columns by bids.

    From equal prices no larger eps needs to come first: lists make the many bids at a small one
    cheap, and what costs time is looking.

    Args:
        x: float32[n, D].
        y: float32[m, D], n <= m, in random order.
        prices: float32[m].
        column: int32[n]; a matching. Its pairs stay where they are within eps of their rows' best.
        eps: float32, in the units of ``x @ y.T``.
        leave: int32; as many rows need not come to hold what they bid for, and get the columns
            that are free. The last few rows take a large part of the time.

    Returns:
        The columns, int32[n], and the prices, float32[m].
    """
    n, m = len(x), len(y)
    y, prices = _in_lanes(y, prices)
    rows = jnp.arange(n, dtype=jnp.int32)
    none = jnp.zeros((n, LANES))
    state = _State(
        prices=prices.reshape(-1),
        owner=jnp.full(prices.size, -1, jnp.int32).at[column].set(rows),
        column=column,
        stale=jnp.ones(n, bool),
        values=none,
        listed=none.astype(jnp.int32),
        bound=jnp.full(n, jnp.inf),
        looks=jnp.int32(0),
        rounds=jnp.int32(0),
    )
    state = _look_again(x, y, state, jnp.ones(n, bool))
    state = _release(x, y, state, eps)

    def doublings(s: _State) -> jax.Array:
        size = max(n, _BATCH)
        looks, rounds = s.looks / size - _LOOKS, s.rounds / size - _ROUNDS
        return jnp.floor(jnp.maximum(looks / 2, 0) + jnp.maximum(rounds, 0))

    def goes_on(s: _State) -> jax.Array:
        return (jnp.sum(s.column < 0) > leave) & (doublings(s) <= _DOUBLINGS)

    def body(s: _State) -> _State:
        s = _look_again(x, y, s, s.stale & (s.column < 0))
        raised = eps * jnp.exp2(doublings(s))
        s = _bid_from_lists(s, raised, slots=_BATCH, at_least=_BATCH // 2)
        return _bid_from_lists(s, raised, slots=_FEW, at_least=1)

    state = lax.while_loop(goes_on, body, state)
    free, _ = pack(jnp.arange(m, dtype=jnp.int32), state.owner[:m] < 0, m)
    missing = state.column < 0
    column = jnp.where(missing, free[jnp.cumsum(missing) - 1], state.column)
    return column, state.prices[:m]


def best_values(x: jax.Array, y: jax.Array, prices: jax.Array) -> jax.Array:
    """Return ``max_j(x[i] @ y[j] - prices[j])``, float32[n], without an [n, m] array."""
    y, prices = _in_lanes(y, prices)

    def of_batch(x: jax.Array) -> jax.Array:
        def step(best: jax.Array, lane: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return jnp.maximum(best, jnp.max(_values(x, *lane), axis=1)), None

        return lax.scan(step, jnp.full(len(x), -jnp.inf), (y, prices))[0]

    batches = jnp.pad(x, ((0, -len(x) % _BATCH), (0, 0))).reshape(-1, _BATCH, x.shape[1])
    return lax.map(of_batch, batches).reshape(-1)[: len(x)]


def _in_lanes(y: jax.Array, prices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return columns [m / LANES, LANES, D] and their prices, filled up with ones out of reach."""
    filling = -len(y) % LANES
    prices = jnp.pad(prices, (0, filling), constant_values=_OUT_OF_REACH).reshape(-1, LANES)
    return jnp.pad(y, ((0, filling), (0, 0))).reshape(-1, LANES, y.shape[1]), prices


def _values(x: jax.Array, y: jax.Array, prices: jax.Array) -> jax.Array:
    return jnp.dot(x, y.T, precision=lax.Precision.HIGHEST) - prices[None]


def _look(x: jax.Array, y: jax.Array, prices: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return values, listed and bound of some rows."""
    lanes = prices.reshape(-1, LANES)

    def step(
        s: tuple[jax.Array, jax.Array, jax.Array], lane: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        best, second, place = s
        value = _values(x, lane[1], lane[2])
        second = jnp.maximum(second, jnp.minimum(value, best))
        place = jnp.where(value > best, lane[0], place)
        return (jnp.maximum(value, best), second, place), None

    low = jnp.full((len(x), LANES), -jnp.inf)
    start = (low, low, jnp.zeros(low.shape, jnp.int32))
    (best, second, place), _ = lax.scan(step, start, (jnp.arange(len(y)), y, lanes))
    listed = place * LANES + jnp.arange(LANES, dtype=jnp.int32)[None]
    return best + prices[listed], listed, jnp.max(second, axis=1)


def _look_again(x: jax.Array, y: jax.Array, s: _State, wanted: jax.Array) -> _State:
    """Let the rows where `wanted` look: in large batches, and the rest of them in small ones."""
    n = len(x)
    queue, number = pack(jnp.arange(n, dtype=jnp.int32), wanted, n + _BATCH)

    def look(s: tuple[jax.Array, _State], size: int) -> tuple[jax.Array, _State]:
        done, state = s
        rows = lax.dynamic_slice(queue, (done,), (size,))
        values, listed, bound = _look(x[rows], y, state.prices)
        place = jnp.where(done + jnp.arange(size) < number, rows, n)
        return done + size, state._replace(
            stale=state.stale.at[place].set(False, mode="drop"),
            values=state.values.at[place].set(values, mode="drop"),
            listed=state.listed.at[place].set(listed, mode="drop"),
            bound=state.bound.at[place].set(bound, mode="drop"),
        )

    many = number - number % _BATCH
    begin = (jnp.int32(0), s._replace(looks=s.looks + number))
    begin = lax.while_loop(lambda t: t[0] < many, partial(look, size=_BATCH), begin)
    return lax.while_loop(lambda t: t[0] < number, partial(look, size=_FEW), begin)[1]


def _release(x: jax.Array, y: jax.Array, s: _State, eps: jax.Array) -> _State:
    """Free the rows whose pair is off by more than `eps`."""
    rows = jnp.arange(len(x), dtype=jnp.int32)
    flat = y.reshape(-1, y.shape[2])

    def holds(row: tuple[jax.Array, ...]) -> jax.Array:
        x, column, values, listed, bound = row
        own = jnp.sum(x * flat[column]) - s.prices[column]
        best = jnp.maximum(jnp.max(values - s.prices[listed]), bound)
        return own >= best - eps

    kept = lax.map(holds, (x, s.column, s.values, s.listed, s.bound), batch_size=_BATCH)
    column = jnp.where(kept, s.column, -1)
    owner = jnp.full(len(s.owner), -1, jnp.int32)
    owner = owner.at[jnp.where(kept, column, len(owner))].set(rows, mode="drop")
    return s._replace(column=column, owner=owner)


def _bid_from_lists(s: _State, eps: jax.Array, *, slots: int, at_least: int) -> _State:
    """Let rows that need not look bid, `slots` at a time, until fewer than `at_least` want to."""
    n, m = len(s.column), len(s.prices)
    idle = (s.column < 0) & ~s.stale
    queue, number = pack(jnp.arange(n, dtype=jnp.int32), idle, n)
    slot = jnp.arange(slots, dtype=jnp.int32)
    lane = jnp.arange(LANES, dtype=jnp.float32)[None]

    def call_up(bidders: jax.Array, called: jax.Array) -> tuple[jax.Array, jax.Array]:
        empty = bidders < 0
        place = called + jnp.cumsum(empty, dtype=jnp.int32) - 1
        following = jnp.where(place < number, queue[jnp.minimum(place, n - 1)], -1)
        called = jnp.minimum(called + jnp.sum(empty, dtype=jnp.int32), number)
        return jnp.where(empty, following, bidders), called

    def body(t: _Bidders) -> _Bidders:
        bidders, called, prices, owner, column, stale, rounds = t
        row = jnp.maximum(bidders, 0)
        values = s.values[row] - prices[s.listed[row]]
        best = jnp.max(values, axis=1)
        first = jnp.min(jnp.where(values == best[:, None], lane, float(LANES)), axis=1)
        second = jnp.max(jnp.where(lane == first[:, None], -jnp.inf, values), axis=1)
        bound = s.bound[row]
        # A list that misses the best by less than eps / 2 is good enough.
        able = (bidders >= 0) & (best >= bound - eps / 2)
        wanted = s.listed[row, jnp.minimum(first.astype(jnp.int32), LANES - 1)]
        rise = jnp.maximum(best - jnp.maximum(second, bound), 0) + eps
        offer = prices[wanted] + rise
        place = jnp.where(able, wanted, m)
        prices = prices.at[place].max(offer, mode="drop")
        # Among equal offers the last slot wins. Its mark is below every owner.
        highest = able & (offer == prices[wanted])
        before = owner[wanted]
        place = jnp.where(highest, wanted, m)
        owner = owner.at[place].min(-2 - slot, mode="drop")
        wins = highest & (owner[wanted] == -2 - slot)
        owner = owner.at[jnp.where(wins, wanted, m)].set(bidders, mode="drop")
        evicted = jnp.where(wins, before, -1)
        column = column.at[jnp.where(evicted >= 0, evicted, n)].set(-1, mode="drop")
        column = column.at[jnp.where(wins, bidders, n)].set(wanted, mode="drop")
        must_look = (bidders >= 0) & ~able
        stale = stale.at[jnp.where(must_look, bidders, n)].set(True, mode="drop")
        back = jnp.where(wins, evicted, jnp.where(able, bidders, -1))
        return (*call_up(back, called), prices, owner, column, stale, rounds + 1)

    def goes_on(t: _Bidders) -> jax.Array:
        return (jnp.sum(t[0] >= 0) >= at_least) & (t[-1] < s.rounds + n)

    begin = call_up(jnp.full(slots, -1, jnp.int32), jnp.int32(0))
    t = lax.while_loop(goes_on, body, (*begin, s.prices, s.owner, s.column, s.stale, s.rounds))
    return s._replace(prices=t[2], owner=t[3], column=t[4], stale=t[5], rounds=t[6])
