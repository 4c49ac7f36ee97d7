import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from problems import KINDS, assert_matching, assert_solved, certified_gap, make, optimum, total

from nat_jax import assign
from nat_jax.assign import AssignmentError, Status, _auction, _problem, _search, auction


def relative_excess(cost: np.ndarray, col4row: np.ndarray) -> float:
    """Return value - optimum in units of the sum of the optimum's absolute costs."""
    cost = cost.astype(np.float64)
    best = np.asarray(col4row)
    return (total(cost, best) - optimum(cost)) / np.abs(cost[np.arange(len(cost)), best]).sum()


@pytest.mark.parametrize("kind", ["uniform", "sphere", "collapsed", "matched"])
def test_totals_agree_with_scipy(kind: str) -> None:
    for seed in range(3):
        cost = make(kind, 256, seed=seed)
        result = auction(cost)
        assert_solved(cost, result)
        assert abs(relative_excess(cost, result.col4row)) <= 1e-6
    swapped = result.col4row.at[jnp.array([0, 1])].set(result.col4row[jnp.array([1, 0])])
    assert relative_excess(cost, swapped) > 1e-6


@pytest.mark.parametrize(
    ("dtype", "maximize"), [("bool", False), ("int8", True), ("uint32", False)]
)
def test_integers_are_exact(dtype: str, maximize: bool) -> None:
    info = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    low, high = max(info[0], -30_000), min(info[1], 30_000)
    rng = np.random.default_rng(0)
    cost = rng.integers(low, high, (16, 16), endpoint=True).astype(dtype)
    result = auction(cost, maximize=maximize)
    assert float(result.gap) == 0
    assert total(cost, np.asarray(result.col4row)) == optimum(cost, maximize=maximize)
    assert float(result.cost) == optimum(cost, maximize=maximize)


