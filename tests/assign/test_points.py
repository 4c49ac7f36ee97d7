"""Matching points: always a matching, never worse than its start, and the gap is a bound."""

from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from nat_jax.assign import PointMatching, _points, auction, match_points

N, D = 61, 4
METRICS = ("cosine", "sqeuclidean")
ROUNDING = 1e-6


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let N points be many: in parts for the bids, and in blocks."""
    monkeypatch.setattr(_points, "_WIDE", 40)
    monkeypatch.setattr(_points, "_BLOCK", 16)


def draw(n: int = N, m: int = N, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw points near one direction and points around the origin."""
    random = np.random.default_rng(seed)
    return 3 + random.normal(size=(n, D)), random.normal(size=(m, D))


def best(costs: np.ndarray) -> float:
    return costs[linear_sum_assignment(costs)].mean()


def assert_matching(result: PointMatching, costs: np.ndarray) -> None:
    rows, columns = result
    assert rows.tolist() == list(range(len(costs)))
    assert len({*columns.tolist()}) == len(costs)
    assert result.cost == pytest.approx(costs[rows, columns].mean())


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("metric", METRICS)
def test_every_budget_gives_a_matching_and_none_is_worse(metric: str) -> None:
    x, y = draw()
    costs = cdist(x, y, metric)
    start = np.random.default_rng(1).permutation(N)
    results = [match_points(x, y, metric=metric, start=start, budget=k) for k in (0, 1, 2, 3, 9)]
    for result in results:
        assert_matching(result, costs)
    assert np.array_equal(results[0].col4row, start)
    values = [result.cost for result in results]
    assert all(after <= before + ROUNDING for before, after in pairwise(values))
    random = costs.mean()
    assert random - values[-1] > 0.98 * (random - best(costs))


@pytest.mark.usefixtures("small_parts")
def test_the_best_matching_stays() -> None:
    x, y = draw()
    costs = cdist(x, y, "cosine")
    best = linear_sum_assignment(costs)[1]
    kept = match_points(x, y, start=best, budget=1)
    assert kept.cost <= costs[np.arange(N), best].mean() + 1e-12
    worse = best[[1, 0, *range(2, N)]]
    assert match_points(x, y, start=worse, budget=0).cost > kept.cost


@pytest.mark.parametrize("shape", [(16, 16), (9, 20)])
@pytest.mark.parametrize("metric", METRICS)
def test_few_points_are_matched_exactly(metric: str, shape: tuple[int, int]) -> None:
    x, y = draw(*shape)
    costs = cdist(x, y, metric)
    result = match_points(x, y, metric=metric, budget=1, certify=True)
    assert_matching(result, costs)
    assert result.cost == pytest.approx(best(costs), abs=ROUNDING)
    assert np.array_equal(result.col4row, auction(costs).col4row)
    assert result.gap is not None and 0 <= result.gap < 1e-4


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("m", "wide"), [(N, 40), (N, 100), (N + 6, 100)])
@pytest.mark.parametrize("metric", METRICS)
def test_the_gap_is_a_bound(
    metric: str, m: int, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_points, "_WIDE", wide)
    x, y = draw(N, m)
    costs = cdist(x, y, metric)
    results = [match_points(x, y, metric=metric, budget=k, certify=True) for k in (0, 1, 3)]
    for result in results:
        assert_matching(result, costs)
        assert result.gap is not None and result.gap >= result.cost - best(costs)
        # The prices prove it in float64, without this library.
        prices = np.asarray(result.prices, np.float64)
        at_least = (costs + prices).min(axis=1).sum() - np.sort(prices)[m - N :].sum()
        assert result.gap == pytest.approx(result.cost - at_least / N, abs=1e-4)
    if wide > m:  # all rows bid for all columns
        assert float(results[-1].gap or 0) < 0.01 * (costs.mean() - best(costs))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("m", "metric"), [(N, "cosine"), (N + 6, "sqeuclidean")])
def test_prices_of_nearly_the_same_points_save_a_pass(
    m: int, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_points, "_WIDE", 100)
    x, y = draw(N, m)
    before = match_points(x, y, metric=metric)
    x += 0.01 * draw(seed=2)[1]
    options: dict[str, Any] = {"metric": metric, "budget": 1, "certify": True}
    cold = match_points(x, y, **options)
    warm = match_points(x, y, start=before.col4row, prices=before.prices, **options)
    misled = match_points(x, y, prices=np.arange(m), **options)
    costs = cdist(x, y, metric)
    for result in (cold, warm, misled):
        assert_matching(result, costs)
        assert result.gap is not None and result.gap >= result.cost - best(costs)
    assert warm.gap is not None and cold.gap is not None and warm.gap < cold.gap / 2


