"""The auction: bidding brings in most rows, shortest augmenting paths the rest."""

import math
import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from nat_jax.assign import _search
from nat_jax.assign._assignment import Assignment
from nat_jax.assign._problem import (
    Solved,
    Standard,
    as_cost,
    certify,
    full_precision,
    solve_all,
    standardise,
)

_SLOTS = 16  # rows that bid in one round
# Values of eps of the rough phases, in units of the range of cost + first prices. Measured on
# random, near-collapsed and nearly matched features: small and steep beats the textbook's range/4.
_ROUGH_EPS = (1e-2, 1e-3, 1e-4)
_NEARLY_SQUARE = 1.1  # with more columns for each row than that few rows compete: no rough phases
_STALLED = 16  # the last phase has stalled if more than one row in so many is still waiting
_SHORT = 8  # the part of n rounds that bidding without an eps gets
_SETTLING_PASSES = 16
_GOOD_START = 2 / 3  # share of rows that must find a column of their own at the caller's prices
_SAMPLE = 64  # rows that ranges are measured on where they only make the search faster
_NO_LIMIT = np.iinfo(np.int32).max


def auction(
    cost: ArrayLike,
    *,
    maximize: bool = False,
    eps: ArrayLike | None = None,
    prices: ArrayLike | None = None,
    max_rounds: int | None = None,
) -> Assignment:
    """Match rows to columns at minimal total cost.

    ``row_ind, col_ind = auction(cost)`` is ``scipy.optimize.linear_sum_assignment(cost)`` for
    arrays on any device, for batches, and under `jit`, `vmap` and `scan`. Nothing is raised for
    what the values of `cost` hold: see `Assignment.status` and `Assignment.check`. Gradients do
    not flow through a matching: they are zero.

    Among equally good matchings the choice is arbitrary, but the same on every run.

    Args:
        cost: float, integer or bool [..., n, m]; leading dimensions are independent problems. +inf
            forbids a pair (-inf under `maximize`); NaN and the other infinity make the status
            NONFINITE. 16-bit floats are widened to float32, which all arithmetic is in once a
            common offset has been removed; NumPy's float64 keeps its precision until then.
        maximize: find the largest total instead.
        eps: scalar >= 0, in units of `cost`; the total may be worse than the optimum by
            min(n, m) * eps. None: only by float32 rounding. Larger values save time.
        prices: float[..., m]; the `prices` of a similar problem as a start. They change the time
            and the choice among equally good matchings, not the guarantee.
        max_rounds: limit on `Assignment.rounds` for each problem; at the limit the rows that are
            left take free columns in order. None: no limit; at most n**2 + O(n) rounds are
            possible, a few hundred are usual at n = 256.

    Returns:
        The `Assignment`. Its `gap` bounds value - optimum for the input as given. It is the
        sum over rows of ``slack = c[i, s(i)] + p[s(i)] - min_j(c[i, j] + p[j])``, plus
        ``p[j] - min(p)`` for each column left out when n < m (when n > m the roles of rows and
        columns are exchanged), plus a rounding term of order n * 2**-24 * (max|c| + max|p|), where
        a common offset of all costs does not count. Integer costs are solved exactly with gap 0
        as long as (max(c) - min(c)) + max|p| < 2**24, for which (max(c) - min(c)) * (n + 1) < 2**24
        suffices without `prices`; beyond, the gap says what was reached.

    Raises:
        TypeError: `cost` or `prices` is no array of real numbers.
        ValueError: a rank, shape or option is wrong.
    """
    with full_precision(cost):
        array = as_cost(cost)
        start = None
        if prices is not None:
            start = _as_prices(prices, (*array.shape[:-2], array.shape[-1]))
        limit = _NO_LIMIT if max_rounds is None else operator.index(max_rounds)
        if not 0 <= limit <= _NO_LIMIT:
            raise ValueError(f"max_rounds must be in [0, {_NO_LIMIT}], got {limit}")
        tolerance = jnp.float32(0) if eps is None else _as_eps(eps)
        return _auction(array, start, tolerance, jnp.int32(limit), maximize=bool(maximize))