def test_integers_beyond_float32_are_certified() -> None:
    info = np.iinfo(np.int32)
    cost = np.random.default_rng(0).integers(info.min, info.max, (16, 16), dtype=np.int32)
    result = auction(cost).check()
    excess = total(cost, np.asarray(result.col4row)) - optimum(cost)
    assert 0 <= excess <= float(result.gap) <= 1e-6 * 16 * 2.0**32
    shifted = auction(cost // 2**12 + (2**30 - 1)).check()  # a large offset costs nothing
    assert float(shifted.gap) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_floats(dtype: jnp.dtype) -> None:
    cost = np.asarray(jnp.asarray(make("uniform", 16), dtype).astype(jnp.float32))
    result = auction(jnp.asarray(cost, dtype))
    assert result.prices.dtype == result.cost.dtype == jnp.float32
    assert_solved(cost, result)


def test_certificate_holds_for_any_matching_and_prices() -> None:
    """However wrong the search, the gap it reports is no smaller than the truth."""
    n, m = 16, 24
    rng = np.random.default_rng(0)
    certify = jax.jit(_certify)
    for kind in KINDS:
        cost = make(kind, n, m)
        if not np.all(np.isfinite(cost)):
            continue
        for _ in range(5):
            col4row = rng.permutation(m)[:n].astype(np.int32)
            prices = (np.ptp(cost) * rng.standard_normal(m)).astype(np.float32)
            gap = float(certify(cost, col4row, prices))
            proved = certified_gap(cost, col4row, prices)
            assert total(cost, col4row) - optimum(cost) <= proved * (1 + 1e-12) <= gap
            assert gap <= 1.001 * proved + 1e-6 * n * np.abs(cost).max()


def _certify(cost: jax.Array, col4row: jax.Array, prices: jax.Array) -> jax.Array:
    n, m = cost.shape
    problem = _problem.standardise(cost, False)
    owner = jnp.full(m, -1, jnp.int32).at[col4row].set(jnp.arange(n, dtype=jnp.int32))
    zero = jnp.int32(0)
    ended = _search.Matching(prices / problem.unit, owner, col4row, zero, jnp.bool_(False), zero)
    return _problem.certify(cost, problem, ended).gap


def test_feasibility_is_what_scipy_says() -> None:
    rng = np.random.default_rng(0)
    costs = rng.integers(0, 4, (300, 4, 5)).astype(np.float32)
    costs[rng.random(costs.shape) < 0.6] = np.inf
    result = auction(costs)
    seen = set()
    for k, cost in enumerate(costs):
        assert_matching(np.asarray(result.col4row[k]), 4, 5)
        try:
            value = optimum(cost)
        except ValueError:
            expected = Status.INFEASIBLE
        else:
            expected = Status.OPTIMAL_WITHIN_EPS
            assert float(result.cost[k]) == value
            assert float(result.gap[k]) == 0
        assert int(result.status[k]) == expected
        seen.add(expected)
    assert seen == {Status.INFEASIBLE, Status.OPTIMAL_WITHIN_EPS}


@pytest.mark.parametrize("kind", ["uniform", "constant", "machol_wien", "forbidden", "wild"])
def test_rounds_are_bounded_and_the_limit_is_kept(kind: str) -> None:
    n = 64
    cost = make(kind, n)
    full = auction(cost)
    assert 0 < int(full.rounds) <= n * (n + 1) + 4 * n
    for limit in (0, 1, int(full.rounds) // 2):
        result = auction(cost, max_rounds=limit)
        assert int(result.rounds) <= limit
        assert_matching(np.asarray(result.col4row), n, n)
        excess = total(cost, np.asarray(result.col4row)) - optimum(cost)
        assert float(result.gap) >= excess
        if kind != "constant":
            assert int(result.status) == Status.MAX_ROUNDS
            with pytest.raises(AssignmentError, match="raise max_rounds"):
                result.check()
    enough = auction(cost, max_rounds=int(full.rounds))
    np.testing.assert_array_equal(enough.col4row, full.col4row)
    assert bool(enough.converged)


def test_larger_eps_is_faster_and_within_its_bound() -> None:
    n = 64
    cost = make("uniform", n)
    exact = auction(cost)
    rough = auction(cost, eps=0.1)
    excess = total(cost, np.asarray(rough.col4row)) - optimum(cost)
    assert 1e-3 < excess <= float(rough.gap) <= n * 0.1 + 1e-4
    assert int(rough.rounds) < int(exact.rounds)
    assert bool(rough.converged)
    whole = auction(np.round(cost * 100), eps=0.9)  # less than one: nothing for whole costs
    assert float(whole.gap) == 0


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (64, 48)])
@pytest.mark.parametrize("maximize", [False, True])
def test_prices_start_the_next_problem(shape: tuple[int, int], maximize: bool) -> None:
    cost = make("collapsed", *shape)
    sign = -1 if maximize else 1
    cold = auction(sign * cost, maximize=maximize)
    warm = auction(sign * cost, maximize=maximize, prices=cold.prices)
    assert_solved(cost, dataclasses.replace(warm, cost=sign * warm.cost))
    assert int(warm.rounds) < int(cold.rounds)


@pytest.mark.parametrize("shape", [(64, 64), (48, 64), (64, 48)])
def test_misleading_prices_cost_no_rounds(shape: tuple[int, int]) -> None:
    cost = make("uniform", *shape)
    prices = np.random.default_rng(0).standard_normal(shape[1])
    result = auction(cost, prices=prices)
    assert_solved(cost, result)
    assert int(result.rounds) <= int(auction(cost).rounds)


@pytest.mark.parametrize("start", [np.nan, np.inf, -1e30, 1e30, 0.0])
def test_bad_prices_cannot_spoil_the_certificate(start: float) -> None:
    n = 64
    cost = make("uniform", n)
    prices = np.full(n, start, np.float32)
    prices[::2] = 0
    result = auction(cost, prices=prices)
    col4row = np.asarray(result.col4row)
    assert_matching(col4row, n, n)
    assert total(cost, col4row) - optimum(cost) <= float(result.gap)


def test_relabelling_rows_and_columns_changes_nothing() -> None:
    n = 64
    cost = make("uniform", n)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(n), rng.permutation(n)
    straight = np.asarray(auction(cost).col4row)
    mixed = np.asarray(auction(cost[rows][:, columns]).col4row)
    np.testing.assert_array_equal(columns[mixed], straight[rows])
    assert not np.array_equal(mixed, straight)


