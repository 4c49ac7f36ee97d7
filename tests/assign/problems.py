"""Cost matrices of many kinds, the ways to call a solver, and the checks its results must pass."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from nat_jax.assign import Assignment, Status

_FEATURES = 32
_TINY = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _features(rng: np.random.Generator, n: int) -> np.ndarray:
    return _unit(rng.standard_normal((n, _FEATURES)))


def _sphere(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return -_features(rng, n) @ _features(rng, m).T


def _collapsed(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Features within 0.1 of one direction, as those of an untrained network are."""
    return -(_features(rng, 1) + 0.1 * _features(rng, n)) @ _features(rng, m).T


def _towards_targets(noise: float) -> Callable[[np.random.Generator, int, int], np.ndarray]:
    """Features between their own target and anywhere, as in the course of training."""

    def features(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
        targets = _features(rng, max(n, m))
        own = targets[rng.permutation(max(n, m))][:n]
        return -_unit(own + noise * _features(rng, n)) @ targets[:m].T

    return features


def _clustered(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Images of few classes, each class in one place."""
    centres = _features(rng, 3)
    return -_unit(centres[rng.integers(0, 3, n)] + 0.02 * _features(rng, n)) @ _features(rng, m).T


def _wild(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    return 10.0 ** rng.uniform(-30, 30, (n, m)) * rng.choice([-1, 1], (n, m))


def _faint(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """The choice is among costs that vanish beside others, which are of no use to anyone."""
    cost = 1e-30 * rng.random((n, m))
    return np.where(rng.random((n, m)) < 0.3, 1e30, cost)


def _edge(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Integers of a span just beyond those that float32 holds."""
    cost = np.where(rng.random((n, m)) < 0.9, 2**24, 0) + rng.integers(0, 2, (n, m))
    cost.flat[:2] = np.array([0, 2**24 + 1])[: cost.size]
    return cost


def _huge_row(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    cost = rng.random((n, m))
    cost[:1] *= 1e6
    return cost


def _huge_column(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    cost = rng.random((n, m))
    cost[:, :1] += 1e6
    return cost


def _forbidden(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Two of three pairs forbidden, a complete matching allowed."""
    cost = np.where(rng.random((n, m)) < 2 / 3, np.inf, rng.random((n, m)))
    k = min(n, m)
    cost[rng.permutation(n)[:k], rng.permutation(m)[:k]] = 5.0
    return cost


def _infeasible(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
    """Two rows want one column, or one row wants none; the smaller side must be complete."""
    cost = rng.random((n, m))
    scarce = cost if n <= m else cost.T
    scarce[: 1 + (len(scarce) > 1), len(scarce) > 1 :] = np.inf
    return cost


def _with_one(bad: float) -> Callable[[np.random.Generator, int, int], np.ndarray]:
    def cost(rng: np.random.Generator, n: int, m: int) -> np.ndarray:
        cost = rng.random((n, m))
        cost[rng.integers(n), rng.integers(m)] = bad
        return cost

    return cost


KINDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "uniform": lambda rng, n, m: rng.random((n, m)),
    "sphere": _sphere,
    "collapsed": _collapsed,
    "half_way": _towards_targets(1.0),
    "matched": _towards_targets(0.1),
    "clustered": _clustered,
    "constant": lambda rng, n, m: np.full((n, m), -7.25),
    "ties": lambda rng, n, m: rng.integers(0, 3, (n, m)),
    "tenths": lambda rng, n, m: 0.1 * rng.integers(0, 101, (n, m)),
    "near_ties": lambda rng, n, m: 1 + 2.0**-22 * rng.integers(0, 4, (n, m)),
    "sums": lambda rng, n, m: rng.random((n, 1)) + rng.random(m),  # no matching is better
    "integer": lambda rng, n, m: rng.integers(-1000, 1000, (n, m)),
    "edge": _edge,
    "negative": lambda rng, n, m: -100 * rng.random((n, m)),
    "machol_wien": lambda rng, n, m: np.outer(np.arange(1, n + 1), np.arange(1, m + 1)),
    "offset": lambda rng, n, m: 1e6 + rng.random((n, m)),
    "huge": lambda rng, n, m: 1e30 * rng.standard_normal((n, m)),
    "tiny": lambda rng, n, m: 1e-30 * rng.standard_normal((n, m)),
    "wild": _wild,
    "faint": _faint,
    "huge_row": _huge_row,
    "huge_column": _huge_column,
    "near_largest": lambda rng, n, m: 3.3e38 * rng.uniform(-1, 1, (n, m)),
    "subnormal": lambda rng, n, m: 1e-40 * rng.random((n, m)),
    "forbidden": _forbidden,
    "infeasible": _infeasible,
    "nan": _with_one(np.nan),
    "minus_inf": _with_one(-np.inf),
}
FINITE = tuple(KINDS)[: tuple(KINDS).index("forbidden")]
# Users compare these totals with SciPy's digit by digit.
FAMILIES = ("uniform", "sphere", "collapsed", "half_way", "matched", "clustered")

DTYPES = {
    name: np.dtype(getattr(jnp, name) if name == "bfloat16" else name)
    for name in (
        *("float32", "float64", "bfloat16", "float16"),
        *("bool", "int8", "int16", "int32", "uint8", "uint32"),
    )
}


def make(
    kind: str, n: int, m: int | None = None, seed: int = 0, dtype: str = "float32"
) -> np.ndarray:
    """Return an [n, m] cost of that kind; of integers, other kinds span the whole type."""
    m = n if m is None else m
    number = tuple(KINDS).index(kind)
    cost = np.asarray(KINDS[kind](np.random.default_rng([seed, n, m, number]), n, m))
    to = DTYPES[dtype]
    if to == np.bool_:
        return cost > np.median(cost)
    if to.kind not in "iu":
        with np.errstate(over="ignore", under="ignore"):
            return cost.astype(to)
    low, high = int(np.iinfo(to).min), int(np.iinfo(to).max)
    fits = np.all((cost >= low) & (cost <= high))
    if not (cost.dtype.kind == "i" and fits):
        spread = np.ptp(cost) or 1.0
        cost = low + np.round((cost - cost.min()) / spread * (high - low))
    return np.clip(cost.astype(np.int64), low, high).astype(to)


def stack(
    n: int, m: int, seed: int = 0, dtype: str = "float32", *, maximize: bool = False
) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the kinds that fit the type, and one problem of each, [kinds, n, m].

    Under `maximize` floats change their sign, so that the same pairs are forbidden.
    """
    kinds = FINITE if DTYPES[dtype].kind in "biu" else tuple(KINDS)
    costs = np.stack([make(kind, n, m, seed, dtype) for kind in kinds])
    return kinds, -costs if maximize and DTYPES[dtype].kind not in "biu" else costs


Solve = Callable[[jax.Array], Assignment]


def _one_by_one(solve: Solve, costs: np.ndarray) -> Assignment:
    results = [jax.device_get(solve(cost)) for cost in costs]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


@functools.cache  # compiles once for each solver that is the same object
def _scanned(solve: Solve) -> Solve:
    return jax.jit(lambda costs: lax.scan(lambda carry, c: (carry, solve(c)), None, costs)[1])


def _scan(solve: Solve, costs: np.ndarray) -> Assignment:
    return _scanned(solve)(jnp.asarray(costs))


MODES: dict[str, Callable[[Solve, np.ndarray], Assignment]] = {
    "eager": _one_by_one,
    "batched": lambda solve, costs: solve(costs),
    "jit": lambda solve, costs: _one_by_one(jax.jit(solve), costs),
    "vmap": lambda solve, costs: jax.vmap(solve)(costs),
    "scan": _scan,
}


def sharded(solve: Solve, costs: np.ndarray) -> Assignment:
    """Spread a batch over all devices there are, each of which solves its part."""
    mesh = jax.make_mesh((jax.device_count(),), ("batch",))
    batch = PartitionSpec("batch")
    spread = jax.device_put(costs, NamedSharding(mesh, batch))
    # The results of a callback are not known to vary over the mesh.
    parts = jax.shard_map(solve, mesh=mesh, in_specs=batch, out_specs=batch, check_vma=False)
    return jax.jit(parts)(spread)


WAYS = MODES | {"sharded": sharded}


def run(way: str, solve: Solve, costs: np.ndarray) -> Assignment:
    """Solve [k, n, m] in that way; return the results on the host.

    float64 reaches a solver as it is from NumPy, and inside transformations where JAX keeps it.
    """
    traced = costs.dtype == np.float64 and way not in ("eager", "batched")
    with _float64_everywhere() if traced else contextlib.nullcontext():
        return jax.device_get(WAYS[way](solve, costs))


@contextlib.contextmanager
def _float64_everywhere() -> Iterator[None]:
    # jax.enable_x64 holds for one thread; the callbacks of several devices run in others.
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def exact(x: float) -> int:
    """Return a finite float64 in units of 2**-1074, of which all are multiples."""
    numerator, denominator = float(x).as_integer_ratio()
    return numerator * (2**1074 // denominator)


def total(cost: np.ndarray, col4row: np.ndarray) -> float:
    """Return the float64 sum of the matched costs."""
    rows = np.flatnonzero(col4row >= 0)
    return float(cost.astype(np.float64)[rows, col4row[rows]].sum())


def optimum(cost: np.ndarray, *, maximize: bool = False) -> float:
    """Return SciPy's total."""
    rows, columns = linear_sum_assignment(cost.astype(np.float64), maximize=maximize)
    return float(cost.astype(np.float64)[rows, columns].sum())


def is_matching(col4row: np.ndarray, n: int, m: int) -> bool:
    """Say whether min(n, m) rows have each a column of their own and the others none."""
    if col4row.shape != (n,) or col4row.dtype != np.int32:
        return False
    columns = col4row[col4row != -1]
    inside = np.all((columns >= 0) & (columns < m))
    return bool(inside and len(columns) == len(np.unique(columns)) == min(n, m))


def _pairs(col4row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.flatnonzero(col4row >= 0)
    return rows, col4row[rows]


def best_pairs(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Return an optimal matching as SciPy does, None if there is none over allowed pairs.

    Of very few rows and columns it is found by trying all in exact arithmetic.
    """
    n, m = cost.shape
    if n > m:
        pairs = best_pairs(cost.T)
        return pairs and (pairs[1], pairs[0])
    if m > 3:
        try:
            return linear_sum_assignment(cost)
        except ValueError:
            return None
    rows = np.arange(n)
    allowed = [
        columns
        for columns in map(list, itertools.permutations(range(m), n))
        if np.all(cost[rows, columns] < np.inf)
    ]
    if not allowed:
        return None
    return rows, np.array(min(allowed, key=lambda c: sum(map(exact, cost[rows, c]))), np.int64)


def _excess(matched: np.ndarray, best: np.ndarray) -> int:
    return sum(map(exact, matched)) - sum(map(exact, best))


def certified_gap(cost: np.ndarray, col4row: np.ndarray, prices: np.ndarray) -> float:
    """Work out in float64 what the prices prove about a matching that minimises."""
    cost, prices = cost.astype(np.float64), prices.astype(np.float64)
    n, m = cost.shape
    if n > m:
        row_prices = np.max(-prices - cost, axis=1)
        left_out = row_prices[col4row < 0].max()
        row_prices = np.maximum(row_prices, left_out)
        if np.isinf(left_out):  # rows without an allowed pair bind nobody
            row_prices = np.maximum(row_prices, row_prices[col4row >= 0].min())
        rows, columns = _pairs(col4row)
        row4col = np.empty(m, np.int64)
        row4col[columns] = rows
        return certified_gap(cost.T, row4col, row_prices)
    reduced = cost + prices
    slack = reduced[np.arange(n), col4row] - reduced.min(axis=1)
    left_out = np.setdiff1d(np.arange(m), col4row)
    return float(slack.sum() + (prices[left_out] - prices.min()).sum())


class Fault(NamedTuple):
    """What is wrong with a result."""

    check: str
    message: str


Checks = Callable[..., Iterator[tuple[str, str]]]


def _listed(check: Checks) -> Callable[..., list[Fault]]:
    @functools.wraps(check)
    def listed(*arguments: object, **options: object) -> list[Fault]:
        return [Fault(*fault) for fault in check(*arguments, **options)]

    return listed


@_listed
def faults(
    cost: np.ndarray,
    result: Assignment,
    *,
    maximize: bool = False,
    share: float = 1e-6,
    eps: float = 0.0,
    max_rounds: int | None = None,
    warm: bool = False,
) -> Iterator[tuple[str, str]]:
    """Yield all that is wrong with the result of one problem; callers get a list.

    Args:
        cost: [n, m] as given to the solver.
        result: of the host.
        maximize: as given to the solver.
        share: how large a gap may be, in units of min(n, m) * (largest - smallest finite cost).
        eps: as given to the solver; it may add as much to the gap for every row.
        max_rounds: as given to the solver.
        warm: whether it was given prices; large ones cost accuracy, not certainty.
    """
    n, m = cost.shape
    k = min(n, m)
    least = -cost.astype(np.float64) if maximize else cost.astype(np.float64)
    col4row, prices = np.asarray(result.col4row), np.asarray(result.prices)
    gap, status, rounds = float(result.gap), int(result.status), int(result.rounds)

    leaves = (result.cost, result.prices, result.gap, result.rounds, result.status)
    types = " ".join(str(np.asarray(leaf).dtype) for leaf in leaves)
    if types != "float32 float32 float32 int32 int32":
        yield "types", types
    if not is_matching(col4row, n, m):
        yield "matching", f"{col4row}"
        return
    rows, columns = _pairs(col4row)
    limit = k * (k + 1) + 4 * k if max_rounds is None else max_rounds
    if not 0 <= rounds <= limit:
        yield "rounds", f"{rounds}, at most {limit} are possible"

    pairs = None
    if np.any(np.isnan(least) | (least == -np.inf)):
        expected = Status.NONFINITE
    else:
        pairs = best_pairs(least)
        expected = Status.INFEASIBLE if pairs is None else Status.OPTIMAL_WITHIN_EPS
    stopped = max_rounds is not None and rounds == max_rounds and status == Status.MAX_ROUNDS
    if status != expected and not (stopped and expected != Status.NONFINITE):
        yield "status", f"{status}, not {expected.name}"
    if not gap >= 0:
        yield "gap", f"{gap}"
        return

    matched = least[rows, columns]
    absolute = float(np.abs(matched).sum())
    if absolute < _LARGEST:
        value = -matched.sum() if maximize else matched.sum()
        error = abs(float(result.cost) - value)
        if not error <= 1.01 * (k + 2) * 2.0**-24 * absolute + k * _TINY:
            yield "total", f"{float(result.cost)!r}, not {value!r}"
    if pairs is None:
        if gap != np.inf:
            yield "gap", f"{gap} where nothing can be guaranteed"
        return
    if np.any(np.isinf(matched)):
        if gap != np.inf:
            yield "value", f"a forbidden pair and gap {gap}"
        return

    excess = _excess(matched, least[pairs])
    if gap < np.inf and excess > exact(gap):
        yield "value", f"{excess / 2**1074!r} from the optimum, gap {gap!r}"
    if k == 0 or stopped:
        return
    finite = least[np.isfinite(least)]
    largest, spread = float(np.abs(finite).max()), float(np.ptp(finite))
    highest = float(np.abs(prices).max())
    # Below the smallest normal number float32 has no accuracy to give.
    of_eps = eps * (1 + (n + m) * 2.0**-22)
    of_prices = 2.0**-22 * highest if highest < _LARGEST / 8 else np.inf
    allowed = k * (share * spread + of_eps + 256 * _TINY + (of_prices if warm else 0))
    if not gap <= allowed and allowed < _LARGEST:
        yield "accuracy", f"gap {gap!r}, {gap / (k * spread) if spread else np.inf:.3g} of S"
    whole = np.all(finite == np.round(finite)) and eps < 1
    reach = spread if cost.dtype.kind in "biu" else 2 * largest
    reach = reach + 2 * highest if warm else reach * (max(n, m) + 1)
    if whole and reach < 2**24 and (gap or excess):
        yield "exact", f"gap {gap} of integers, {excess / 2**1074} from the optimum"
    if not highest < np.inf:
        if max(spread, eps) * (k + 1) < _LARGEST:
            yield "prices", f"{prices}"
        return
    proved = certified_gap(least, col4row, prices)
    noise = 8 * k * 2.0**-53 * (largest + highest) + k * 256 * _TINY
    if not -noise <= proved <= gap + noise:
        yield "prices", f"they prove {proved!r}, gap {gap!r}"


def disagreement(
    kind: str, cost: np.ndarray, result: Assignment, *, maximize: bool = False
) -> list[Fault]:
    """Compare a total with SciPy's as a user would, relative to the sum of |c|."""
    if kind not in FAMILIES or cost.size == 0:
        return []
    cost = cost.astype(np.float64)
    pairs = linear_sum_assignment(cost, maximize=maximize)
    reached = cost[_pairs(np.asarray(result.col4row))].sum()
    off, size = abs(reached - cost[pairs].sum()), np.abs(cost[pairs]).sum()
    return (
        [] if off <= 1e-6 * size else [Fault("family", f"off by {off:.3g} of sum |c| {size:.3g}")]
    )


def differences(once: Assignment, again: Assignment) -> list[Fault]:
    """Compare two results bit for bit."""
    return [
        Fault("steady", f"{name}: {getattr(once, name)} then {getattr(again, name)}")
        for name in ("col4row", "cost", "prices", "gap", "rounds", "status")
        if np.asarray(getattr(once, name)).tobytes() != np.asarray(getattr(again, name)).tobytes()
    ]


def relabel(cost: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return [..., n, m] with rows and columns in another order."""
    rng = np.random.default_rng(seed)
    n, m = cost.shape[-2:]
    return cost[..., rng.permutation(n), :][..., rng.permutation(m)]


def value_changes(
    cost: np.ndarray, result: Assignment, other_cost: np.ndarray, other: Assignment
) -> list[Fault]:
    """Compare the values that two labellings of one problem lead to."""
    allowed = max(float(result.gap), float(other.gap))
    matched = cost.astype(np.float64)[_pairs(np.asarray(result.col4row))]
    others = other_cost.astype(np.float64)[_pairs(np.asarray(other.col4row))]
    if not math.isfinite(allowed):
        return []
    change = abs(sum(map(exact, matched)) - sum(map(exact, others)))
    if change <= exact(allowed):
        return []
    return [Fault("relabelling", f"value changes by {change / 2**1074!r}, gap {allowed!r}")]


def assert_solved(cost: np.ndarray, result: Assignment, *, share: float = 1e-6) -> None:
    """Check a result that is to be optimal, of a solver that minimises."""
    result.check()
    assert faults(cost, jax.device_get(result), share=share) == []
