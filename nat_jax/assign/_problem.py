"""What all solvers share: checked input, a standard form, and the certificate of the result."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from nat_jax.assign import _search
from nat_jax.assign._assignment import Assignment, Status

ROUNDOFF = 2.0**-24  # of float32
TINY = 2.0**-126  # the smallest normal float32; what is smaller may count as zero
EXACT_INTEGERS = 2.0**24  # float32 holds every integer up to here


def full_precision(cost: ArrayLike) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which float64 of the host is not narrowed to float32.

    A common offset of the costs would swallow their differences before it can be removed.
    """
    host = _on_host(cost)
    wide = host is not None and host.dtype == np.float64
    return jax.enable_x64(True) if wide else contextlib.nullcontext()


def _on_host(cost: ArrayLike) -> np.ndarray | None:
    """Return what was given as a NumPy array, None if any of it is JAX's."""
    if isinstance(cost, jax.Array):
        return None
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(cost)):
        return None
    return np.asarray(cost)


def as_cost(cost: ArrayLike) -> jax.Array:
    """Return `cost` as an array of real numbers of rank two or more, or say what is wrong."""
    host = _on_host(cost)
    if host is not None and host.dtype.kind not in "fiubV":  # V: the 16-bit floats of ml_dtypes
        raise TypeError(f"cost must hold real numbers, got dtype {host.dtype}")
    if host is not None and host.dtype == np.longdouble != np.float64:
        raise TypeError("cost must not be of dtype longdouble; convert it to float64")
    if host is not None and host.dtype.kind in "iu" and host.size:
        kept = jax.dtypes.canonicalize_dtype(host.dtype)
        if host.min() < np.iinfo(kept).min or host.max() > np.iinfo(kept).max:
            raise ValueError(
                f"cost holds integers beyond {kept}, which JAX narrows {host.dtype} to; "
                "set jax_enable_x64 or pass floats"
            )
    array = cost if isinstance(cost, jax.Array) else jnp.asarray(cost)
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"cost must hold real numbers, got dtype {array.dtype}")
    if array.ndim < 2:
        raise ValueError(
            f"cost must have shape [..., n, m], got {array.shape}; reshape one row to [1, m]"
        )
    return array


class Standard(NamedTuple):
    """A problem to minimise; the given costs are, up to a constant, ``cost * unit``."""

    cost: jax.Array  # float32[n, m]; +inf: forbidden; offset and size removed
    unit: jax.Array  # float32, a power of two
    largest: jax.Array  # float32, of the finite absolute values of `cost`
    dense: jax.Array  # bool; if true, no pair is forbidden
    nonfinite: jax.Array  # bool
    entry_error: jax.Array  # float32, by how much `cost` may miss the given value
    whole: jax.Array  # bool, the costs are integers, whatever their type, and represented exactly


def standardise(cost: jax.Array, maximize: bool) -> Standard:
    """Bring [n, m] costs of any real type to the standard form."""
    if jnp.issubdtype(cost.dtype, jnp.floating):
        return _standardise_floats(cost, maximize)
    if cost.dtype == jnp.bool_:
        cost = cost.astype(jnp.uint8)
    # Differences of integers always fit the unsigned type of the same width.
    unsigned = jnp.dtype(f"uint{8 * cost.dtype.itemsize}")
    whole = cost.astype(unsigned)
    low, high = jnp.min(cost).astype(unsigned), jnp.max(cost).astype(unsigned)
    shifted = (high - whole if maximize else whole - low).astype(jnp.float32)
    span = (high - low).astype(jnp.float32)
    unit = _power_above(span)
    exact = jnp.bool_(True)
    if unsigned.itemsize > 2:
        exact = high - low <= jnp.asarray(EXACT_INTEGERS, unsigned)
    return Standard(
        cost=shifted / unit,
        unit=unit,
        largest=span / unit,
        dense=jnp.bool_(True),
        nonfinite=jnp.bool_(False),
        entry_error=jnp.where(exact, 0, jnp.float32(ROUNDOFF)),
        whole=exact,
    )