def test_options_are_checked() -> None:
    cost = make("uniform", 2)
    with pytest.raises(ValueError, match="not negative, got -1"):
        auction(cost, eps=-1.0)
    with pytest.raises(ValueError, match="one number"):
        auction(cost, eps=np.ones(2))
    with pytest.raises(ValueError, match="max_rounds"):
        auction(cost, max_rounds=-1)
    with pytest.raises(TypeError, match="integer"):
        auction(cost, max_rounds=1.5)
    with pytest.raises(ValueError, match=r"\(2,\), got \(3,\)"):
        auction(cost, prices=np.ones(3))
    with pytest.raises(TypeError, match="complex"):
        auction(cost, prices=np.ones(2, np.complex64))


def test_result_passes_through_jit_as_a_pytree() -> None:
    cost = make("uniform", 7)

    @jax.jit
    def solve(cost: jax.Array, eps: jax.Array) -> tuple:
        result = auction(cost, eps=eps)
        return result, result.row_ind, result.converged

    result, row_ind, converged = solve(cost, 0.0)
    assert_solved(cost, result)
    assert bool(converged)
    np.testing.assert_array_equal(row_ind, np.arange(7))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.gap = 0


def test_side_by_side_as_on_accelerators() -> None:
    """Plain vmap, which accelerators use, gives what the CPU gets one problem at a time."""
    kinds = ["uniform", "ties", "forbidden", "machol_wien"]
    costs = np.stack([make(kind, 16) for kind in kinds])
    solve = partial(_auction._solve_one, maximize=False, exchanged=False)
    together = jax.jit(jax.vmap(solve, (0, None, None)))(costs, jnp.float32(0), jnp.int32(10_000))
    apart = auction(costs)
    np.testing.assert_array_equal(together.col4row, apart.col4row)
    np.testing.assert_array_equal(together.rounds, apart.rounds)
    assert len(set(np.asarray(apart.rounds).tolist())) > 1


def test_costs_near_the_largest_float() -> None:
    cost = (make("uniform", 16) - 0.5) * np.float32(3.3e38)
    result = auction(cost).check()
    assert_matching(np.asarray(result.col4row), 16, 16)
    excess = total(cost, np.asarray(result.col4row)) - optimum(cost)
    assert 0 <= excess <= min(float(result.gap), 1e-6 * 16 * float(np.ptp(cost / 2)) * 2)


@pytest.mark.parametrize("solver", ["auction", "scipy", "hungarian"])
@pytest.mark.parametrize(("maximize", "shape"), [(False, (12, 12)), (True, (12, 15))])
def test_float64_of_the_host_is_solved_as_given(
    solver: str, maximize: bool, shape: tuple[int, int]
) -> None:
    cost = np.random.default_rng(0).random(shape) + 1e9  # float32 would hold a constant matrix
    solution = assign.solve(cost, solver=solver, maximize=maximize)
    best = cost[scipy.optimize.linear_sum_assignment(cost, maximize=maximize)].sum()
    reached = cost[tuple(map(np.asarray, solution))].sum()
    assert abs(best - reached) <= float(solution.gap) < 1e-4
    narrowed = assign.solve(jnp.asarray(cost, jnp.float32), solver=solver, maximize=maximize)
    reached = cost[tuple(map(np.asarray, narrowed))].sum()
    assert abs(best - reached) > 1e-2


def test_a_float64_constant_inside_jit() -> None:
    cost = np.random.default_rng(0).random((12, 12))
    solution = jax.jit(lambda: assign.auction(cost))()
    assert solution.cost.dtype == jnp.float32
    best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
    np.testing.assert_allclose(solution.cost, best, rtol=1e-6)


def test_words_are_no_costs() -> None:
    with pytest.raises(TypeError, match="cost must hold real numbers, got dtype <U1"):
        assign.auction(np.array([["a", "b"], ["c", "d"]]))