def _as_prices(prices: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(prices)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
        array.dtype, jnp.integer
    ):
        raise TypeError(f"prices must hold real numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"prices must have shape [..., m] = {shape}, got {array.shape}")
    return array.astype(jnp.float32)


def _as_eps(eps: ArrayLike) -> jax.Array:
    array = jnp.asarray(eps, jnp.float32)
    if array.ndim:
        raise ValueError(f"eps must be one number for all problems, got shape {array.shape}")
    if not isinstance(array, jax.core.Tracer) and not 0 <= float(array) < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {float(array)}")
    return array


@partial(jax.jit, static_argnames="maximize")
def _auction(
    cost: jax.Array,
    prices: jax.Array | None,
    eps: jax.Array,
    max_rounds: jax.Array,
    *,
    maximize: bool,
) -> Assignment:
    exchanged = cost.shape[-2] > cost.shape[-1]
    solve = partial(_solve_one, maximize=maximize, exchanged=exchanged)
    start = () if prices is None else (prices,)
    return solve_all(solve, cost, *start, shared=(eps, max_rounds))


def _solve_one(
    given: jax.Array,
    *start_and_limits: jax.Array,
    maximize: bool,
    exchanged: bool,
) -> Solved:
    *start, eps, max_rounds = start_and_limits
    n, m = given.shape
    problem = standardise(given, maximize)
    cost = problem.cost
    eps = jnp.where(problem.whole, jnp.floor(eps), eps) / problem.unit
    ladder = _rough_phases(n, m)
    if start:
        prices = _given_prices(problem, start[0] / problem.unit, exchanged)
        begin = _warm_start(problem, prices, phase=len(ladder))
    else:
        begin = _cold_start(problem)
    levels = jnp.maximum(jnp.array([*ladder, 0.0], jnp.float32) * begin.span, eps)

    def bid(k: jax.Array, phases: tuple[_Phase, _Phase]) -> tuple[_Phase, _Phase]:
        _, before = phases
        # The last phase deals in whole prices where costs are whole: its sums are then exact.
        whole = jnp.round(before.prices * problem.unit) / problem.unit
        deals_whole = problem.whole & (k == len(ladder))
        before = before._replace(prices=jnp.where(deals_whole, whole, before.prices))
        return before, _bid(cost, before, levels[k], max_rounds=max_rounds)

    none = _Phase(begin.prices, begin.owner, jnp.int32(0))
    before, last = lax.fori_loop(begin.phase, len(ladder) + 1, bid, (none, none))
    if n == m:
        last = _unless_stalled(cost, before, last, eps)
    ended = _search.augment(
        cost, last.prices, last.owner, rounds=last.rounds, max_rounds=max_rounds
    )
    if n < m:
        ended = _search.even_out(cost, ended, max_rounds=max_rounds)
    return certify(given, problem, ended)


class _Start(NamedTuple):
    """What the bidding starts from."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m]
    phase: jax.Array  # int32, the first to go through
    span: jax.Array  # float32, the unit of the rough values of eps


class _Phase(NamedTuple):
    """What one phase of bidding hands to the next."""

    prices: jax.Array  # float32[m]
    owner: jax.Array  # int32[m]
    rounds: jax.Array  # int32


def _bid(
    cost: jax.Array,
    before: _Phase,
    eps: jax.Array,
    *,
    max_rounds: jax.Array,
) -> _Phase:
    """Free the rows whose pair is off by more than `eps` and let them bid, for n rounds at most.

    Without an eps rows may take tied columns from each other forever: then for fewer.
    """
    n = cost.shape[0]
    bids = _search.bid(
        cost,
        before.prices,
        _search.release(cost, before.prices, before.owner, eps),
        eps,
        slots=min(_SLOTS, n),
        rounds=before.rounds,
        max_rounds=jnp.minimum(max_rounds, before.rounds + jnp.where(eps > 0, n, n // _SHORT)),
    )
    return _Phase(bids.prices, bids.owner, bids.rounds)


def _unless_stalled(cost: jax.Array, before: _Phase, last: _Phase, eps: jax.Array) -> _Phase:
    """Return `last`, or where ties brought it to a standstill the phase before it, settled.

    With many equal costs the rough phases often end with an optimal matching at prices that do not
    show it: lowering these costs a few passes, augmenting every row again hundreds.
    """
    waiting = jnp.sum(last.owner < 0)

    def settle() -> _Phase:
        prices = _search.settle(cost, before.prices, before.owner, _SETTLING_PASSES)
        owner = _search.release(cost, prices, before.owner, eps)
        better = jnp.sum(owner < 0) < waiting
        return _Phase(
            prices=jnp.where(better, prices, last.prices),
            owner=jnp.where(better, owner, last.owner),
            rounds=last.rounds,
        )

    return lax.cond(waiting > cost.shape[0] // _STALLED, settle, lambda: last)


def _rough_phases(n: int, m: int) -> tuple[float, ...]:
    """Return the values of eps that come before the last, in units of the range."""
    if m > _NEARLY_SQUARE * n:
        return ()
    return _ROUGH_EPS if n == m else _ROUGH_EPS[1:]


def _cold_start(problem: Standard) -> _Start:
    prices = _mean_prices(problem)
    nobody = jnp.full(problem.cost.shape[1], -1, jnp.int32)
    return _Start(prices, nobody, jnp.int32(0), _span(problem.cost, prices))


def _warm_start(problem: Standard, prices: jax.Array, *, phase: int) -> _Start:
    """Start at that phase from the caller's prices; at the first without them if they mislead."""
    owner = _search.claim(problem.cost, prices)
    good = jnp.sum(owner >= 0) >= _GOOD_START * problem.cost.shape[0]
    warm = _Start(prices, owner, jnp.int32(phase), jnp.float32(1))
    return lax.cond(good, lambda: warm, lambda: _cold_start(problem))


def _given_prices(problem: Standard, prices: jax.Array, exchanged: bool) -> jax.Array:
    """Return the caller's prices as a start; those of rows, if `exchanged`, in terms of columns."""
    n, m = problem.cost.shape
    prices = jnp.where(jnp.isfinite(prices), prices, 0)
    if exchanged:
        best = jnp.min(problem.cost + prices[:, None], axis=0)
        prices = jnp.where(best < jnp.inf, -best, 0)
    if n < m:  # as many columns are left out as can be, and those share the lowest price
        prices = jnp.maximum(prices, jnp.sort(prices)[m - n - 1])
    return prices


def _mean_prices(problem: Standard) -> jax.Array:
    """Return prices to start from where nothing is known."""
    # Features near one direction make a column cheap or dear as a whole; its mean says so.
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
    """Return the range of ``cost + prices`` over some rows, 1 if it is nothing."""
    some = _sample(cost) + prices[None]
    finite = some < jnp.inf
    high = jnp.max(some, initial=-jnp.inf, where=finite)
    span = high - jnp.min(some, initial=jnp.inf, where=finite)
    return jnp.where((span > 0) & (span < jnp.inf), span, 1)
