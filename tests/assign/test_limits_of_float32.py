"""Problems at the ends of what float32 holds, each of which misled some search or certificate."""

from typing import Any

import jax
import numpy as np
import pytest
from draws import Draw, faults_of
from problems import faults, is_matching, make

from nat_jax.assign import Status, auction
from nat_jax.assign._problem import standardise

_T = 2.0**-126  # the smallest normal number
_CHEAP = np.where(np.eye(3, 7) > 0, 0.0, 1.0)

# Cost and first prices, of the shapes that hypothesis draws too: they compile once.
KNOWN: dict[str, tuple[Any, Any]] = {
    "prices that differ by a subnormal number": (_CHEAP, [0, 0, 0, 0, 1.5 * _T, _T, _T]),
    "a negative one": (_CHEAP, [-1.5 * _T, -_T, -_T, -_T, -_T, 0, 0]),
    "costs beside which the others vanish": (
        [
            [1, 2.0**24 - 1, 3e38, 2.0**24 - 1, 2.0**24 - 1, 0, 3e38],
            [0, 1, 0, 1, -4e16, 1, 3e38],
            [2.0**24 - 1, 2.0**24 - 1, 2.0**24 - 1, 3e38, 1, 3e38, 3e38],
        ],
        [1, 1e-38, 1, np.inf, 1, 2, -3],
    ),
    "quotients that underflow": (
        [[1e30, 3e-30, 1e-30], [2e-30, 1e30, 2e-30], [1e-30, 1e30, 2e-30]],
        0,
    ),
    "subnormal costs": (1e-40 * make("uniform", 3, 3), 0),
    "sums that overflow": ([[3.3e38, -3.3e38, 0], [3.2e38, -3.3e38, 0], [0, 0, 0]], 0),
    "prices that swallow the costs": (_CHEAP / 2 - 0.75 * (np.arange(7) > 3), [0] * 4 + [1e9] * 3),
    "prices at the end": (make("uniform", 3, 7), [-3e38, 3e38, 0, 0, 1e30, 0, 0]),
    "a price that rises for ever": (np.diag([-3.0, -3, -3]) + 1, [0, -1e9, 0]),
}


@pytest.mark.parametrize("known", KNOWN)
def test_the_search_ends_and_the_certificate_holds(known: str) -> None:
    cost, prices = (np.asarray(x, np.float32) for x in KNOWN[known])
    prices = np.broadcast_to(prices, cost.shape[1:])
    for eps in (0.0, 0.01, 3e38):
        for limit in (None, 0, 1, 3):
            options = {"eps": eps, "max_rounds": limit, "prices": prices}
            assert faults_of(Draw(cost, "auction", options)) == [], options


@pytest.mark.parametrize("n", [64, 257])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_no_bad_cost_is_passed_over(n: int, bad: float) -> None:
    """Whatever lane of a vectorised minimum it comes in; every solver starts with this."""
    sees = jax.jit(lambda cost: standardise(cost, False).nonfinite)
    cost = make("uniform", n)
    assert not sees(cost)
    assert sees(np.full_like(cost, bad))
    for place in (0, n * n - 1, *np.random.default_rng(0).integers(n * n, size=20)):
        spoilt = cost.copy()
        spoilt.flat[place] = bad
        assert sees(spoilt), place


@pytest.mark.parametrize("beyond", [-1, 0, 1, 2])
def test_integers_around_the_largest_exact_span(beyond: int) -> None:
    """Integers up to 2**24 are float32 numbers; of two more, one is not."""
    span = 2**24 + beyond
    cost = np.random.default_rng(0).choice([0, 1, span - 1, span], (3, 3)).astype(np.int32)
    cost[0, :2] = 0, span
    result = jax.device_get(auction(cost))
    assert faults(cost, result) == []


@pytest.mark.parametrize("beyond", [1e300, -1e300])
def test_float64_beyond_float32_is_refused(beyond: float) -> None:
    cost = make("uniform", 3, dtype="float64")
    cost[0, 1] = beyond
    result = jax.device_get(auction(cost))
    assert is_matching(result.col4row, 3, 3)
    assert int(result.status) == Status.NONFINITE
    assert float(result.gap) == np.inf