@pytest.mark.usefixtures("small_parts")
def test_a_gap_that_is_no_bound_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that does not look at all columns does not find how much it could save."""
    x, y = draw()
    values = _points._values

    def of_some(x: Any, y: Any, prices: Any, col4row: Any) -> Any:
        held, _ = values(x, y, prices, col4row)
        return held, values(x, y, prices + 1e3 * (np.arange(N) > 2), col4row)[1]

    monkeypatch.setattr(_points, "_values", of_some)
    result = match_points(x, y, budget=0, certify=True)
    assert result.gap is not None and result.gap < result.cost - best(cdist(x, y, "cosine"))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("kind", ["equal", "two", "one-hot"])
def test_points_that_repeat(kind: str) -> None:
    x, y = draw()
    if kind == "equal":
        x = np.ones_like(x)
    elif kind == "two":
        x = np.where(np.arange(N)[:, None] % 2, 1.0, -1.0) * np.ones(D)
    else:
        y = np.eye(D)[np.arange(N) % D]
    costs = cdist(x, y, "sqeuclidean")
    result = match_points(x, y, metric="sqeuclidean", certify=True)
    assert_matching(result, costs)
    assert result.cost - best(costs) <= 0.02 * (costs.mean() - best(costs)) + 1e-9


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(("scale", "offset"), [(1e-30, 0), (1e15, 0.0), (1, 1e8)])
def test_the_unit_and_the_origin_do_not_matter(scale: float, offset: float) -> None:
    x, y = draw()
    here, there = (
        match_points(*points, metric="sqeuclidean", budget=1, certify=True)
        for points in ((x, y), (x * scale + offset, y * scale + offset))
    )
    assert np.array_equal(here.col4row, there.col4row)
    assert here.gap is not None and there.gap is not None
    found, expected = (there.cost, there.gap), (here.cost * scale**2, here.gap * scale**2)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def strictly() -> ExitStack:
    """Enter JAX's strict settings and 64-bit mode."""
    stack = ExitStack()
    for context in (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.transfer_guard("disallow"),
        jax.debug_nans(True),
    ):
        stack.enter_context(context)
    return stack


@pytest.mark.usefixtures("small_parts")
def test_strict_settings_change_nothing() -> None:
    x, y = draw()
    matrix = jnp.ones((2, 3))
    vector = matrix[0]
    expected = match_points(x, y, budget=1, certify=True)
    with strictly():
        found = match_points(x, y, budget=1, certify=True)
        with pytest.raises(ValueError, match="rank_promotion"):  # they are on
            matrix + vector
    assert (found.cost, found.gap) == (expected.cost, expected.gap)
    for one, other in ((found.col4row, expected.col4row), (found.prices, expected.prices)):
        assert one.dtype == other.dtype and np.array_equal(one, other)


@pytest.mark.usefixtures("small_parts")
def test_the_seed_decides() -> None:
    x, y = draw()
    first, again, other = (match_points(x, y, budget=1, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.col4row, again.col4row)
    assert not np.array_equal(first.col4row, other.col4row)


def test_no_points() -> None:
    result = match_points(np.zeros((0, 3)), np.ones((2, 3)), certify=True)
    assert result.col4row.shape == (0,) and result.cost == result.gap == 0


X, Y = (np.ones((3, 2)), np.ones((4, 2)))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[0], Y), {}, r"x must have shape \[points, D\], got \(2,\)"),
        ((X, Y[:, :0]), {}, r"y must have shape \[points, D\], got \(4, 0\)"),
        ((X, np.ones((4, 3))), {}, r"one dimension, got shapes \(3, 2\), \(4, 3\)"),
        ((Y, X), {}, "more points than y, got 4 and 3; exchange them"),
        ((X, Y * [[1], [np.nan], [1], [1]]), {}, r"y\[1\] holds NaN or infinity"),
        ((X * [[1], [1], [0]], Y), {}, r"x\[2\] is zero and has no direction"),
        ((X, Y), {"metric": "euclidean"}, "'euclidean'; known metrics: cosine, sqeuclidean"),
        ((X, Y), {"budget": -1}, "budget must not be negative, got -1"),
        ((X, Y), {"seed": -1}, "seed must not be negative, got -1"),
        ((X, Y), {"devices": []}, "devices must be one or more, each once"),
        ((X, Y * 1e20), {"metric": "sqeuclidean"}, r"y holds numbers beyond 3.3e\+18"),
        (
            (X, Y),
            {"prices": np.zeros(3)},
            r"prices must be finite and have shape \(4,\), got \(3,\)",
        ),
        ((X, Y), {"prices": [0, 1, np.nan, 0]}, "prices must be finite"),
        ((X, Y), {"start": [0, 1]}, r"shape \(3,\), got \(2,\)"),
        ((X, Y), {"start": [0, 1, 4]}, "0 to 3, got 0 to 4"),
        ((X, Y), {"start": [0, 2, 2]}, "point 2 of y 2 times"),
    ],
)
def test_wrong_values_are_one_clear_message(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_points(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X + 1j, Y), {}, "x must hold real numbers, got dtype complex128"),
        ((X, [["a", "b"]]), {}, "y must hold real numbers, got dtype <U1"),
        ((X, Y), {"start": [0.0, 1.0, 2.0]}, "start must hold integers, got dtype float64"),
        ((X, Y), {"budget": 0.5}, "number of passes, got 0.5"),
        ((X, Y), {"seed": None}, "seed must be an integer, .* got None"),
        ((X, Y), {"devices": "cpu"}, "list of this process's devices, got 'cpu'"),
    ],
)
def test_wrong_types_are_one_clear_message(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        match_points(*arguments, **options)


def test_under_jit_it_is_refused() -> None:
    with pytest.raises(TypeError, match="outside jit, got a traced x"):
        jax.jit(lambda x: match_points(x, Y).col4row)(X)
    with pytest.raises(TypeError, match="outside jit, got a traced start"):
        jax.jit(lambda start: match_points(X, Y, start=start).col4row)(np.arange(3))
