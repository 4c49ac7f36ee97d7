"""The problems of ``assign.py``: families of random costs, and costs recorded during training.

With F the features, T the targets, both unit rows of dimension 128, g standard normal of length
about sqrt(128), and cost = -F T^T unless stated otherwise:

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

The first five are the main ones (``FEATURES``).
"""

import argparse
import dataclasses
import functools
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np

FEATURES = ("sphere", "near-collapsed", "half-way", "clustered", "matched")
OTHERS = ("uniform", "integers", "quantised", "Machol-Wien")
MOMENTS = ("early", "middle", "late")
_DIM = 128


@dataclasses.dataclass(frozen=True)
class Case:
    """Problems of one kind and one shape, made when they are needed.

    Attributes:
        family: the kind.
        n: rows of each problem.
        count: problems in a batch; 0 for single problems.
        make: returns the costs of a seed, float32[n, n] or float32[k, n, n].
        seeds: the number of problems.
    """

    family: str
    n: int
    count: int
    make: Callable[[int], np.ndarray]
    seeds: int

    @property
    def shape(self) -> str:
        """The shape as written in tables: "256" or "32x256"."""
        return f"{self.count}x{self.n}" if self.count else str(self.n)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _noise(rng: np.random.Generator, n: int, length: float) -> np.ndarray:
    return length / np.sqrt(_DIM) * rng.standard_normal((n, _DIM))


def _features(family: str, rng: np.random.Generator, targets: np.ndarray) -> np.ndarray:
    n = len(targets)
    if family == "sphere":
        return _unit(rng.standard_normal((n, _DIM)))
    if family == "near-collapsed":
        return _unit(_unit(rng.standard_normal(_DIM)) + _noise(rng, n, 0.1))
    if family == "clustered":
        centres = _unit(rng.standard_normal((10, _DIM)))
        return _unit(centres[rng.integers(0, 10, n)] + _noise(rng, n, 0.5))
    length = {"half-way": 4.0, "matched": 1.0}[family]
    return _unit(targets[rng.permutation(n)] + _noise(rng, n, length))


def _one(family: str, n: int, seed: int) -> np.ndarray:
    """Return the costs of a single problem of a family."""
    rng = np.random.default_rng([seed, n, (*FEATURES, *OTHERS).index(family)])
    if family == "uniform":
        return rng.random((n, n), np.float32)
    if family == "integers":
        return rng.integers(0, 101, (n, n)).astype(np.float32)
    if family == "Machol-Wien":
        steps = np.arange(1, n + 1)
        return np.outer(steps, steps).astype(np.float32)
    targets = _unit(rng.standard_normal((n, _DIM)))
    features = _features("sphere" if family == "quantised" else family, rng, targets)
    cost = -features @ targets.T
    if family == "quantised":
        cost = np.round(1e5 * (cost - cost.min()) / np.ptp(cost))
    return cost.astype(np.float32)


def synthetic(family: str, n: int, count: int, seeds: int) -> Case:
    """Return the case of a family."""

    def make(seed: int) -> np.ndarray:
        if not count:
            return _one(family, n, seed)
        return np.stack([_one(family, n, 1000 * seed + k) for k in range(100, 100 + count)])

    return Case(family, n, count, make, seeds)


@functools.cache
def _saved(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in ("z", "t")}


def _recorded(path: Path, n: int, count: int, apart: int, seed: int) -> np.ndarray:
    """Return recorded costs; several batches are joined if n is larger than a batch."""
    saved = _saved(path)
    need = (count or 1) * n // saved["z"].shape[1]
    start = seed * apart * need
    lead = (count, n) if count else (n,)
    z, t = (saved[name][start : start + need].reshape(*lead, -1) for name in ("z", "t"))
    return -z @ np.swapaxes(t, -1, -2)


