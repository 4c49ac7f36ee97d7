"""What every solver returns: a matching, its dual prices and how far from optimal it can be."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


class Status(enum.IntEnum):
    """How a solve ended. Whatever the status, the matching is a valid one."""

    OPTIMAL_WITHIN_EPS = 0
    MAX_ROUNDS = 1
    NONFINITE = 2
    INFEASIBLE = 3


_CURES = {
    Status.MAX_ROUNDS: "the round limit was reached; raise max_rounds or leave it out",
    Status.NONFINITE: (
        "the cost holds NaN, -inf (+inf under maximize) or numbers beyond float32; "
        "look at what computes it"
    ),
    Status.INFEASIBLE: (
        "every complete matching uses a forbidden pair; allow more pairs "
        "(a large finite cost instead of an infinite one)"
    ),
}


class AssignmentError(RuntimeError):
    """A solve did not end with an optimal matching."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)  # arrays do not compare to one bool
class Assignment:
    """The solution of one problem, or of a batch of problems of one shape.

    ``row_ind, col_ind = assignment`` unpacks as the result of
    ``scipy.optimize.linear_sum_assignment`` does.

    Attributes:
        col4row: int32[..., n]; the column of each row, -1 where a row is left out (n > m).
        cost: float32[...]; the sum of the matched costs as given (also under ``maximize``).
        prices: float32[..., m]; dual values p, one per column, up to a constant: the matched
            column of row i minimises c[i, j] + p[j] (under ``maximize``: maximises
            c[i, j] - p[j]).
        gap: float32[...]; upper bound, never negative, on how far the matched total is from the
            optimum (value - optimum, or optimum - value under ``maximize``). Infinite where the
            status is NONFINITE or INFEASIBLE.
        rounds: int32[...]; steps the solver took, 0 from solvers that do not count.
        status: int32[...]; a `Status` value.
    """

    col4row: jax.Array
    cost: jax.Array
    prices: jax.Array
    gap: jax.Array
    rounds: jax.Array
    status: jax.Array

    @property
    def row_ind(self) -> jax.Array:
        """The matched rows in rising order, int32[..., min(n, m)]."""
        n, m = self.col4row.shape[-1], self.prices.shape[-1]
        if n <= m:
            return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), self.col4row.shape)
        matched_first = jnp.argsort(self.col4row < 0, axis=-1, stable=True)
        return matched_first[..., :m].astype(jnp.int32)

    @property
    def col_ind(self) -> jax.Array:
        """The columns of `row_ind`, int32[..., min(n, m)]."""
        return jnp.take_along_axis(self.col4row, self.row_ind, axis=-1)

    @property
    def converged(self) -> jax.Array:
        """Whether the matching is optimal within eps, bool[...]."""
        return self.status == Status.OPTIMAL_WITHIN_EPS

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.row_ind, self.col_ind))

    def check(self) -> "Assignment":
        """Return self, having waited for the result, if every problem converged.

        Call it outside jit.

        Raises:
            AssignmentError: a problem did not converge; the message names how and what to do.
        """
        status = np.atleast_1d(np.asarray(self.status))
        bad = np.argwhere(status != Status.OPTIMAL_WITHIN_EPS)
        if len(bad):
            first = Status(int(status[tuple(bad[0])]))
            where = f"problem {tuple(map(int, bad[0]))}: " if np.ndim(self.status) else ""
            raise AssignmentError(
                f"{len(bad)} of {status.size} assignment problems were not solved; "
                f"{where}{first.name}: {_CURES[first]}"
            )
        return self
