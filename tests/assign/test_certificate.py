"""Attacks on `gap`: it must never be smaller than the distance from the optimum, whatever is given.

Each attack climbs: of many problems and first prices side by side, those changes are kept that
bring the exact distance closer to the gap. Distances are worked out in integers, without rounding.
"""

import itertools
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import pytest
from problems import FINITE, KINDS, exact, make

from nat_jax.assign import Assignment, auction, hungarian, scipy

# As many as a stack of all kinds has, so that programs are shared with the property suite.
POPULATION = len(KINDS)
INTEGERS = len(FINITE)
GENERATIONS = 15
Attacked = Callable[[np.ndarray, np.ndarray], Assignment]

_exact = np.frompyfunc(exact, 1, 1)


def distances(costs: np.ndarray, col4row: np.ndarray, *, maximize: bool) -> np.ndarray:
    """Return value - optimum of each problem in units of 2**-1074, from all its matchings."""
    entries = _exact(costs.astype(np.float64)) * (-1 if maximize else 1)
    if costs.shape[1] > costs.shape[2]:
        entries = entries.swapaxes(1, 2)
        col4row = np.argsort(np.where(col4row < 0, costs.shape[2], col4row), axis=1)
        col4row = col4row[:, : costs.shape[2]]
    _, n, m = entries.shape
    every = np.array(list(itertools.permutations(range(m), n)))
    best = entries[:, np.arange(n), every].sum(axis=-1).min(axis=1)
    reached = np.take_along_axis(entries, col4row[:, :, None].astype(np.int64), axis=2)
    return reached[:, :, 0].sum(axis=1) - best


def score(distance: int, gap: float, largest: float) -> float:
    """Return distance / gap; above 1 the certificate is wrong.

    Up to 1, matchings that are far off do not count: beside their slack, rounding is nothing.
    """
    if distance == 0 or gap == np.inf:
        return 0.0
    if exact(gap) == 0:
        return np.inf
    ratio = distance * 10**9 // exact(gap) / 1e9
    return ratio if ratio > 1 or distance <= exact(largest) >> 16 else 0.0


def change(rng: np.random.Generator, cost: np.ndarray, prices: np.ndarray) -> None:
    """Change a cost or a price in place: by an ulp, a power of two, another cost, an offset."""
    n, m = cost.shape
    i, a, j, b = rng.integers(n), rng.integers(n), rng.integers(m), rng.integers(m)
    size = np.abs(cost).max()
    match rng.integers(12):
        case 0:
            cost[i, j] = cost[a, b]
        case 1:
            cost[i, j] *= 2.0 ** rng.integers(-3, 4)
        case 2:
            cost[i, j] *= 1 + rng.choice([-1, 1]) * 2.0**-23
        case 3:
            cost[i, j] += rng.choice([-1, 1])
        case 4:
            cost[i, j] = cost[i, b] + cost[a, j] - cost[a, b]  # a tie
        case 5:
            cost[i] += rng.standard_normal() * size
        case 6:
            cost[:, j] -= rng.standard_normal() * size
        case 7:
            cost[i, j] = rng.choice([0, 1e-38, 1e-44, 1e-30, 1e30, 3e38, 2**24 + 1])
        case 8:
            prices[j] = prices[b] + cost[i, b] - cost[i, j]  # row i does not mind
        case 9:
            prices[j] *= 1 + rng.choice([-1, 1]) * 2.0**-23
        case 10:
            prices += rng.standard_normal() * size * 2.0 ** rng.integers(-2, 6)
        case _:
            prices[j] = rng.choice([0, size, -size, 1e30, -3e38, np.inf, np.nan])


def narrowed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bring float64 values to a type, within its range and without infinities."""
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.clip(np.nan_to_num(values), info.min, info.max).astype(dtype)
    return np.nan_to_num(values, posinf=3e38, neginf=-3e38).clip(-3e38, 3e38).astype(dtype)


def climb(
    solve: Attacked,
    shape: tuple[int, int],
    dtype: str = "float32",
    *,
    maximize: bool = False,
    generations: int = GENERATIONS,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the highest score found, and the cost and prices that lead to it."""
    rng = np.random.default_rng(0)
    number = POPULATION if np.dtype(dtype).kind == "f" else INTEGERS
    starts = [make(FINITE[k % len(FINITE)], *shape, seed=k, dtype=dtype) for k in range(number)]
    costs = np.stack(starts).astype(np.float64)
    prices = -costs.mean(axis=1)
    scores = np.full(number, -1.0)
    with np.errstate(all="ignore"):
        for generation in range(generations):
            next_costs, next_prices = costs.copy(), prices.copy()
            if generation:
                for cost, price in zip(next_costs, next_prices, strict=True):
                    for _ in range(rng.integers(1, 4)):
                        change(rng, cost, price)
            given = narrowed(next_costs, np.dtype(dtype))
            next_costs = given.astype(np.float64)
            result = jax.device_get(solve(given, next_prices.astype(np.float32)))
            apart = distances(given, result.col4row, maximize=maximize)
            largest = np.abs(next_costs).max(axis=(1, 2))
            reached = np.array(list(map(score, apart, map(float, result.gap), largest)))
            better = reached >= scores
            costs[better], prices[better] = next_costs[better], next_prices[better]
            scores[better] = reached[better]
            if scores.max() > 1:
                break
    worst = int(np.argmax(scores))
    return float(scores[worst]), costs[worst], prices[worst]


def cold(costs: np.ndarray, prices: np.ndarray, solve: Callable, **options) -> Assignment:
    return solve(costs, **options)


def warm(costs: np.ndarray, prices: np.ndarray, **options) -> Assignment:
    return auction(costs, prices=prices, **options)


ATTACKS = {
    # Without a round, any prices and any matching are judged as they are.
    "any prices, any matching": (partial(warm, max_rounds=0), (3, 3), "float32", False),
    "any prices": (warm, (3, 3), "float32", False),
    "any prices, few rounds": (partial(warm, max_rounds=2), (3, 3), "float32", False),
    "any prices, huge eps": (partial(warm, eps=1e38), (3, 3), "float32", False),
    "integers": (partial(cold, solve=auction), (3, 3), "int32", False),
    "wide, any prices": (warm, (3, 7), "float32", False),
    "wide, any prices, no rounds": (partial(warm, max_rounds=0), (3, 7), "float32", False),
    "tall, any prices": (partial(warm, max_rounds=1), (7, 3), "float32", False),
}
FURTHER = {
    "any prices, small eps": (partial(warm, eps=1e-3), (3, 3), "float32", False),
    "any prices, maximize": (partial(warm, max_rounds=2, maximize=True), (3, 3), "float32", True),
    "float64": (partial(cold, solve=auction), (3, 3), "float64", False),
    "wide": (partial(cold, solve=auction), (3, 7), "float32", False),
    "wide, no rounds": (partial(cold, solve=auction, max_rounds=0), (3, 7), "float32", False),
    "tall": (partial(cold, solve=auction), (7, 3), "float32", False),
    "hungarian": (partial(cold, solve=hungarian), (3, 7), "float32", False),
    "scipy": (partial(cold, solve=scipy), (3, 3), "float32", False),
}


@pytest.mark.parametrize(
    "attack", [*ATTACKS, *(pytest.param(a, marks=pytest.mark.slow) for a in FURTHER)]
)
def test_no_attack_succeeds(attack: str) -> None:
    solve, shape, dtype, maximize = (ATTACKS | FURTHER)[attack]
    found, cost, prices = climb(solve, shape, dtype, maximize=maximize)
    assert found <= 1, f"cost={cost.tolist()}, prices={prices.tolist()}"