def _power_above(size: jax.Array) -> jax.Array:
    """Return the power of two just above `size`, 1 for 0, within what float32 can divide by."""
    exponent = jnp.clip(jnp.frexp(size)[1], -125, 126)
    return jnp.ldexp(jnp.ones((), size.dtype), jnp.where(size > 0, exponent, 0))


def _standardise_floats(cost: jax.Array, maximize: bool) -> Standard:
    # A pass over the costs is what a small or easy problem takes longest for: each one counts.
    dtype = jnp.float64 if cost.dtype == jnp.float64 else jnp.float32
    cost = -cost.astype(dtype) if maximize else cost.astype(dtype)
    low, high = jnp.min(cost), jnp.max(cost)
    dense = jnp.isfinite(jnp.sum(cost))  # minima may pass over NaN, XLA:CPU's do
    low, high, bad = lax.cond(
        dense, lambda _: (low, high, jnp.bool_(False)), _range_of_finite, cost
    )
    # Where an offset is worth removing, x - offset is exact (Sterbenz); so is the scaling.
    offset = jnp.where((low > 0) & (high <= 2 * low), low, 0)
    offset = jnp.where((high < 0) & (low >= 2 * high), high, offset)
    largest = jnp.maximum(jnp.abs(low - offset), jnp.abs(high - offset))
    unit = _power_above(largest)
    bad |= largest > float(jnp.finfo(jnp.float32).max)  # of float64
    known = jnp.where(jnp.isnan(cost) | (cost == -jnp.inf), high, cost)
    return Standard(
        cost=((known - offset) / unit).astype(jnp.float32),
        unit=unit.astype(jnp.float32),
        largest=(largest / unit).astype(jnp.float32),
        dense=dense,
        nonfinite=bad,
        entry_error=jnp.float32(8 * TINY + (ROUNDOFF if dtype == jnp.float64 else 0)),
        whole=_all_whole(known, offset) & (largest <= EXACT_INTEGERS),
    )


