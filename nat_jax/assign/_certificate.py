"""The certificate: how far a matching can be from the optimum, from its prices (weak duality)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nat_jax.assign import _bidding, _paths
from nat_jax.assign._assignment import Status
from nat_jax.assign._problem import EXACT_INTEGERS, ROUNDOFF, TINY, Standard, standardise


class Solved(NamedTuple):
    """A solution of a problem with n <= m."""

    col4row: jax.Array  # int32[n]
    total: jax.Array  # float32
    prices: jax.Array  # float32[m]
    row_values: jax.Array  # float32[n], min_j(c[i, j] + p[j]) up to a common constant
    gap: jax.Array  # float32
    rounds: jax.Array  # int32
    status: jax.Array  # int32


def certify(given: jax.Array, problem: Standard, ended: _paths.Matching) -> Solved:
    """Complete the matching, bound its distance from the optimum and set the status."""
    n, m = given.shape
    cost, prices = problem.cost, ended.prices
    missing = ended.col4row < 0
    free, _ = _bidding.pack(jnp.arange(m, dtype=jnp.int32), ended.owner < 0, m)
    col4row = jnp.where(missing, free[jnp.cumsum(missing) - 1], ended.col4row)

    rows = jnp.arange(n)
    held = cost[rows, col4row] + prices[col4row]
    best = jnp.min(cost + prices[None], axis=1)
    slack = jnp.maximum(held - best, 0)
    # Each of the two sums is one rounding away from the true one; that of `best` also bounds the
    # sums which are larger.
    rounding = ROUNDOFF * (jnp.abs(held) + jnp.abs(best)) + 2 * problem.entry_error
    largest = problem.largest + jnp.max(jnp.abs(prices))
    given_prices = prices * problem.unit
    exact = problem.integral & jnp.all(given_prices == jnp.round(given_prices))
    exact &= largest * problem.unit < EXACT_INTEGERS
    rounding = jnp.where(exact, 0, rounding)
    taken = jnp.zeros(m, bool).at[col4row].set(True)
    left_out = jnp.sum(jnp.where(taken, 0, prices - jnp.min(prices)))
    summing = 1 + (n + m) * 2 * ROUNDOFF
    gap = (jnp.sum(slack + rounding) + left_out) * summing * problem.unit
    gap = gap + jnp.where(exact, 0, 8 * n * TINY)  # what the scaling back may lose

    status = jnp.where(
        jnp.any(missing) | ended.cut_off, Status.MAX_ROUNDS, Status.OPTIMAL_WITHIN_EPS
    )
    status = jnp.where(ended.infeasible, Status.INFEASIBLE, status)
    status = jnp.where(problem.nonfinite, Status.NONFINITE, status)
    certain = (status != Status.NONFINITE) & ~jnp.isnan(gap)
    return Solved(
        col4row=col4row,
        total=jnp.sum(given[rows, col4row].astype(jnp.float32)),
        prices=given_prices,
        row_values=best * problem.unit,
        gap=jnp.where(certain, gap, jnp.inf).astype(jnp.float32),
        rounds=ended.rounds,
        status=status.astype(jnp.int32),
    )


def complete(given: jax.Array, col4row: jax.Array, *, maximize: bool) -> Solved:
    """Find the prices that certify a matching from elsewhere.

    Args:
        given: [n, m], n <= m.
        col4row: int32[n]; distinct columns.
        maximize: whether the solver maximised.
    """
    n, m = given.shape
    problem = standardise(given, maximize)
    cost = problem.cost
    forbidden = cost[jnp.arange(n), col4row] == jnp.inf
    place = jnp.where(forbidden, m, col4row)
    owner = jnp.full(m, -1, jnp.int32)
    owner = owner.at[place].set(jnp.arange(n, dtype=jnp.int32), mode="drop")
    # Columns left out have price 0, the lowest; the others come down towards it.
    unknown = jnp.full(m, 0 if n == m else jnp.inf, jnp.float32)
    prices = jnp.where(owner < 0, 0, unknown)
    prices = _bidding.settle(cost, prices, owner, n + 1)
    if n < m:  # where no chain of allowed pairs leads to a column left out, any high price will do
        known = prices < jnp.inf
        high = jnp.max(jnp.where(known, prices, 0)) + n * jnp.max(
            jnp.abs(cost), where=cost < jnp.inf, initial=0
        )
        prices = _bidding.settle(cost, jnp.where(known, prices, high), owner, n + 1)
    col4row = jnp.where(forbidden, -1, col4row)
    infeasible = jnp.any(forbidden)
    ended = _paths.Matching(
        prices, owner, col4row, jnp.int32(n), infeasible, jnp.bool_(False), jnp.int32(0)
    )
    return certify(given, problem, ended)
