"""Solvers of the linear assignment problem: match rows to columns at minimal total cost.

>>> import jax.numpy as jnp
>>> row_ind, col_ind = auction(jnp.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]]))
>>> col_ind.tolist()
[1, 0, 2]
"""

from collections.abc import Callable
from typing import Any

from jax.typing import ArrayLike

from nat_jax.assign._assignment import Assignment, AssignmentError, Status
from nat_jax.assign._auction import auction
from nat_jax.assign._optax import hungarian
from nat_jax.assign._points import PointMatching, match_points
from nat_jax.assign._scipy import scipy

__all__ = [
    "SOLVERS",
    "Assignment",
    "AssignmentError",
    "PointMatching",
    "Status",
    "auction",
    "hungarian",
    "match_points",
    "scipy",
    "solve",
]

SOLVERS: dict[str, Callable[..., Assignment]] = {
    "auction": auction,
    "scipy": scipy,
    "hungarian": hungarian,
}


def solve(cost: ArrayLike, *, solver: str = "auction", **options: Any) -> Assignment:
    """Match rows to columns with the solver of that name.

    Args:
        cost: [..., n, m]; see `auction`.
        solver: a key of `SOLVERS`: "auction", "scipy" (exact, on the host) or "hungarian" (optax).
        options: the keyword arguments of that solver.

    Returns:
        The `Assignment`.

    Raises:
        ValueError: the solver is unknown; the message lists the known ones.
        TypeError: the solver does not take such an option; the message lists those it takes.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known solvers: {', '.join(sorted(SOLVERS))}")
    function = SOLVERS[solver]
    known = function.__kwdefaults__ or {}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(
            f"solver {solver!r} has no option {unknown[0]!r}; its options: {', '.join(known)}"
        )
    return function(cost, **options)
