"""SciPy's exact solver on the host, with the interface of the others."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from nat_jax.assign._assignment import Assignment, AssignmentError
from nat_jax.assign._batch import solve_all, wide
from nat_jax.assign._certificate import complete
from nat_jax.assign._problem import as_cost, full_precision


def scipy(cost: ArrayLike, *, maximize: bool = False) -> Assignment:
    """Match rows to columns with ``scipy.optimize.linear_sum_assignment`` on the host.

    Exact in float64. Outside jit the host solves directly; under `jit`, `vmap` and `scan` a
    `jax.pure_callback` does, whose code is NumPy and SciPy alone, one problem after the other,
    while the device waits.

    Args:
        cost: float, integer or bool [..., n, m], as for `auction`.
        maximize: find the largest total instead.

    Returns:
        The `Assignment`, with the certificate of `auction`; `rounds` is 0.

    Raises:
        TypeError: `cost` holds no real numbers.
        ValueError: `cost` has fewer than two dimensions.
        RuntimeError: under jit, vmap, grad or scan on one CPU core, unless the environment
            variable NPROC is 2 or more when jax starts.
    """
    with full_precision(cost):
        return _scipy(as_cost(cost), maximize=bool(maximize))


def _scipy(array: jax.Array, *, maximize: bool) -> Assignment:
    host = partial(_solve_on_host, maximize=maximize)
    problems = wide(array)
    if isinstance(array, jax.core.Tracer):
        _need_two_threads()
        shape = jax.ShapeDtypeStruct(problems.shape[:-1], jnp.int32)
        problems = lax.stop_gradient(problems)
        col4row = jax.pure_callback(host, shape, problems, vmap_method="expand_dims")
    else:
        col4row = jnp.asarray(host(np.asarray(problems)))
    return _certified(array, col4row, maximize=maximize)


def _need_two_threads() -> None:
    """Refuse what may hang: a callback's input is copied by a thread that the callback holds.

    Seen with jax 0.10.2 on one core: solving ``x @ x.T`` of 1024 rows inside jit, thirty times.
    """
    threads = int(os.environ.get("NPROC") or _cores())
    if threads < 2 and jax.default_backend() == "cpu":
        raise AssignmentError(
            "solver 'scipy' under jit, vmap or grad needs two threads of JAX's CPU client, got "
            f"{threads}: set the environment variable NPROC=2 before Python starts, or use the "
            "solver 'auction'"
        )


def _cores() -> int:
    """Return the number of cores that this process may use, as JAX's CPU client counts them."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@partial(jax.jit, static_argnames="maximize")
def _certified(cost: jax.Array, col4row: jax.Array, *, maximize: bool) -> Assignment:
    return solve_all(partial(complete, maximize=maximize), cost, col4row)


def _solve_on_host(cost: np.ndarray, *, maximize: bool) -> np.ndarray:
    """Solve every problem of [..., n, m], n <= m; return int32[..., n]."""
    cost = np.asarray(cost)
    col4row = np.zeros(cost.shape[:-1], np.int32)
    for place in np.ndindex(*cost.shape[:-2]):
        col4row[place] = _match(cost[place].astype(np.float64), maximize)
    return col4row


def _match(cost: np.ndarray, maximize: bool) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    if cost.size == 0:
        return np.zeros(cost.shape[0], np.int32)
    if maximize:
        cost = -cost
    finite = np.isfinite(cost)
    high = cost[finite].max(initial=0.0)
    cost = np.where(finite | (cost == np.inf), cost, high)
    try:
        return linear_sum_assignment(cost)[1]
    except ValueError:  # no complete matching over allowed pairs: use as few others as possible
        scaled = cost / max(np.abs(cost[finite]).max(initial=0.0), np.finfo(np.float64).tiny)
        dear = 1.0 + 2.0 * len(cost)  # more than all others together differ by
        return linear_sum_assignment(np.where(cost == np.inf, dear, scaled))[1]
