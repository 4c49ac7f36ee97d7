"""Optax's Hungarian algorithm, with the interface of the others."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from nat_jax.assign._assignment import Assignment
from nat_jax.assign._batch import solve_all
from nat_jax.assign._certificate import Solved, complete
from nat_jax.assign._problem import as_cost, full_precision, standardise


def hungarian(cost: ArrayLike, *, maximize: bool = False) -> Assignment:
    """Match rows to columns with ``optax.assignment.hungarian_algorithm``.

    Args:
        cost: float, integer or bool [..., n, m], as for `auction`.
        maximize: find the largest total instead.

    Returns:
        The `Assignment`, with the certificate of `auction`; `rounds` is 0.

    Raises:
        ImportError: optax is not installed.
        TypeError: `cost` holds no real numbers.
        ValueError: `cost` has fewer than two dimensions.
    """
    with full_precision(cost):
        return _hungarian(as_cost(cost), maximize=bool(maximize))


@partial(jax.jit, static_argnames="maximize")
def _hungarian(cost: jax.Array, *, maximize: bool) -> Assignment:
    return solve_all(partial(_solve_one, maximize=maximize), cost)


def _solve_one(given: jax.Array, *, maximize: bool) -> Solved:
    import optax

    # Its pairs come in any order of rows.
    row, column = optax.assignment.hungarian_algorithm(standardise(given, maximize).cost)
    col4row = jnp.zeros(given.shape[0], jnp.int32).at[row].set(column.astype(jnp.int32))
    return complete(given, col4row, maximize=maximize)
