"""What only the auction has: eps, prices and max_rounds."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    assert_solved,
    exact,
    faults,
    is_matching,
    make,
    optimum,
    total,
)

from nat_jax.assign import AssignmentError, Status, _problem, auction

N = 64


@pytest.mark.parametrize("kind", ["uniform", "constant", "machol_wien", "forbidden", "wild"])
def test_rounds_are_bounded_and_the_limit_is_kept(kind: str) -> None:
    cost = make(kind, N)
    full = jax.device_get(auction(cost))
    assert faults(cost, full) == []
    for limit in (0, 1, int(full.rounds) // 2):
        result = jax.device_get(auction(cost, max_rounds=limit))
        assert faults(cost, result, max_rounds=limit) == []
        if kind != "constant":
            assert int(result.status) == Status.MAX_ROUNDS
            with pytest.raises(AssignmentError, match="raise max_rounds"):
                result.check()
    enough = auction(cost, max_rounds=int(full.rounds))
    np.testing.assert_array_equal(enough.col4row, full.col4row)
    assert bool(enough.converged)
    ignored = dataclasses.replace(full, rounds=np.int32(5))
    assert "rounds" in [fault.check for fault in faults(cost, ignored, max_rounds=4)]


def test_larger_eps_is_faster_and_within_its_bound() -> None:
    cost = make("uniform", N)
    fine = auction(cost)
    rough = jax.device_get(auction(cost, eps=0.1))
    assert faults(cost, rough, eps=0.1) == []
    assert "accuracy" in [fault.check for fault in faults(cost, rough)]
    assert total(cost, rough.col4row) - optimum(cost) > 1e-3
    assert int(rough.rounds) < int(fine.rounds)
    whole = auction(np.round(cost * 100), eps=0.9)  # less than one: nothing for whole costs
    assert float(whole.gap) == 0


# Further shapes and senses would only compile more.
WARM = [((64, 64), False), ((64, 48), True)]


@pytest.mark.parametrize(("shape", "maximize"), WARM)
def test_prices_start_the_next_problem(shape: tuple[int, int], maximize: bool) -> None:
    cost = make("collapsed", *shape) * (-1 if maximize else 1)
    cold = auction(cost, maximize=maximize)
    warm = jax.device_get(auction(cost, maximize=maximize, prices=cold.prices).check())
    assert faults(cost, warm, maximize=maximize, warm=True) == []
    # Of rectangles the prices may be those that ended with other columns left out.
    more = 0 if shape[0] == shape[1] else max(shape)
    assert int(warm.rounds) < int(cold.rounds) + more


@pytest.mark.parametrize(("shape", "maximize"), WARM)
def test_misleading_prices_cost_no_rounds(shape: tuple[int, int], maximize: bool) -> None:
    cost = make("uniform", *shape)
    prices = np.random.default_rng(0).standard_normal(shape[1])
    result = jax.device_get(auction(cost, maximize=maximize, prices=prices).check())
    assert faults(cost, result, maximize=maximize) == []
    assert int(result.rounds) <= int(auction(cost, maximize=maximize).rounds)


@pytest.mark.parametrize("kind", ["uniform", "integer"])
@pytest.mark.parametrize("start", [np.nan, np.inf, -1e30, 1e30, 1e9, -1e4, 0.0])
def test_no_prices_spoil_the_result(start: float, kind: str) -> None:
    cost = make(kind, N)
    prices = np.full(N, start, np.float32)
    prices[::2] = 0
    result = jax.device_get(auction(cost, prices=prices).check())
    assert faults(cost, result, warm=True) == []


def test_options_are_checked() -> None:
    cost = make("uniform", 2)
    with pytest.raises(ValueError, match="not negative, got -1"):
        auction(cost, eps=-1.0)
    with pytest.raises(ValueError, match="not negative, got nan"):
        jax.jit(partial(auction, eps=np.nan))(cost)
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


def test_integers_of_a_large_offset_are_exact() -> None:
    cost = make("integer", N).astype(np.int32) + (2**31 - 2001)
    result = jax.device_get(auction(cost).check())
    assert faults(cost, result) == []
    assert float(result.gap) == 0
    rows = np.arange(N)
    optimal = round(optimum(cost))
    assert exact(cost.astype(np.int64)[rows, result.col4row].sum()) == exact(optimal)


def test_a_float64_constant_inside_jit() -> None:
    cost = np.random.default_rng(0).random((7, 7)) + 1e9
    if _problem._X64_ENDS_WITH_TRACING:
        with pytest.raises(TypeError, match="constant inside jit before jax 0.8"):
            jax.jit(lambda: auction(cost))()
        return
    solution = jax.device_get(jax.jit(lambda: auction(cost))())
    assert is_matching(solution.col4row, 7, 7)
    assert faults(cost, solution) == []


def test_a_constant_in_the_prices_means_nothing() -> None:
    cost = make("uniform", N)
    prices = np.asarray(auction(cost).prices)
    start = jax.device_get(auction(cost, prices=prices))
    for constant in (1.0, 100.0, 1e4, -1e6):
        moved = jax.device_get(auction(cost, prices=prices + np.float32(constant)).check())
        assert faults(cost, moved, warm=True) == []
        assert moved.gap <= 2 * max(start.gap, auction(cost).gap)


def test_the_value_has_the_matching_as_its_gradient() -> None:
    """The envelope theorem; the derivative of what an `eps` is made from does not count."""

    @jax.jit
    def value(cost: jax.Array) -> jax.Array:
        row_ind, col_ind = auction(cost, eps=1e-6 * jnp.max(cost))
        return cost[row_ind, col_ind].sum()

    cost = jnp.asarray(make("uniform", 3, 7))
    gradient = jax.jit(jax.grad(value))(cost)
    col4row = np.asarray(auction(cost).col4row)
    np.testing.assert_array_equal(gradient, np.eye(7)[col4row])
    step = 2.0**-10
    wrong = np.eye(7)[np.roll(col4row, 1)]
    slopes = np.empty((3, 7))
    for i, j in np.ndindex(3, 7):
        above, below = (value(cost.at[i, j].add(h)) for h in (step, -step))
        slopes[i, j] = (above - below) / (2 * step)
    np.testing.assert_allclose(slopes, gradient, atol=1e-3)
    assert np.abs(slopes - wrong).max() > 0.9
