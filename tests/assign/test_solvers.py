import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import KINDS, assert_matching, assert_solved, make, optimum, total

from nat_jax import assign

# Shapes are few because each compiles, for optax's solver a second and more.
SHAPES = {
    "auction": [(0, 0), (0, 3), (3, 0), (1, 1), (2, 2), (3, 7), (7, 3), (7, 7), (16, 64), (64, 64)],
    "scipy": [(0, 3), (3, 7), (7, 3), (7, 7), (64, 64)],
    "hungarian": [(0, 3), (3, 7), (7, 3), (7, 7)],
}
CASES = [(solver, shape) for solver, shapes in SHAPES.items() for shape in shapes]
SMALL = [(solver, shape) for solver, shape in CASES if shape in ((3, 7), (7, 3), (7, 7))]


@pytest.mark.parametrize(("solver", "shape"), CASES)
def test_every_solver_on_every_kind(solver: str, shape: tuple[int, int]) -> None:
    for kind in KINDS:
        cost = make(kind, *shape)
        # The dual values of a finished matching add up along paths, so they are a little coarser.
        share = 1e-6 if solver == "auction" else 3e-6
        assert_solved(cost, assign.solve(cost, solver=solver), share=share)


def _swap_two(r: assign.Assignment, cost: np.ndarray) -> assign.Assignment:
    swapped = r.col4row.at[jnp.array([0, 1])].set(r.col4row[jnp.array([1, 0])])
    return dataclasses.replace(r, col4row=swapped, cost=jnp.float32(total(cost, swapped)))


BREAKAGES: dict[str, Callable[[assign.Assignment, np.ndarray], assign.Assignment]] = {
    "suboptimal": _swap_two,
    "column twice": lambda r, _: dataclasses.replace(r, col4row=r.col4row.at[0].set(r.col4row[1])),
    "row left out": lambda r, _: dataclasses.replace(r, col4row=r.col4row.at[0].set(-1)),
    "wrong total": lambda r, _: dataclasses.replace(r, cost=r.cost + 0.01),
    "wrong prices": lambda r, _: dataclasses.replace(r, prices=-r.prices),
    "loose gap": lambda r, _: dataclasses.replace(r, gap=r.gap + 0.01),
    "negative gap": lambda r, _: dataclasses.replace(r, gap=-r.gap),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_checks_notice(breakage: str) -> None:
    cost = make("uniform", 16)
    result = assign.auction(cost)
    assert_solved(cost, result)
    with pytest.raises(AssertionError):
        assert_solved(cost, BREAKAGES[breakage](result, cost))


def test_pairs_unpack_as_scipys() -> None:
    cost = make("uniform", 7, 3)
    for solver in assign.SOLVERS:
        row_ind, col_ind = assign.solve(cost, solver=solver)
        assert row_ind.shape == col_ind.shape == (3,)
        assert np.all(np.diff(row_ind) > 0)
        assert np.isclose(cost[row_ind, col_ind].sum(), optimum(cost))


@pytest.mark.parametrize("solver", assign.SOLVERS)
def test_batch_jit_vmap_and_scan_agree(solver: str) -> None:
    costs = np.stack([make("sphere", 7, seed=s) for s in range(4)]).reshape(2, 2, 7, 7)

    def solve(cost: jax.Array) -> jax.Array:
        return assign.solve(cost, solver=solver).col4row

    def step(carry: None, cost: jax.Array) -> tuple[None, jax.Array]:
        return carry, solve(cost)

    expected = np.stack([[solve(c) for c in row] for row in costs])
    assert not np.array_equal(expected[0], expected[1])
    np.testing.assert_array_equal(solve(costs), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(solve, 1))(costs), expected.swapaxes(0, 1))
    if solver != "hungarian":  # to save compilation
        np.testing.assert_array_equal(jax.lax.scan(step, None, jnp.asarray(costs))[1], expected)


