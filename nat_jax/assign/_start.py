"""Initial prices of the bidding: estimated from the costs, or the caller's."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from nat_jax.assign import _bidding
from nat_jax.assign._problem import Standard

# Shares of rows that find a column of their own at the caller's prices. With exact prices about
# eight in ten do, ties of rounded sums being many; with fewer than seven no start was better.
_NEARLY_SOLVED = 0.79
_GOOD_START = 0.7
_PHASES_BACK = 2  # for what lies between
_SAMPLE = 64  # rows that ranges are measured on where they only make the search faster


class Start(NamedTuple):
    """The initial state of the bidding."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m]
    phase: jax.Array  # int32, the first to go through
    span: jax.Array  # float32, the unit of the rough values of eps


def cold_start(problem: Standard) -> Start:
    """Start at the first phase, with every row unmatched."""
    prices = _mean_prices(problem)
    unmatched = jnp.full(problem.cost.shape[1], -1, jnp.int32)
    return Start(prices, unmatched, jnp.int32(0), _span(problem.cost, prices))


def warm_start(problem: Standard, prices: jax.Array, *, last_phase: int) -> Start:
    """Start from the caller's prices, at the phase that they are good enough for."""
    owner = _bidding.claim(problem.cost, prices)
    share = jnp.mean(owner >= 0) * (problem.cost.shape[1] / problem.cost.shape[0])
    early = max(last_phase - _PHASES_BACK, 0)
    phase = jnp.where(share >= _NEARLY_SOLVED, last_phase, early).astype(jnp.int32)

    def warm() -> Start:
        return Start(prices, owner, phase, _span(problem.cost, prices))

    return lax.cond(share >= _GOOD_START, warm, lambda: cold_start(problem))


def given_prices(problem: Standard, prices: jax.Array, exchanged: bool) -> jax.Array:
    """Return the caller's prices as a start; those of rows, if `exchanged`, in terms of columns."""
    n, m = problem.cost.shape
    # A constant in all prices means nothing and costs precision: the lowest becomes 0.
    finite = jnp.isfinite(prices)
    prices = prices - jnp.min(prices, initial=jnp.inf, where=finite)
    prices = jnp.where(finite & jnp.isfinite(prices), prices, 0)
    if exchanged:
        best = jnp.min(problem.cost + prices[:, None], axis=0)
        prices = jnp.where(best < jnp.inf, -best, 0)
    if n < m:  # as many columns are left out as can be, and those share the lowest price
        prices = jnp.maximum(prices - jnp.sort(prices)[m - n - 1], 0)
    return prices


def _mean_prices(problem: Standard) -> jax.Array:
    """Return initial prices estimated from the column means."""
    # Features near one direction shift all costs of a column; its mean estimates that shift.
    means = lax.cond(problem.dense, partial(jnp.mean, axis=0), _mean_of_finite, problem.cost)
    n, m = problem.cost.shape
    if n == m:
        return -means
    # The n columns cheapest on average would end at one level, if rows did not differ: as far as
    # they do, each finds a column of its own at the lowest price.
    residuals = _sample(problem.cost) - means
    finite = jnp.isfinite(residuals)
    spread = jnp.sqrt(jnp.mean(jnp.where(finite, residuals, 0) ** 2))
    return jnp.maximum(jnp.sort(means)[n - 1] - means - spread, 0)


def _sample(cost: jax.Array) -> jax.Array:
    """Return some rows of `cost`, at equal distances."""
    return cost[:: max(1, cost.shape[0] // _SAMPLE)]


def _mean_of_finite(cost: jax.Array) -> jax.Array:
    finite = cost < jnp.inf
    number = jnp.maximum(jnp.sum(finite, axis=0, dtype=jnp.float32), 1)
    return jnp.sum(cost, axis=0, where=finite) / number


def _span(cost: jax.Array, prices: jax.Array) -> jax.Array:
    """Return the range of ``cost + prices`` over some rows."""
    some = _sample(cost) + prices[None]
    finite = some < jnp.inf
    high = jnp.max(some, initial=-jnp.inf, where=finite)
    span = high - jnp.min(some, initial=jnp.inf, where=finite)
    return jnp.where((span > 0) & (span < jnp.inf), span, 0)
