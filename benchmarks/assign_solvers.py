"""The solvers of ``benchmarks/assign.py``, each called as its users call it.

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

# Of the deviation of the costs; with 0.05 the matchings are worse, with 0.002 four times as slow.
_SINKHORN_EPS = 0.01


@dataclasses.dataclass(frozen=True)
class Solver:
    """One solver, for single problems or for batches.

    Attributes:
        name: as in the tables.
        prepare: turns a NumPy cost (and prices, if it takes them) into arguments; not timed.
        solve: turns arguments into a result that is complete; timed.
        columns: returns int[..., n], the column of each row, from the result.
        exact: whether the total should be the optimum.
        compiled: whether the first call compiles.
        start: "" or the name of the warm start that it takes.
    """

    name: str
    prepare: Callable[..., tuple]
    solve: Callable[..., Any]
    columns: Callable[[Any], np.ndarray]
    exact: bool = True
    compiled: bool = False
    start: str = ""


def auction(start: str = "") -> Solver:
    """Return this library's solver, from cold or from the prices of that name."""

    def solve(cost: jax.Array, prices: jax.Array | None = None) -> assign.Assignment:
        return jax.block_until_ready(assign.auction(cost, prices=prices))

    return Solver(
        name=f"auction, {start}" if start else "auction",
        prepare=_on_device,
        solve=solve,
        columns=lambda result: np.asarray(result.col4row),
        compiled=True,
        start=start,
    )


def _on_device(*arrays: np.ndarray) -> tuple:
    return tuple(jax.block_until_ready(jnp.asarray(x)) for x in arrays)


def _scipy(batched: bool) -> Iterator[Solver]:
    from scipy.optimize import linear_sum_assignment

    def one(cost: np.ndarray) -> np.ndarray:
        return linear_sum_assignment(cost)[1]

    yield _on_host("scipy", one, batched)


def _on_host(name: str, one: Callable[[np.ndarray], np.ndarray], batched: bool) -> Solver:
    """Return a solver of one problem, called in turn for those of a batch."""

    def each(costs: np.ndarray) -> list[np.ndarray]:
        return [one(cost) for cost in costs]

    return Solver(name, lambda cost: (cost,), each if batched else one, np.asarray)


def _lapx(batched: bool) -> Iterator[Solver]:
    import lap

    if not hasattr(lap, "lapjvr_batch"):  # another distribution has the same import name
        raise ImportError("lapx")

    def on_callback(cost: jax.Array) -> jax.Array:
        if batched:
            columns = lap.lapjvr_batch(np.asarray(cost), return_cost=False, n_threads=1)[1]
        else:
            columns = lap.lapjvr(np.asarray(cost), return_cost=False)[1]
        return np.asarray(columns, np.int32)

    for name in ("lapjvr", "lapjvx"):
        if batched:
            function = getattr(lap, f"{name}_batch")
            solve = functools.partial(function, return_cost=False, n_threads=1)
        else:
            solve = functools.partial(getattr(lap, name), return_cost=False)
        label = f"lapx {name}{'_batch' if batched else ''}"
        yield Solver(label, lambda cost: (cost,), solve, lambda result: np.asarray(result[1]))

    @jax.jit
    def callback(cost: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(cost.shape[:-1], jnp.int32)
        return jax.pure_callback(on_callback, shape, cost)

    yield _in_jax("pure_callback to lapx", callback, np.asarray)


def _in_jax(
    name: str,
    function: Callable[[jax.Array], Any],
    columns: Callable[[Any], np.ndarray],
    *,
    exact: bool = True,
) -> Solver:
    def solve(cost: jax.Array) -> Any:
        return jax.block_until_ready(function(cost))

    return Solver(name, _on_device, solve, columns, exact=exact, compiled=True)


def _lapjv(batched: bool) -> Iterator[Solver]:
    from lapjv import lapjv

    def one(cost: np.ndarray) -> np.ndarray:
        return lapjv(cost)[0]

    yield _on_host("lapjv", one, batched)


def _optax(batched: bool) -> Iterator[Solver]:
    import optax

    one = optax.assignment.hungarian_algorithm
    # On a CPU one after the other is faster than its vmap, which waits for the slowest problem.
    many = functools.partial(jax.lax.map, one)

    def columns(result: tuple[jax.Array, jax.Array]) -> np.ndarray:
        rows, found = map(np.asarray, result)
        return np.take_along_axis(found, np.argsort(rows, axis=-1), axis=-1)

    yield _in_jax("optax", jax.jit(many if batched else one), columns)


def _ott(batched: bool) -> Iterator[Solver]:
    from ott.geometry import geometry
    from ott.solvers import linear

    def one(cost: jax.Array) -> jax.Array:
        problem = geometry.Geometry(cost, epsilon=_SINKHORN_EPS, relative_epsilon="std")
        return _rounded(linear.solve(problem).matrix)

    many = functools.partial(jax.lax.map, one)
    yield _in_jax("ott sinkhorn", jax.jit(many if batched else one), np.asarray, exact=False)


def _rounded(plan: jax.Array) -> jax.Array:
    """Let each row take its best free column, the surest row first."""
    n = plan.shape[0]

    def take(free: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        column = jnp.argmax(jnp.where(free, plan[row], -1.0))
        return free.at[column].set(False), column

    order = jnp.argsort(-jnp.max(plan, axis=1))
    _, columns = jax.lax.scan(take, jnp.ones(n, bool), order)
    return jnp.zeros(n, jnp.int32).at[order].set(columns.astype(jnp.int32))


# The pip package and the module of each group.
_GROUPS: dict[str, tuple[str, str, Callable[[bool], Iterator[Solver]]]] = {
    "scipy": ("scipy", "scipy", _scipy),
    "lapx": ("lapx", "lap", _lapx),
    "lapjv": ("lapjv", "lapjv", _lapjv),
    "optax": ("optax", "optax", _optax),
    "ott": ("ott-jax", "ott", _ott),
}
STARTS = ("similar", "prices", "rises")
NAMES = ("auction", *_GROUPS)
PACKAGES = tuple(package for package, _, _ in _GROUPS.values())


def missing(names: list[str]) -> dict[str, str]:
    """Return the pip package of each group that cannot be imported."""
    found = {}
    for name in names:
        package, module, make = _GROUPS.get(name, ("", "", None))
        try:
            if make and importlib.util.find_spec(module) is None:
                raise ImportError(module)
            if make:
                list(make(False))
        except ImportError:
            found[name] = package
    return found


def solvers(names: list[str], *, batched: bool) -> list[Solver]:
    """Return the solvers of the named groups; the auction once more for every warm start."""
    made = [auction(start) for start in ("", *STARTS)] if "auction" in names else []
    for name in names:
        if name in _GROUPS:
            made += _GROUPS[name][2](batched)
    return made
