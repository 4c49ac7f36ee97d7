"""Matching points to points: the assignment problem with costs given by coordinates."""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from nat_jax.assign._auction import auction
from nat_jax.assign._point_bids import best_values, bid
from nat_jax.assign._problem import ROUNDOFF

METRICS = ("cosine", "sqeuclidean")
_BLOCK = 1024  # rows and columns of a problem that is solved exactly
_WIDE = 2**16  # rows and columns of a problem that is solved by bids
_EPS = (1e-2, 1e-3, 1e-4)  # of the passes, in standard deviations of the costs
_LOWERED = 30  # by how many times eps prices come down between passes if columns stay free
_LEFT = 4096  # in the first pass, one row in so many may be left to the blocks
_CHUNK = 2**15  # points that are converted to float64 at a time
_SIDE_BY_SIDE = 64  # blocks at a time on an accelerator


@dataclass(frozen=True, eq=False)
class PointMatching:
    """A matching of points, as `match_points` returns it.

    ``row_ind, col_ind = matching`` unpacks as the result of
    ``scipy.optimize.linear_sum_assignment`` does.

    Attributes:
        col4row: int32[n]; the point of `y` for each point of `x`.
        cost: mean cost of the matched pairs, summed in float64.
        prices: float32[m]; approximate dual values, up to a constant: the match of point i nearly
            minimises ``cost[i, j] + prices[j]``. Zeros where no pass was made.
        gap: upper bound on how far `cost` is above the smallest possible mean cost; None without
            ``certify``.
    """

    col4row: jax.Array
    cost: float
    prices: jax.Array
    gap: float | None

    @property
    def row_ind(self) -> jax.Array:
        """The points of `x` in order, int32[n]."""
        return jnp.arange(len(self.col4row), dtype=jnp.int32)

    @property
    def col_ind(self) -> jax.Array:
        """The points of `y` that they are matched to, int32[n]."""
        return self.col4row

    def __iter__(self) -> Iterator[jax.Array]:
        return iter((self.row_ind, self.col_ind))


