"""The solvers of ``assign.py``, each called as its users call it.

Solvers on the host get float32 NumPy arrays and pay for their own conversions; those in JAX get
arrays that are on the device already, and are waited for. What is not installed is left out.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax import assign

Columns = Callable[[Any], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Solver:
    """One solver, for single problems or for batches.

    Attributes:
        name: as in the tables.
        prepare: turns NumPy costs into the argument; not timed.
        solve: turns the argument into a result that is complete; timed.
        columns: returns int[..., n], the column of each row, from the result.
        compiled: whether the first call compiles.
        largest: n above which it takes too long to be timed.
    """

    name: str
    prepare: Callable[[np.ndarray], Any]
    solve: Callable[[Any], Any]
    columns: Columns
    compiled: bool = False
    largest: int = 10**9


def _in_jax(name: str, function: Callable[[jax.Array], Any], columns: Columns) -> Solver:
    def prepare(cost: np.ndarray) -> jax.Array:
        return jax.block_until_ready(jnp.asarray(cost))

    def solve(cost: jax.Array) -> Any:
        return jax.block_until_ready(function(cost))

    return Solver(name, prepare, solve, columns, compiled=True)


def _on_host(name: str, one: Callable[[np.ndarray], np.ndarray], batched: bool) -> Solver:
    """Return a solver of one problem, called in turn for those of a batch."""

    def each(costs: np.ndarray) -> list[np.ndarray]:
        return [one(cost) for cost in costs]

    return Solver(name, np.asarray, each if batched else one, np.asarray)


def _auction(batched: bool) -> Iterator[Solver]:
    yield _in_jax("auction", assign.auction, lambda result: np.asarray(result.col4row))


def _kernel(batched: bool) -> Iterator[Solver]:
    function = functools.partial(assign.auction, kernel=True)
    yield _in_jax("auction as a kernel", function, lambda result: np.asarray(result.col4row))


def _scipy(batched: bool) -> Iterator[Solver]:
    from scipy.optimize import linear_sum_assignment

    yield _on_host("scipy", lambda cost: linear_sum_assignment(cost)[1], batched)


def _lapx(batched: bool) -> Iterator[Solver]:
    import lap

    if not hasattr(lap, "lapjvr_batch"):  # another distribution has the same import name
        raise ImportError("lapx")
    suffix, options = ("_batch", {"n_threads": 1}) if batched else ("", {})
    for name in ("lapjvr", "lapjvx"):
        solve = functools.partial(getattr(lap, name + suffix), return_cost=False, **options)
        yield Solver(
            f"lapx {name}{suffix}",
            np.asarray,
            solve,
            lambda result: np.asarray(result[1]),
        )
    fastest = functools.partial(getattr(lap, f"lapjvr{suffix}"), return_cost=False, **options)

    @jax.jit
    def callback(cost: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(cost.shape[:-1], jnp.int32)
        return jax.pure_callback(
            lambda cost: np.asarray(fastest(np.asarray(cost))[1], np.int32), shape, cost
        )

    yield _in_jax("pure_callback to lapx", callback, np.asarray)


def _optax(batched: bool) -> Iterator[Solver]:
    import optax

    one = optax.assignment.hungarian_algorithm
    # On a CPU one after the other is faster than its vmap, which waits for the slowest problem.
    many = functools.partial(jax.lax.map, one)

    def columns(result: tuple[jax.Array, jax.Array]) -> np.ndarray:
        rows, found = map(np.asarray, result)
        return np.take_along_axis(found, np.argsort(rows, axis=-1), axis=-1)

    solver = _in_jax("optax", jax.jit(many if batched else one), columns)
    yield dataclasses.replace(solver, largest=1024)


# The pip package, the module, and the solvers of each name of --solvers.
GROUPS: dict[str, tuple[str, str, Callable[[bool], Iterator[Solver]]]] = {
    "auction": ("nat_jax", "nat_jax", _auction),
    "kernel": ("nat_jax", "nat_jax", _kernel),
    "scipy": ("scipy", "scipy", _scipy),
    "lapx": ("lapx", "lap", _lapx),
    "optax": ("optax", "optax", _optax),
}


def missing(names: list[str]) -> dict[str, str]:
    """Return the pip package of each group that cannot be imported."""
    found = {}
    for name in names:
        package, module, make = GROUPS[name]
        try:
            if importlib.util.find_spec(module) is None:
                raise ImportError(module)
            list(make(False))
        except ImportError:
            found[name] = package
    return found


def solvers(names: list[str], *, batched: bool) -> list[Solver]:
    """Return the solvers of the named groups."""
    return [solver for name in names for solver in GROUPS[name][2](batched)]
