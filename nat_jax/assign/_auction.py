"""The auction: bidding matches most rows, shortest augmenting paths match the rest."""

import math
import operator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from nat_jax.assign import _bidding, _paths
from nat_jax.assign._assignment import Assignment
from nat_jax.assign._batch import solve_all
from nat_jax.assign._certificate import Solved, certify
from nat_jax.assign._problem import Standard, as_cost, full_precision, standardise
from nat_jax.assign._start import Start, cold_start, given_prices, warm_start

if TYPE_CHECKING:
    from nat_jax.assign import _kernel

# Values of eps of the rough phases, in units of the range of cost + first prices. Measured on
# random, near-collapsed and nearly matched features: small and steep beats the textbook's range/4.
_ROUGH_EPS = (1e-2, 1e-3, 1e-4)
_NEARLY_SQUARE = 1.1  # with more columns for each row than that few rows compete: no rough phases
_LARGEST_EPS = 8.0  # more than costs differ by in the standard form
_ROUNDING_OF_PATHS = 1e-6  # of prices that rise along many paths
_MAX_KERNEL_COLUMNS = 2048
_NO_LIMIT = np.iinfo(np.int32).max


def auction(
    cost: ArrayLike,
    *,
    maximize: bool = False,
    eps: ArrayLike | None = None,
    prices: ArrayLike | None = None,
    max_rounds: int | None = None,
    kernel: bool = False,
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
            min(n, m) * eps. None: only by float32 rounding. Some hundredths of the range of the
            costs save time, less does not.
        prices: float[..., m]; the `prices` of a similar problem as a start, up to a constant. They
            change the time and the choice among equally good matchings, not the guarantee.
        max_rounds: limit on `Assignment.rounds` for each problem; at the limit the rows that are
            left take free columns in order. None: no limit; at most n**2 + O(n) rounds are
            possible, a few hundred are usual at n = 256.
        kernel: on NVIDIA GPUs of compute capability 8.0 and later, run the complete search in one
            Pallas program for each problem of at most 2048 columns. Its result is checked: a wrong
            one would cost time. It has been compiled for such GPUs but not yet been run on one.
            Elsewhere nothing changes.

    Returns:
        The `Assignment`. Its `gap` bounds value - optimum for the input as given. It is the
        sum over rows of ``slack = c[i, s(i)] + p[s(i)] - min_j(c[i, j] + p[j])``, plus
        ``p[j] - min(p)`` for each column left out when n < m (when n > m the roles of rows and
        columns are exchanged), plus a rounding term of order n * 2**-24 * (max|c| + max|p|), where
        a common offset of all costs does not count. Integer costs are solved exactly with gap 0
        as long as (max(c) - min(c)) + max|p| < 2**24, for which (max(c) - min(c)) * (n + 1) < 2**24
        suffices without `prices`; beyond that, the gap is the bound that was reached.

    Raises:
        TypeError: `cost` or `prices` is no array of real numbers.
        ValueError: a rank, shape or option is wrong.

    >>> import numpy as np
    >>> costs = np.random.default_rng(0).integers(0, 100, (32, 8, 8))  # 32 problems
    >>> solution = auction(costs).check()
    >>> solution.col4row.shape, float(solution.gap.max())
    ((32, 8), 0.0)
    >>> again = auction(costs, prices=solution.prices, maximize=False)
    >>> bool((again.cost == solution.cost).all())
    True
    """
    with full_precision(cost):
        array = as_cost(cost)
        start = None
        if prices is not None:
            start = _as_prices(prices, (*array.shape[:-2], array.shape[-1]))
        limit = _NO_LIMIT if max_rounds is None else _as_index("max_rounds", max_rounds)
        if not 0 <= limit <= _NO_LIMIT:
            raise ValueError(f"max_rounds must be in [0, {_NO_LIMIT}], got {limit}")
        tolerance = np.float32(0) if eps is None else _as_eps(eps)
        return _auction(
            array,
            start,
            tolerance,
            np.int32(limit),  # of NumPy: JAX takes its time to make a scalar
            maximize=bool(maximize),
            kernel=bool(kernel),
        )


def _as_index(name: str, value: int) -> int:
    try:
        return operator.index(value)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        raise TypeError(f"{name} must be a Python integer, also under jit, got {value!r}") from None


def _as_prices(prices: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(prices)
    if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(
        array.dtype, jnp.integer
    ):
        raise TypeError(f"prices must hold real numbers, got dtype {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"prices must have shape [..., m] = {shape}, got {array.shape}")
    return array.astype(jnp.float32)


def _as_eps(eps: ArrayLike) -> jax.Array | np.ndarray:
    if np.ndim(eps):
        raise ValueError(f"eps must be one number for all problems, got shape {np.shape(eps)}")
    if isinstance(eps, jax.core.Tracer):
        return jnp.asarray(eps, jnp.float32)
    number = np.asarray(eps, np.float32)  # of NumPy, as JAX's is a tracer inside jit
    if not 0 <= number < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {number}")
    return number


@partial(jax.jit, static_argnames=("maximize", "kernel"))
def _auction(
    cost: jax.Array,
    prices: jax.Array | None,
    eps: jax.Array,
    max_rounds: jax.Array,
    *,
    maximize: bool,
    kernel: bool,
) -> Assignment:
    exchanged = cost.shape[-2] > cost.shape[-1]
    solve = partial(_solve_one, maximize=maximize, exchanged=exchanged, kernel=kernel)
    start = () if prices is None else (prices,)
    return solve_all(solve, cost, *start, shared=(eps, max_rounds))


def _solve_one(
    given: jax.Array,
    *start_and_limits: jax.Array,
    maximize: bool,
    exchanged: bool,
    kernel: bool,
) -> Solved:
    *start, eps, max_rounds = start_and_limits
    n, m = given.shape
    problem = standardise(given, maximize)
    eps = jnp.where(problem.integral, jnp.floor(eps), eps) / problem.unit
    eps = jnp.minimum(eps, _LARGEST_EPS)
    ladder = _rough_phases(n, m)
    if start:
        prices = given_prices(problem, start[0] / problem.unit, exchanged)
        begin = warm_start(problem, prices, last_phase=len(ladder))
    else:
        begin = cold_start(problem)
    levels = jnp.maximum(jnp.array([*ladder, 0.0], jnp.float32) * begin.span, eps)

    loops = partial(_search_in_loops, problem, begin, levels, max_rounds)
    if kernel and m <= _MAX_KERNEL_COLUMNS:
        program = partial(_search_in_kernel, problem, begin, levels, max_rounds)
        ended = lax.platform_dependent(cuda=program, default=loops)
    else:
        ended = loops()
    if n < m:
        ended = _paths.even_out(problem.cost, ended, max_rounds=max_rounds)
    return certify(given, problem, ended)


def _search_in_loops(
    problem: Standard, begin: Start, levels: jax.Array, max_rounds: jax.Array
) -> _paths.Matching:
    """Go through the phases and match the rows that are left."""
    cost = problem.cost
    n, m = cost.shape
    final = len(levels) - 1

    def bid(k: jax.Array, phases: tuple[_Phase, _Phase]) -> tuple[_Phase, _Phase]:
        _, before = phases
        # The last phase uses integer prices where costs are integers: its sums are then exact.
        rounded = jnp.round(before.prices * problem.unit) / problem.unit
        integer_prices = problem.integral & (k == final)
        before = before._replace(prices=jnp.where(integer_prices, rounded, before.prices))
        return before, _bid(cost, before, levels[k], max_rounds=max_rounds)

    none = _Phase(begin.prices, begin.owner, jnp.int32(0))
    before, last = lax.fori_loop(begin.phase, final + 1, bid, (none, none))
    if n == m:
        last = _unless_stalled(cost, before, last, levels[final])
    return _paths.augment(cost, *last, max_rounds=max_rounds)


def _search_in_kernel(
    problem: Standard,
    begin: Start,
    levels: jax.Array,
    max_rounds: jax.Array,
    *,
    interpret: bool = False,
) -> _paths.Matching:
    """Search in one Pallas program; check its result, keep the valid part and match the rest."""
    from nat_jax.assign import _kernel  # Pallas takes long to import

    cost = problem.cost
    skipped = jnp.arange(len(levels)) < begin.phase
    grain = jnp.where(problem.integral, 1 / problem.unit, 0)
    ended = _kernel.solve(
        cost,
        begin.prices,
        jnp.where(skipped, levels[-1], levels),
        max_rounds,
        grain,
        interpret=interpret,
    )
    return _keep_what_holds(cost, ended, levels[-1], max_rounds)


def _keep_what_holds(
    cost: jax.Array, ended: "_kernel.Ended", eps: jax.Array, max_rounds: jax.Array
) -> _paths.Matching:
    prices = jnp.where(jnp.isfinite(ended.prices), ended.prices, 0)
    owner = _bidding.valid(ended.owner, cost.shape[0])
    owner = _bidding.release(cost, prices, owner, eps + _ROUNDING_OF_PATHS)
    return _paths.augment(cost, prices, owner, ended.rounds, max_rounds=max_rounds)


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
    limit = jnp.where(eps > 0, jnp.int32(n), jnp.int32(n // _bidding.SHORT))
    bids = _bidding.bid(
        cost,
        before.prices,
        _bidding.release(cost, before.prices, before.owner, eps),
        eps,
        slots=min(_bidding.SLOTS, n),
        rounds=before.rounds,
        max_rounds=jnp.minimum(max_rounds, before.rounds + limit),
    )
    return _Phase(bids.prices, bids.owner, bids.rounds)


def _unless_stalled(cost: jax.Array, before: _Phase, last: _Phase, eps: jax.Array) -> _Phase:
    """Return `last`, or where ties brought it to a standstill the phase before it, settled.

    With many equal costs the rough phases often end with an optimal matching at prices that do not
    show it: lowering these costs a few passes, augmenting every row again hundreds.
    """
    waiting = jnp.sum(last.owner < 0)

    def settle() -> _Phase:
        prices = _bidding.settle(cost, before.prices, before.owner, _bidding.SETTLING_PASSES)
        owner = _bidding.release(cost, prices, before.owner, eps)
        better = jnp.sum(owner < 0) < waiting
        return _Phase(
            prices=jnp.where(better, prices, last.prices),
            owner=jnp.where(better, owner, last.owner),
            rounds=last.rounds,
        )

    return lax.cond(waiting > cost.shape[0] // _bidding.STALLED, settle, lambda: last)


def _rough_phases(n: int, m: int) -> tuple[float, ...]:
    """Return the values of eps that come before the last, in units of the range."""
    if m > _NEARLY_SQUARE * n:
        return ()
    return _ROUGH_EPS if n == m else _ROUGH_EPS[1:]