def match_points(
    x: ArrayLike,
    y: ArrayLike,
    *,
    metric: str = "cosine",
    start: ArrayLike | None = None,
    prices: ArrayLike | None = None,
    budget: int = 2,
    certify: bool = False,
    seed: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> PointMatching:
    """Match each point of `x` to a point of `y` of its own, at a small mean cost.

    No [n, m] array is ever made: memory is O(n + m). Call it outside jit. With n * m <= 1024**2
    the matching is optimal up to float32 rounding, as `auction`'s. Beyond that, each pass
    has two steps: the rows bid for all columns (beyond 65,536**2 for those of one part of many),
    and blocks of about 1024 pairs are solved exactly. Parts and blocks are drawn at random or
    along a random direction, in turn; one whose new matching is not better keeps the present one.

    Args:
        x: real numbers [n, D].
        y: real numbers [m, D], n <= m.
        metric: "cosine" (1 - the cosine of the angle) or "sqeuclidean" (squared distance), as in
            ``scipy.spatial.distance.cdist``.
        start: integers [n]; a matching that the result is at least as good as. It saves time only
            together with its `prices`. None: point i with point i.
        prices: real numbers [m]; `PointMatching.prices` of points that were nearly the same. With
            the `start` that belongs to them, the first pass takes less time, as pairs that are
            still good stay. Used where all rows bid for all columns.
        budget: number of passes. The first comes within some thousandths of the optimum where all
            rows bid for all columns; the next are more accurate.
        certify: compute `PointMatching.gap`, which takes about as long as half a pass.
        seed: of the random order and directions. Equal arguments give equal results for any number
            of devices of one kind.
        devices: of this process, over which parts and blocks are distributed; all of them by
            default.

    Returns:
        The `PointMatching`.

    Raises:
        TypeError: an argument has the wrong type, or is traced.
        ValueError: a shape or an option is wrong, a number is not finite, a point has no direction
            (zero under "cosine"), or `start` is no matching.

    >>> import numpy as np
    >>> noise, data = np.random.default_rng(0).normal(size=(2, 100, 8))
    >>> matching = match_points(noise, data, metric="sqeuclidean", certify=True)
    >>> sorted(matching.col4row.tolist()) == list(range(100))
    True
    >>> bool(matching.cost < ((noise - data) ** 2).sum(axis=1).mean()), matching.gap < 1e-4
    (True, True)
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known metrics: {', '.join(METRICS)}")
    passes = _as_number("budget", budget, "a number of passes")
    seed = _as_number("seed", seed, "which starts the random numbers")
    mesh = _mesh(devices)
    rows, columns = _as_points("x", x), _as_points("y", y)
    n, m = len(rows), len(columns)
    if rows.shape[1] != columns.shape[1]:
        raise ValueError(
            f"x and y must have points of one dimension, got shapes {rows.shape}, {columns.shape}"
        )
    if n > m:
        raise ValueError(f"x must not have more points than y, got {n} and {m}; exchange them")
    col4row = np.arange(n, dtype=np.int32) if start is None else _as_matching(start, n, m)
    known = None if prices is None else _as_prices(prices, m)
    # In any program's settings, points come from the host and numbers are 32 bits wide.
    with jax.enable_x64(False), jax.transfer_guard("allow"):
        if n == 0:
            return PointMatching(jnp.asarray(col4row), 0.0, jnp.zeros(m), 0.0 if certify else None)
        problem = _standardise(rows, columns, metric)
        first = col4row
        if known is not None:
            known = (known - problem.offset) / problem.unit
            known = (known - (known.mean() if n == m else known.min())).astype(np.float32)
        col4row, found = _improve(problem, first.copy(), known, passes, seed, mesh)
        cost = _mean_cost(rows, columns, col4row, metric)
        if passes:  # blocks are compared in float32
            before = _mean_cost(rows, columns, first, metric)
            if before <= cost:
                col4row, cost = first, before
        gap = _gap(problem, col4row, found) if certify else None
        in_units = found * problem.unit + problem.offset
        return PointMatching(jnp.asarray(col4row), cost, jnp.asarray(in_units, jnp.float32), gap)


def _as_number(name: str, number: int, meaning: str) -> int:
    try:
        integer = operator.index(number)
    except TypeError:
        raise TypeError(f"{name} must be an integer, {meaning}, got {number!r}") from None
    if integer < 0:
        raise ValueError(f"{name} must not be negative, got {integer}")
    return integer


def _as_array(name: str, array: ArrayLike) -> np.ndarray:
    if isinstance(array, jax.core.Tracer):
        raise TypeError(f"match_points runs outside jit, got a traced {name}")
    return np.asarray(array)


def _as_points(name: str, points: ArrayLike) -> np.ndarray:
    array = _as_array(name, points)
    real = jnp.integer, jnp.floating, jnp.bool_
    if not any(jnp.issubdtype(array.dtype, kind) for kind in real):
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"{name} must have shape [points, D], got {array.shape}")
    return array


def _as_matching(start: ArrayLike, n: int, m: int) -> np.ndarray:
    array = _as_array("start", start)
    if array.dtype.kind not in "iu":
        raise TypeError(f"start must hold integers, got dtype {array.dtype}")
    if array.shape != (n,):
        raise ValueError(
            f"start must have one point of y for each of x, shape ({n},), got {array.shape}"
        )
    if n and not 0 <= array.min() <= array.max() < m:
        raise ValueError(
            f"start must hold points of y, 0 to {m - 1}, got {array.min()} to {array.max()}"
        )
    number = np.bincount(array, minlength=m)
    if n and number.max() > 1:
        raise ValueError(
            f"start must be a matching, but has point {number.argmax()} of y {number.max()} times"
        )
    return array.astype(np.int32)


def _as_prices(prices: ArrayLike, m: int) -> np.ndarray:
    array = _as_array("prices", prices)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"prices must hold real numbers, got dtype {array.dtype}")
    if array.shape != (m,) or not np.isfinite(array).all():
        raise ValueError(f"prices must be finite and have shape ({m},), got {array.shape}")
    return array.astype(np.float64)


def _mesh(devices: Sequence[jax.Device] | None) -> jax.sharding.Mesh:
    some = jax.local_devices() if devices is None else devices
    if not isinstance(some, Sequence) or not {*some} <= {*jax.local_devices()}:
        raise TypeError(f"devices must be a list of this process's devices, got {devices!r}")
    if not 0 < len(some) == len({*some}):
        raise ValueError(f"devices must be one or more, each once, got {devices!r}")
    return jax.sharding.Mesh(np.array(some), ("part",))


class _Problem(NamedTuple):
    """Points whose products are, up to sign, unit and an offset of each row, the costs.

    ``cost[i, j] = of_row[i] - unit * x[i] @ y[j] - offset[j]``.
    """

    x: jax.Array  # float32[n, D'], centred and scaled
    y: jax.Array  # float32[m, D']
    unit: float
    offset: np.ndarray  # float64[m], which does not matter where n = m; 0 elsewhere
    deviation: float  # of the products


def _chunks(points: np.ndarray, metric: str, name: str = "") -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of the points in float64, of norm 1 under "cosine"."""
    limit = np.sqrt(np.finfo(np.float32).max / points.shape[1]) / 4
    for begin in range(0, len(points), _CHUNK):
        part = points[begin : begin + _CHUNK].astype(np.float64)
        if name and not np.isfinite(part).all():
            bad = begin + int(np.argmin(np.isfinite(part).all(axis=1)))
            raise ValueError(f"{name} must be finite, but {name}[{bad}] holds NaN or infinity")
        if name and metric == "sqeuclidean" and np.abs(part).max() > limit:
            raise ValueError(
                f"{name} holds numbers beyond {limit:.2g}, whose squared distances float32 cannot "
                "hold; divide x and y by one number"
            )
        if metric == "cosine":
            largest = np.abs(part).max(axis=1, keepdims=True)
            if name and not largest.all():
                bad = begin + int(np.argmin(largest))
                raise ValueError(
                    f"{name}[{bad}] is zero and has no direction; leave it out, or use the metric "
                    "'sqeuclidean'"
                )
            part /= largest
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        yield slice(begin, begin + len(part)), part


def _centred(points: np.ndarray, metric: str, name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Return float32 points of mean 0 and mean square 1, the mean and the root mean square."""
    mean = sum(part.sum(axis=0) for _, part in _chunks(points, metric, name)) / len(points)
    square = sum(np.square(part - mean).sum() for _, part in _chunks(points, metric))
    scale = float(np.sqrt(square / len(points))) or 1.0
    centred = np.empty(points.shape, np.float32)
    for place, part in _chunks(points, metric):
        centred[place] = (part - mean) / scale
    return centred, mean, scale


def _standardise(rows: np.ndarray, columns: np.ndarray, metric: str) -> _Problem:
    # Centring changes the costs by an amount for each row, which never matters, and one for each
    # column, which does not matter if all columns are taken.
    x, mean, scale_x = _centred(rows, metric, "x")
    y, _, scale_y = _centred(columns, metric, "y")
    unit = scale_x * scale_y * (1 if metric == "cosine" else 2)
    variance = np.sum((x.T @ x / len(x)) * (y.T @ y / len(y)))
    offset = np.concatenate(
        [
            part @ mean if metric == "cosine" else -np.square(part - mean).sum(axis=1)
            for _, part in _chunks(columns, metric)
        ]
    )
    offset = offset - offset.mean()
    if len(rows) < len(columns):
        x = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)
        y = np.concatenate([y, (offset / unit).astype(np.float32)[:, None]], axis=1)
        variance += np.var(y[:, -1])
        offset = np.zeros(())
    return _Problem(jnp.asarray(x), jnp.asarray(y), unit, offset, float(np.sqrt(variance)))


def _mean_cost(rows: np.ndarray, columns: np.ndarray, col4row: np.ndarray, metric: str) -> float:
    total = 0.0
    for place, part in _chunks(rows, metric):
        _, other = next(_chunks(columns[col4row[place]], metric))
        total += float(np.square(part - other).sum())
    return total / len(rows) / (2 if metric == "cosine" else 1)


def _improve(
    problem: _Problem,
    col4row: np.ndarray,
    known: np.ndarray | None,
    passes: int,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a better matching, if one is found, and prices."""
    n, m = len(problem.x), len(problem.y)
    prices = _first_prices(problem) if known is None else known
    if _number_of_parts(n, m, _BLOCK) == 1 and passes:
        solution = auction(-_products(problem.x, problem.y))
        return np.asarray(solution.col4row), np.asarray(solution.prices)
    wide = _number_of_parts(n, m, _WIDE)
    # Known prices are about as good as those of a first pass.
    done = 0 if known is None else 1
    eps = np.float32(_EPS[0] * problem.deviation)
    for number in range(passes if problem.deviation > 0 else 0):
        random = np.random.default_rng([seed, number])
        # Bids at the smallest eps for all columns leave nothing to be improved by bids.
        if wide > 1 or done + number < len(_EPS):
            # Between parts there is more to gain than within one: each pass is as the first, for
            # prices of other parts take longer to correct than to find.
            stage = 0 if wide > 1 else done + number
            if wide > 1:
                prices = _first_prices(problem)
            elif n < m and stage:
                # Columns that stay free must end at the lowest price, and bids lower none.
                prices = np.maximum(prices - _LOWERED * eps, 0)
            eps = np.float32(_EPS[stage] * problem.deviation)
            rows, columns = _parts(problem, col4row, wide, number, random)
            leave = np.int32(rows.shape[1] // _LEFT if stage == 0 or number == 0 else 0)
            new, raised = _run(
                _bid_in_parts, mesh, problem, rows, columns, prices[columns], eps=eps, leave=leave
            )
            col4row[rows], prices[columns] = new, raised
        blocks = _number_of_parts(n, m, _BLOCK)
        rows, columns = _parts(problem, col4row, blocks, number + 1, random)
        (col4row[rows],) = _run(_solve_blocks, mesh, problem, rows, columns)
    return col4row, prices


def _first_prices(problem: _Problem) -> np.ndarray:
    """Return prices to start from: 0, but for columns so good on average that some row will bid."""
    n, m = len(problem.x), len(problem.y)
    if n == m:
        return np.zeros(m, np.float32)
    mean = np.asarray(problem.y[:, -1])  # of a column's products, as the points are centred
    spread = np.sqrt(max(problem.deviation**2 - np.var(mean), 0)).astype(np.float32)
    return np.maximum(mean - np.sort(mean)[m - n] - 4 * spread, 0)


def _number_of_parts(n: int, m: int, size: int) -> int:
    """Return into how many problems of at most size**2 costs each to divide one of n * m."""
    return min(math.isqrt(n * m - 1) // size + 1, n)


def _parts(
    problem: _Problem, col4row: np.ndarray, parts: int, number: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Divide rows and columns into equal parts: at random or along a direction, in turn.

    Less than one row and one column for each part are left out, so that the parts are equal.

    Returns:
        Rows, int32[parts, ...], and columns, int32[parts, ...]: those of the rows, then free ones.
    """
    n, m = len(col4row), len(problem.y)
    free = np.delete(np.arange(m, dtype=np.int32), col4row)
    if number % 3 == 0:
        rows, free = random.permutation(n).astype(np.int32), random.permutation(free)
    else:
        direction = random.standard_normal(problem.x.shape[1], np.float32)
        along_y = np.asarray(problem.y @ direction)
        along = along_y[col4row] if number % 3 == 2 else np.asarray(problem.x @ direction)
        rows = np.argsort(along, kind="stable").astype(np.int32)
        free = free[np.argsort(along_y[free], kind="stable")]

    def divided(points: np.ndarray) -> np.ndarray:
        each = len(points) // parts
        begin = random.integers(len(points) - parts * each + 1)
        return points[begin : begin + parts * each].reshape(parts, each)

    rows = divided(rows)
    return rows, np.concatenate([col4row[rows], divided(free)], axis=1)


def _run(
    function: Callable[..., tuple[jax.Array, ...]],
    mesh: jax.sharding.Mesh,
    problem: _Problem,
    *parts: np.ndarray,
    **shared: np.generic,
) -> list[np.ndarray]:
    """Run a function of one part on all parts, which the devices of `mesh` share."""
    number = len(parts[0])
    filled = [
        np.concatenate([part, part[:1].repeat(-number % mesh.size, axis=0)]) for part in parts
    ]
    # An interrupt waits for the end of a call, and bids of one part take long.
    each = mesh.size if function is _bid_in_parts else len(filled[0])
    calls = []
    for begin in range(0, len(filled[0]), each):
        some = tuple(part[begin : begin + each] for part in filled)
        results = _on_devices(function, mesh)(problem.x, problem.y, some, shared)
        calls.append([np.asarray(result) for result in results])
    return [np.concatenate(results)[:number] for results in zip(*calls, strict=True)]


@lru_cache
def _on_devices(
    function: Callable[..., tuple[jax.Array, ...]], mesh: jax.sharding.Mesh
) -> Callable[..., tuple[jax.Array, ...]]:
    # Loops that run side by side go on until the slowest ends, which gains nothing on a CPU.
    blocks = function is _solve_blocks and mesh.devices.flat[0].platform != "cpu"
    size = _SIDE_BY_SIDE if blocks else None

    def each(
        x: jax.Array, y: jax.Array, parts: tuple[jax.Array, ...], shared: dict[str, jax.Array]
    ) -> tuple[jax.Array, ...]:
        return lax.map(lambda part: function(x, y, *part, **shared), parts, batch_size=size)

    specs = (P(), P(), P("part"), P())
    return jax.jit(
        jax.shard_map(each, mesh=mesh, in_specs=specs, out_specs=P("part"), check_vma=False)
    )


def _bid_in_parts(
    x: jax.Array,
    y: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    prices: jax.Array,
    *,
    eps: jax.Array,
    leave: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, y = x[rows], y[columns]
    present = jnp.arange(len(rows), dtype=jnp.int32)
    new, prices = bid(x, y, prices, present, eps=eps, leave=leave)
    return columns[_better(x, y, present, new)], prices


def _solve_blocks(
    x: jax.Array, y: jax.Array, rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array]:
    x, y = x[rows], y[columns]
    present = jnp.arange(len(rows), dtype=jnp.int32)
    new = auction(-_products(x, y)).col4row
    return (columns[_better(x, y, present, new)],)


def _better(x: jax.Array, y: jax.Array, present: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(jnp.sum(x * (y[new] - y[present])) > 0, new, present)


def _products(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y.T, precision=lax.Precision.HIGHEST)


@jax.jit
def _values(
    x: jax.Array, y: jax.Array, prices: jax.Array, col4row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the value of each row's column and of its best column."""
    held = jnp.sum(x * y[col4row], axis=1) - prices[col4row]
    return held, best_values(x, y, prices)


def _gap(problem: _Problem, col4row: np.ndarray, prices: np.ndarray) -> float:
    """Bound the mean cost's distance from the smallest by weak duality, rounding included."""
    x, y = problem.x, problem.y
    held, best = (np.asarray(v, np.float64) for v in _values(x, y, prices, col4row))
    slack = np.maximum(best - held, 0).sum()
    # A sum of D products and the points themselves are rounded, and two prices subtracted.
    longest = float(jnp.max(jnp.linalg.norm(y, axis=1)))
    norms = np.asarray(jnp.linalg.norm(x, axis=1), np.float64).sum()
    rounding = 2 * ROUNDOFF * (x.shape[1] + 6) * longest * norms
    rounding += 4 * ROUNDOFF * len(x) * float(np.abs(prices).max())
    exact = prices.astype(np.float64)
    largest = np.sort(exact)[len(exact) - len(col4row) :].sum()
    left_out = largest - exact[col4row].sum()  # no matching has columns of more
    return float(problem.unit * (slack + rounding + left_out) / len(x))