@pytest.mark.parametrize(("solver", "shape"), SMALL)
def test_maximize_is_minimising_the_negative(solver: str, shape: tuple[int, int]) -> None:
    cost = make("uniform", *shape)
    most = assign.solve(cost, solver=solver, maximize=True)
    least = assign.solve(-cost, solver=solver)
    np.testing.assert_array_equal(most.col4row, least.col4row)
    np.testing.assert_array_equal(most.prices, least.prices)
    assert float(most.gap) == float(least.gap) >= 0
    assert np.isclose(float(most.cost), optimum(cost, maximize=True))
    assert float(most.cost) > optimum(cost) + 0.1


@pytest.mark.parametrize("solver", assign.SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nonfinite_costs(solver: str, bad: float) -> None:
    cost = make("uniform", 7)
    cost[2, 3] = bad
    for problem in (cost, np.full_like(cost, bad)):
        result = assign.solve(problem, solver=solver)
        assert int(result.status) == assign.Status.NONFINITE
        assert not bool(result.converged)
        assert float(result.gap) == np.inf
        assert_matching(np.asarray(result.col4row), 7, 7)
        with pytest.raises(assign.AssignmentError, match="NONFINITE"):
            result.check()


@pytest.mark.parametrize(("solver", "shape"), SMALL)
def test_infeasible_costs(solver: str, shape: tuple[int, int]) -> None:
    n, m = shape
    cost = make("uniform", n, m)
    if n <= m:
        cost[:2, 1:] = np.inf  # two rows want one column
    else:
        cost[1:, :2] = np.inf
    for problem in (cost, np.full_like(cost, np.inf)):
        result = assign.solve(problem, solver=solver)
        assert int(result.status) == assign.Status.INFEASIBLE
        assert float(result.gap) == np.inf
        assert_matching(np.asarray(result.col4row), n, m)
        with pytest.raises(assign.AssignmentError, match="INFEASIBLE"):
            result.check()


def test_one_bad_problem_leaves_the_others_alone() -> None:
    costs = np.stack([make("uniform", 7, seed=s) for s in range(3)])
    costs[1, 0, 0] = np.nan
    result = assign.auction(costs)
    assert np.asarray(result.converged).tolist() == [True, False, True]
    for k in (0, 2):
        assert_solved(costs[k], jax.tree.map(lambda x, k=k: x[k], result))
    with pytest.raises(assign.AssignmentError, match=r"1 of 3 .*problem \(1,\): NONFINITE"):
        result.check()


def test_solve_names_what_it_knows() -> None:
    cost = make("uniform", 2)
    with pytest.raises(ValueError, match=r"'munkres'.*auction, hungarian, scipy"):
        assign.solve(cost, solver="munkres")
    with pytest.raises(TypeError, match=r"'epsilon'.*maximize, eps, prices, max_rounds"):
        assign.solve(cost, epsilon=1)
    with pytest.raises(TypeError, match=r"'scipy' has no option 'eps'.*maximize"):
        assign.solve(cost, solver="scipy", eps=1)


@pytest.mark.parametrize("solver", assign.SOLVERS)
def test_misuse_is_one_clear_message(solver: str) -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., n, m\], got \(4,\)"):
        assign.solve(np.zeros(4), solver=solver)
    with pytest.raises(TypeError, match="complex64"):
        assign.solve(np.zeros((2, 2), np.complex64), solver=solver)
    with pytest.raises(ValueError, match="int32"):
        assign.solve(np.full((2, 2), 2**40), solver=solver)


@pytest.mark.parametrize("solver", assign.SOLVERS)
def test_gradient_is_stopped(solver: str) -> None:
    def loss(cost: jax.Array) -> jax.Array:
        result = assign.solve(cost, solver=solver)
        return result.cost + result.gap + jnp.sum(jnp.square(cost))

    cost = jnp.asarray(make("uniform", 7))
    np.testing.assert_allclose(jax.grad(loss)(cost), 2 * cost)


@pytest.mark.parametrize("solver", ["auction", "scipy"])
def test_solving_under_strict_settings(solver: str) -> None:
    cost = make("integer", 5)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.enable_x64(True),
    ):
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones((2, 2)) + jnp.ones(2)
        assert_solved(cost, assign.solve(cost.astype(np.float64), solver=solver))
