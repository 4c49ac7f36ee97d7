"""Cost matrices of many kinds, and the checks every solver's result must pass."""

from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from nat_jax.assign import Assignment, Status

_FEATURES = 32


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _sphere(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    rows, columns = rng.standard_normal((n, _FEATURES)), rng.standard_normal((m, _FEATURES))
    return -_unit(rows) @ _unit(columns).T


def _collapsed(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Features within 0.1 of one direction, as those of an untrained network are."""
    rows = _unit(rng.standard_normal(_FEATURES)) + 0.1 * _unit(rng.standard_normal((n, _FEATURES)))
    return -_unit(rows) @ _unit(rng.standard_normal((m, _FEATURES))).T


def _matched(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Features near their own target, as late in training."""
    columns = _unit(rng.standard_normal((max(n, m), _FEATURES)))
    rows = _unit(columns[rng.permutation(max(n, m))][:n] + 0.1 * rng.standard_normal(_FEATURES))
    return -rows @ columns[:m].T


def _forbidden(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Two of three pairs forbidden, a complete matching allowed."""
    cost = np.where(rng.random((n, m)) < 2 / 3, np.inf, rng.random((n, m)))
    diagonal = np.arange(min(n, m))
    cost[rng.permutation(n)[: len(diagonal)], rng.permutation(m)[: len(diagonal)]] = 5.0
    return cost


def _wild(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return 10.0 ** rng.uniform(-30, 30, (n, m)) * rng.choice([-1, 1], (n, m))


KINDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "uniform": lambda rng, n, m: rng.random((n, m)),
    "sphere": _sphere,
    "collapsed": _collapsed,
    "matched": _matched,
    "ties": lambda rng, n, m: rng.integers(0, 3, (n, m)),
    "tenths": lambda rng, n, m: 0.1 * rng.integers(0, 101, (n, m)),
    "constant": lambda rng, n, m: np.full((n, m), -7.25),
    "integer": lambda rng, n, m: rng.integers(-1000, 1000, (n, m)),
    "machol_wien": lambda rng, n, m: np.outer(np.arange(1, n + 1), np.arange(1, m + 1)),
    "offset": lambda rng, n, m: 1e6 + rng.random((n, m)),
    "huge": lambda rng, n, m: 1e30 * rng.standard_normal((n, m)),
    "tiny": lambda rng, n, m: 1e-30 * rng.standard_normal((n, m)),
    "wild": _wild,
    "forbidden": _forbidden,
}


def make(kind: str, n: int, m: int | None = None, seed: int = 0) -> np.ndarray:
    """Return a float32 [n, m] cost of that kind."""
    m = n if m is None else m
    return KINDS[kind](np.random.default_rng([seed, n, m]), n, m).astype(np.float32)


def assert_matching(col4row: np.ndarray, n: int, m: int) -> None:
    """Check that min(n, m) rows have each a column of their own and the others none."""
    assert col4row.shape == (n,)
    assert col4row.dtype == np.int32
    columns = col4row[col4row >= 0]
    assert len(columns) == len(set(columns.tolist())) == min(n, m)
    assert np.all((col4row >= -1) & (col4row < m))


def total(cost: np.ndarray, col4row: np.ndarray) -> float:
    """Return the float64 sum of the matched costs."""
    rows = np.flatnonzero(col4row >= 0)
    return float(cost.astype(np.float64)[rows, col4row[rows]].sum())


def optimum(cost: np.ndarray, *, maximize: bool = False) -> float:
    """Return SciPy's total."""
    rows, columns = linear_sum_assignment(cost.astype(np.float64), maximize=maximize)
    return float(cost.astype(np.float64)[rows, columns].sum())


def certified_gap(cost: np.ndarray, col4row: np.ndarray, prices: np.ndarray) -> float:
    """Work out in float64 what the prices prove about a matching that minimises."""
    cost, prices = cost.astype(np.float64), prices.astype(np.float64)
    n, m = cost.shape
    if n > m:
        row_prices = np.max(-prices - cost, axis=1)
        row_prices = np.maximum(row_prices, row_prices[col4row < 0].max())
        rows = np.flatnonzero(col4row >= 0)
        row4col = np.empty(m, np.int64)
        row4col[col4row[rows]] = rows
        return certified_gap(cost.T, row4col, row_prices)
    reduced = cost + prices
    slack = reduced[np.arange(n), col4row] - reduced.min(axis=1)
    left_out = np.setdiff1d(np.arange(m), col4row)
    return float(slack.sum() + (prices[left_out] - prices.min()).sum())


def assert_solved(cost: np.ndarray, result: Assignment, *, share: float = 1e-6) -> None:
    """Check a minimising result: matching, status, total, prices, and gap <= share * S."""
    n, m = cost.shape
    result.check()
    col4row, gap = np.asarray(result.col4row), float(result.gap)
    assert_matching(col4row, n, m)
    assert int(result.status) == Status.OPTIMAL_WITHIN_EPS
    if n == 0 or m == 0:
        assert float(result.cost) == gap == 0
        return
    finite = cost[np.isfinite(cost)].astype(np.float64)
    value, largest = total(cost, col4row), np.abs(finite).max()
    assert abs(float(result.cost) - value) <= 1e-6 * min(n, m) * largest
    proved = certified_gap(cost, col4row, np.asarray(result.prices))
    assert value - optimum(cost) <= proved + 1e-12 * min(n, m) * largest
    assert 0 <= proved <= gap + 1e-12 * min(n, m) * largest
    scale = np.ptp(finite) or largest
    assert gap <= share * min(n, m) * scale
