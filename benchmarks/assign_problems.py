"""The problems of ``benchmarks/assign.py``: families of random costs, and what training meets.

With F the features, T the targets, both unit rows of dimension 128, g standard normal of length
about sqrt(128), and cost = -F T^T where nothing else is said:

    sphere          F uniform on the sphere: nothing in common with T
    near-collapsed  F = unit(mu + 0.1 g / sqrt(128)): features near one direction mu, as those of an
                    untrained network are
    half-way        F = unit(T_permuted + 4 g / sqrt(128)): the permutation is partly the optimum
    clustered       F = unit(centre + 0.5 g / sqrt(128)), ten centres: features that know classes
    matched         F = unit(T_permuted + 1 g / sqrt(128)): every feature near its own target
    uniform         costs uniform in [0, 1)
    integers        costs uniform in 0, ..., 100: many ties
    quantised       sphere, rounded to 0, ..., 100,000
    Machol-Wien     cost[i, j] = (i + 1) (j + 1), the worst case of shortest-path solvers

The first five are the ones that count (``FEATURES``). A problem of them comes with a similar one,
whose features have been moved by 0.1 in random directions: its prices are a warm start.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

FEATURES = ("sphere", "near-collapsed", "half-way", "clustered", "matched")
OTHERS = ("uniform", "integers", "quantised", "Machol-Wien")
MOMENTS = ("early", "middle", "late")
_DIM = 128
_MOVED = 0.1


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem, or one batch of them.

    Attributes:
        cost: float32[n, n] or float32[k, n, n].
        similar: costs of the same shape, whose solution's prices are a warm start.
        starts: prices float32[n] or float32[k, n] by the name of this warm start.
    """

    cost: np.ndarray
    similar: np.ndarray | None = None
    starts: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
    """Problems of one kind and one shape, made when they are needed.

    Attributes:
        family: the kind.
        n: rows of each problem.
        count: problems in a batch; 0 for single problems.
        make: returns the problem of a seed.
        seeds: how many of them there are.
    """

    family: str
    n: int
    count: int
    make: Callable[[int], Problem]
    seeds: int

    @property
    def shape(self) -> str:
        """The shape as it is written in tables: "256" or "32x256"."""
        return f"{self.count}x{self.n}" if self.count else str(self.n)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _noise(rng: np.random.Generator, n: int, size: float) -> np.ndarray:
    return size / np.sqrt(_DIM) * rng.standard_normal((n, _DIM))


def _features(family: str, rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    n = len(targets)
    if family == "sphere":
        return _unit(rng.standard_normal((n, _DIM)))
    if family == "near-collapsed":
        return _unit(_unit(rng.standard_normal(_DIM)) + _noise(rng, n, 0.1))
    if family == "clustered":
        centres = _unit(rng.standard_normal((10, _DIM)))
        return _unit(centres[rng.integers(0, 10, n)] + _noise(rng, n, 0.5))
    size = {"half-way": 4.0, "matched": 1.0}[family]
    return _unit(targets[rng.permutation(n)] + _noise(rng, n, size))


def _one(family: str, n: int, seed: int) -> Problem:
    """Return the single problem of a family."""
    names = (*FEATURES, *OTHERS)
    rng = np.random.default_rng([seed, n, names.index(family)])
    if family == "uniform":
        return Problem(rng.random((n, n), np.float32))
    if family == "integers":
        return Problem(rng.integers(0, 101, (n, n)).astype(np.float32))
    if family == "Machol-Wien":
        steps = np.arange(1, n + 1)
        return Problem(np.outer(steps, steps).astype(np.float32))
    targets = _unit(rng.standard_normal((n, _DIM)))
    features = _features("sphere" if family == "quantised" else family, rng, targets)
    cost = -features @ targets.T
    if family == "quantised":
        return Problem(np.round(1e5 * (cost - cost.min()) / np.ptp(cost)).astype(np.float32))
    moved = _unit(features + _noise(rng, n, _MOVED))
    return Problem(cost.astype(np.float32), (-moved @ targets.T).astype(np.float32))


def _stack(problems: list[Problem]) -> Problem:
    similar = [problem.similar for problem in problems if problem.similar is not None]
    return Problem(
        np.stack([problem.cost for problem in problems]), np.stack(similar) if similar else None
    )


def synthetic(family: str, n: int, count: int, seeds: int) -> Case:
    """Return the case of a family."""

    def make(seed: int) -> Problem:
        if not count:
            return _one(family, n, seed)
        return _stack([_one(family, n, 1000 * seed + k) for k in range(100, 100 + count)])

    return Case(family, n, count, make, seeds)


@functools.cache
def _saved(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _cost(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -features @ np.swapaxes(targets, -1, -2)


def _from_training(path: Path, n: int, count: int, apart: int, seed: int) -> Problem:
    """Return a problem that a training run met; of several batches joined if n is larger."""
    saved = _saved(path)
    need = (count or 1) * n // saved["rows"].shape[1]
    where = slice(seed * apart * need, (seed * apart + 1) * need)
    lead = (count, n) if count else (n,)
    z, after, t = (saved[name][where].reshape(*lead, -1) for name in ("z", "z_after", "t"))
    starts = {
        name: saved[name][where].reshape(*lead) for name in ("prices", "rises") if name in saved
    }
    cost = _cost(z, t)
    if "rises" in starts:
        starts["rises"] = starts["rises"] - cost.mean(axis=-2)
    return Problem(cost, _cost(after, t), starts)


def from_training(folder: Path, n: int, count: int, seeds: int) -> Iterator[Case]:
    """Yield the cases of the files that ``benchmarks/nat_costs.py`` wrote, by data and moment."""
    paths = [path for moment in MOMENTS for path in folder.glob(f"*_{moment}.npz")]
    for path in sorted(paths, key=lambda path: path.stem.rpartition("_")[0]):
        data, _, moment = path.stem.rpartition("_")
        batches, batch = _saved(path)["rows"].shape
        there = batches * batch // ((count or 1) * n) if n % batch == 0 else 0
        if there:
            used = min(seeds, there)
            make = functools.partial(_from_training, path, n, count, there // used)
            yield Case(f"{data} {moment}", n, count, make, used)