def recorded(folder: Path, n: int, count: int, seeds: int) -> Iterator[Case]:
    """Yield the cases of the files that ``record`` wrote, by data set and moment."""
    paths = [path for moment in MOMENTS for path in folder.glob(f"*_{moment}.npz")]
    for path in sorted(paths, key=lambda path: path.stem.rpartition("_")[0]):
        data, _, moment = path.stem.rpartition("_")
        batches, batch, _ = _saved(path)["z"].shape
        there = batches * batch // ((count or 1) * n) if n % batch == 0 else 0
        if there:
            used = min(seeds, there)
            make = functools.partial(_recorded, path, n, count, there // used)
            yield Case(f"{data} {moment}", n, count, make, used)


def record(arguments: argparse.Namespace) -> None:
    """Train a packaged config without judging, and save problems that its steps match.

    Writes ``DIR/<config>_<moment>.npz`` with z and t, each float32[K, B, D], for K consecutive
    re-matching steps: the first of the run ("early"), the last of the middle re-matching epoch
    ("middle") and of the last one ("late"). The cost of step k is -z[k] @ t[k].T.
    """
    import jax

    from nat_jax import config as configs
    from nat_jax.input import pipeline
    from nat_jax.input.reader import ImageCache
    from nat_jax.runtime import sharding
    from nat_jax.training.host_matching import compile_step
    from nat_jax.training.setup import initial_state, open_sources, set_up

    path = measure.ROOT / "configs" / f"{arguments.record}.py"
    config = runpy.run_path(str(path))["get_config"]()
    config.data.source = arguments.source
    config.epochs = arguments.epochs or config.epochs
    run = set_up(
        config,
        0,
        arguments.costs / arguments.record,
        mesh=sharding.make_mesh(config.mesh.data),
        sources=open_sources(config),
        cache=ImageCache(),
    )
    stream = pipeline.train_batches(
        run.sources.train,
        configs.train_transform(config),
        batch_size=config.batch_size,
        seed=run.seed,
        start_step=0,
        num_steps=run.total_steps,
        cache=run.cache,
        threads=config.data.threads,
    )

    @jax.jit
    def features(state: Any, image: jax.Array) -> jax.Array:
        key = jax.random.fold_in(state.key, state.step)  # as in the train step
        return run.step.model.apply(state.params, state.batch_stats, image, train=True, key=key)[0][
            "z"
        ]

    moment_of = _moments(run, arguments.moment)
    kept: dict[str, list[tuple[Any, Any]]] = {moment: [] for moment in MOMENTS}
    state = initial_state(run)
    for number, host in enumerate(stream):
        used = {name: host[name] for name in ("image", "index", "weight")}
        batch = sharding.global_batch(used, run.step.mesh)
        if moment := moment_of.get(number):
            t = run.targets.gather(state.assignment[batch["index"]])
            kept[moment].append(jax.device_get((features(state, batch["image"]), t)))
        step = compile_step(run.step, reassign=run.reassigns(number))
        state, metrics = step(state, run.targets, batch)
        if (number + 1) % config.log.every_steps == 0:
            print(f"step {number + 1} of {run.total_steps}: {float(metrics['train/loss']):.3f}")
    arguments.costs.mkdir(parents=True, exist_ok=True)
    for moment, pairs in kept.items():
        z, t = (np.stack(each) for each in zip(*pairs, strict=True))
        np.savez(arguments.costs / f"{arguments.record}_{moment}.npz", z=z, t=t)


def _moments(run: Any, count: int) -> dict[int, str]:
    """Return the moment of each step that is saved."""
    every, length = run.config.assign.reassign_every_epochs, run.steps_per_epoch
    epochs = list(range(0, -(-run.total_steps // length), every))
    ends = [min(run.total_steps, (epoch + 1) * length) for epoch in epochs]
    if len(epochs) < 3 or count > length:
        raise SystemExit(f"{len(epochs)} re-matching epochs of {length} steps are too few")
    starts = {"early": 0, "middle": ends[len(ends) // 2] - count, "late": ends[-1] - count}
    return {start + k: moment for moment, start in starts.items() for k in range(count)}