def _range_of_finite(cost: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the smallest and largest finite value, 0 without any, and whether NaN or -inf is."""
    finite = jnp.isfinite(cost)
    some = jnp.any(finite)
    low = jnp.where(some, jnp.min(cost, initial=jnp.inf, where=finite), 0)
    high = jnp.where(some, jnp.max(cost, initial=-jnp.inf, where=finite), 0)
    return low, high, jnp.any(~finite & (cost != jnp.inf))


def _all_whole(cost: jax.Array, offset: jax.Array) -> jax.Array:
    """Whether ``cost - offset`` holds integers and infinities only; the first row mostly tells."""

    def whole(some: jax.Array) -> jax.Array:
        return jnp.all(some - offset == jnp.floor(some - offset))

    def all_whole(cost: jax.Array) -> jax.Array:
        # Arithmetic takes subnormal numbers for zero; their bits are not.
        bits = lax.bitcast_convert_type(cost, f"uint{8 * cost.dtype.itemsize}") << 1
        tiny = lax.bitcast_convert_type(jnp.finfo(cost.dtype).tiny, bits.dtype) << 1
        return whole(cost) & ~jnp.any((bits > 0) & (bits < tiny))

    return lax.cond(whole(cost[0]), all_whole, lambda _: jnp.bool_(False), cost)


class Solved(NamedTuple):
    """A solution of a problem with n <= m."""

    col4row: jax.Array  # int32[n]
    total: jax.Array  # float32
    prices: jax.Array  # float32[m]
    row_values: jax.Array  # float32[n], min_j(c[i, j] + p[j]) up to a common constant
    gap: jax.Array  # float32
    rounds: jax.Array  # int32
    status: jax.Array  # int32


def certify(given: jax.Array, problem: Standard, ended: _search.Matching) -> Solved:
    """Complete the matching, bound its distance from the optimum and say how it ended."""
    n, m = given.shape
    cost, prices = problem.cost, ended.prices
    missing = ended.col4row < 0
    free, _ = _search.pack(jnp.arange(m, dtype=jnp.int32), ended.owner < 0, m)
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
    exact = problem.whole & jnp.all(given_prices == jnp.round(given_prices))
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
    prices = _search.settle(cost, prices, owner, n + 1)
    if n < m:  # where no chain of allowed pairs leads to a column left out, any high price will do
        known = prices < jnp.inf
        high = jnp.max(jnp.where(known, prices, 0)) + n * jnp.max(
            jnp.abs(cost), where=cost < jnp.inf, initial=0
        )
        prices = _search.settle(cost, jnp.where(known, prices, high), owner, n + 1)
    col4row = jnp.where(forbidden, -1, col4row)
    infeasible = jnp.any(forbidden)
    ended = _search.Matching(
        prices, owner, col4row, jnp.int32(n), infeasible, jnp.bool_(False), jnp.int32(0)
    )
    return certify(given, problem, ended)


def solve_all(
    solve: Callable[..., Solved],
    cost: jax.Array,
    *per_problem: jax.Array,
    shared: tuple[jax.Array, ...] = (),
) -> Assignment:
    """Run ``solve(cost, *per_problem, *shared)`` on every problem of a batch.

    Args:
        solve: a solver of one problem with n <= m.
        cost: [..., n, m].
        per_problem: arrays with the leading dimensions of `cost`.
        shared: arguments that are the same for all problems.
    """
    *batch, n, m = cost.shape
    if cost.size == 0:
        return _nothing(tuple(batch), n, m)
    arrays = [lax.stop_gradient(x) for x in (wide(cost), *per_problem)]
    shared = tuple(lax.stop_gradient(x) for x in shared)
    single = _with_vmap_rule(solve)
    if not batch:
        solved = single(*arrays, *shared)
    else:
        flat = [x.reshape(math.prod(batch), *x.shape[len(batch) :]) for x in arrays]
        axes = (0,) * len(flat) + (None,) * len(shared)
        solved = jax.vmap(single, in_axes=axes)(*flat, *shared)
        solved = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), solved)
    return _pack(solved) if n <= m else _pack_exchanged(solved, n)


def wide(cost: jax.Array) -> jax.Array:
    """Transpose problems with more rows than columns."""
    n, m = cost.shape[-2:]
    return cost if n <= m else jnp.swapaxes(cost, -1, -2)


def _with_vmap_rule(solve: Callable[..., Solved]) -> Callable[..., Solved]:
    """Give `solve` its own rule for vmap: side by side on accelerators, in turn on the CPU.

    Loops run side by side go on until the slowest problem ends, which gains nothing on a CPU.
    """
    single = jax.custom_batching.custom_vmap(solve)

    def in_turn(*problems: jax.Array) -> Solved:
        return lax.map(lambda problem: single(*problem), problems)

    def rule(size: int, batched: list[bool], *args: jax.Array) -> tuple[Solved, Solved]:
        problems = [
            x if has else jnp.broadcast_to(x, (size, *x.shape))
            for x, has in zip(args, batched, strict=True)
        ]
        solved = lax.platform_dependent(*problems, cpu=in_turn, default=jax.vmap(solve))
        return solved, jax.tree.map(lambda _: True, solved)

    single.def_vmap(rule)
    return single


def _pack(solved: Solved) -> Assignment:
    return Assignment(
        col4row=solved.col4row,
        cost=solved.total,
        prices=solved.prices,
        gap=solved.gap,
        rounds=solved.rounds,
        status=solved.status,
    )


def _pack_exchanged(solved: Solved, num_rows: int) -> Assignment:
    """Turn the solution of the transposed problem into that of one with n > m."""
    place = solved.col4row  # row of each column
    columns = jnp.broadcast_to(jnp.arange(place.shape[-1], dtype=jnp.int32), place.shape)
    empty = jnp.full((*place.shape[:-1], num_rows), -1, jnp.int32)
    col4row = jnp.put_along_axis(empty, place, columns, axis=-1, inplace=False)
    return _pack(solved._replace(col4row=col4row, prices=-solved.row_values))


def _nothing(batch: tuple[int, ...], n: int, m: int) -> Assignment:
    zero = jnp.zeros(batch, jnp.float32)
    none = jnp.zeros(batch, jnp.int32)
    return Assignment(
        col4row=jnp.full((*batch, n), -1, jnp.int32),
        cost=zero,
        prices=jnp.zeros((*batch, m), jnp.float32),
        gap=zero,
        rounds=none,
        status=jnp.full(batch, Status.OPTIMAL_WITHIN_EPS, jnp.int32),
    )
