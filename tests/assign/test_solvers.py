"""What every solver takes, returns and refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import assert_solved, make, stack

from nat_jax import assign
from nat_jax.assign._problem import enable_x64


def test_one_bad_problem_leaves_the_others_alone() -> None:
    kinds, costs = stack(7, 7)
    result = assign.auction(costs)
    bad = {"infeasible", "nan", "minus_inf"}
    assert np.asarray(result.converged).tolist() == [kind not in bad for kind in kinds]
    first = kinds.index("infeasible")
    message = rf"3 of {len(kinds)} .*problem \({first},\): INFEASIBLE: .*allow more pairs"
    with pytest.raises(assign.AssignmentError, match=message):
        result.check()
    alone = jax.tree.map(lambda leaf: leaf[kinds.index("nan")], result)
    with pytest.raises(assign.AssignmentError, match="1 of 1 .*NONFINITE"):
        alone.check()
    assert jax.tree.map(lambda leaf: leaf[:first], result).check().cost.shape == (first,)


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
    with enable_x64(False), pytest.raises(ValueError, match="int32"):
        assign.solve(np.full((2, 2), 2**40), solver=solver)


def test_words_are_no_costs() -> None:
    with pytest.raises(TypeError, match="cost must hold real numbers, got dtype <U1"):
        assign.auction(np.array([["a", "b"], ["c", "d"]]))


@pytest.mark.parametrize("solver", assign.SOLVERS)
def test_gradient_is_stopped(solver: str) -> None:
    def loss(cost: jax.Array) -> jax.Array:
        result = assign.solve(cost, solver=solver)
        return result.cost + result.gap + jnp.sum(jnp.square(cost))

    cost = jnp.asarray(make("uniform", 2))
    np.testing.assert_allclose(jax.grad(loss)(cost), 2 * cost)


@pytest.mark.parametrize("solver", ["auction", "scipy"])
def test_solving_under_strict_settings(solver: str) -> None:
    cost = make("integer", 3)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        enable_x64(True),
    ):
        with pytest.raises(ValueError, match="rank_promotion"):
            jnp.ones((2, 2)) + jnp.ones(2)
        assert_solved(cost, assign.solve(cost.astype(np.float64), solver=solver))
