"""Save the assignment problems that a training run meets: early, half-way and late.

    python benchmarks/nat_costs.py --data fashion_mnist --source arrays:PATH --output DIR
    python benchmarks/nat_costs.py --data cifar10 --source folder:PATH --output DIR --epochs 3

Trains with the config of that name, without judging, and writes ``DIR/<data>_<moment>.npz`` for
``benchmarks/assign.py --costs DIR``. A moment is some consecutive steps that re-match: the first
ones of the run ("early"), the last ones of the middle re-matching epoch ("middle") and of the last
one ("late"). The arrays, K steps of B images:

    z          float32[K, B, D]  features before the matching; its cost is -z[k] @ t[k].T
    t          float32[K, B, D]  targets that the images own then
    rows       int32[K, B]       their rows in the table of targets
    z_after    float32[K, B, D]  features of the same images one update later
    prices     float32[K, B]     what the auction's prices of these rows were when each was last
                                 matched, one re-matching epoch before, in another batch; every
                                 batch's prices less their mean; 0 for the few never matched
    rises      float32[K, B]     the same for what the auction had added to its first prices, the
                                 column means of that batch
    step, epoch, dim, cosine_before, cosine_after: scalars; the cosines are means over all steps

``prices`` and ``rises`` are missing early, where no row has been matched before.
"""

import argparse
import functools
import json
import logging
import runpy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from nat_jax import assign
from nat_jax.cli import config_files
from nat_jax.input import pipeline, transforms
from nat_jax.input.reader import ImageCache
from nat_jax.runtime import sharding
from nat_jax.targets import Targets
from nat_jax.train_step import Step, TrainState, forward
from nat_jax.training.host_matching import compile_step
from nat_jax.training.setup import Run, initial_state, open_sources, set_up


@functools.partial(jax.jit, static_argnums=0)
def features(step: Step, state: TrainState, batch: dict[str, jax.Array]) -> jax.Array:
    """Return the features of a batch as the train step of `state` computes them."""
    return forward(step.model, state, batch["image"]).features


@jax.jit
def problem(
    state: TrainState, targets: Targets, batch: dict[str, jax.Array], z: jax.Array
) -> dict[str, jax.Array]:
    """Return what the train step of `state` matches, and the auction's prices for it.

    Prices have an arbitrary constant in each batch; without their means, those of different batches
    can stand in one table.
    """
    rows = state.assignment[batch["index"]]
    t = targets.gather(rows)
    cost = -jnp.matmul(z, t.T, precision=jax.lax.Precision.HIGHEST)
    prices = assign.auction(cost).prices
    rises = prices + jnp.mean(cost, axis=0)
    new = {"prices": prices - jnp.mean(prices), "rises": rises - jnp.mean(rises)}
    return {"z": z, "t": t, "rows": rows, **{f"new_{name}": value for name, value in new.items()}}


def batches(run: Run) -> Iterator[dict[str, jax.Array]]:
    """Yield the run's batches, on the devices."""
    data = run.config.data
    stream = pipeline.train_batches(
        run.sources.train,
        transforms.train_transform(
            image_size=data.image_size, resize=data.resize, pad=data.pad, flip=data.flip
        ),
        batch_size=run.config.batch_size,
        seed=run.seed,
        start_step=0,
        num_steps=run.total_steps,
        cache=run.cache,
        threads=data.threads,
        prefetch=data.prefetch,
    )
    for batch in stream:
        used = {name: batch[name] for name in ("image", "index", "weight")}
        yield sharding.global_batch(used, run.step.mesh)


def moments(run: Run, count: int) -> dict[str, range]:
    """Return the steps of each moment: `count` consecutive ones that re-match."""
    every, length = run.config.assign.reassign_every_epochs, run.steps_per_epoch
    epochs = list(range(0, -(-run.total_steps // length), every))
    ends = [min(run.total_steps, (epoch + 1) * length) for epoch in epochs]
    if len(epochs) < 3 or count > length:
        raise SystemExit(f"{len(epochs)} re-matching epochs of {length} steps are too few")
    middle = ends[len(ends) // 2]
    return {
        "early": range(count),
        "middle": range(middle - count, middle),
        "late": range(ends[-1] - count, ends[-1]),
    }


def record(run: Run, wanted: dict[str, range], output: Path) -> None:
    """Train, and write each moment's problems as soon as they are complete."""
    name_of = {step: name for name, steps in wanted.items() for step in steps}
    tables = {name: np.zeros(len(run.sources.train), np.float32) for name in ("prices", "rises")}
    state, kept, cosines = initial_state(run), [], []
    begin = time.monotonic()
    for step, batch in enumerate(batches(run)):
        matched, found = run.reassigns(step), {}
        if matched:
            z = features(run.step, state, batch)
            found = jax.device_get(problem(state, run.targets, batch, z))
        compiled = compile_step(run.step, reassign=matched)
        state, metrics = compiled(state, run.targets, batch)
        if matched:
            rows = found["rows"]
            if step in name_of:
                known = {name: table[rows] for name, table in tables.items()}
                after = np.asarray(features(run.step, state, batch))
                kept.append({**found, **known, "z_after": after})
                cosines.append([float(metrics[f"assign/cosine_{x}"]) for x in ("before", "after")])
            for name, table in tables.items():
                table[rows] = found[f"new_{name}"]
        if kept and step + 1 not in name_of:
            write(run, name_of[step], step + 1 - len(kept), kept, cosines, output)
            kept, cosines = [], []
        if (step + 1) % run.config.log.every_steps == 0:
            loss, seconds = float(metrics["train/loss"]), time.monotonic() - begin
            print(f"step {step + 1} of {run.total_steps}, loss {loss:.3f}, {seconds:.0f} s")


def write(
    run: Run,
    moment: str,
    step: int,
    kept: list[dict[str, np.ndarray]],
    cosines: list[list[float]],
    output: Path,
) -> None:
    """Write one moment's file and say what is in it."""
    unknown = ("prices", "rises") if moment == "early" else ()
    names = [x for x in kept[0] if not x.startswith("new_") and x not in unknown]
    arrays: dict[str, Any] = {name: np.stack([batch[name] for batch in kept]) for name in names}
    before, after = np.mean(cosines, axis=0).tolist()
    said = {
        "step": step,
        "epoch": step // run.steps_per_epoch,
        "dim": run.step.model.dim,
        "cosine_before": before,
        "cosine_after": after,
    }
    path = output / f"{run.workdir.name}_{moment}.npz"
    np.savez(path, **arrays, **said)
    print(f"{path.name}: {len(kept)} batches of {kept[0]['rows'].size}, {json.dumps(said)}")


def make_config(arguments: argparse.Namespace) -> ConfigDict:
    """Return the data set's config, as long as was asked for."""
    config = runpy.run_path(str(config_files.packaged() / f"{arguments.data}.py"))["get_config"]()
    config.data.source = arguments.source
    config.epochs = arguments.epochs or config.epochs
    return config


def main() -> None:
    """Run the training and say what was saved."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", choices=("fashion_mnist", "cifar10"), required=True)
    parser.add_argument("--source", required=True, help="arrays:PATH or folder:PATH")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, help="length of the run; the config's by default")
    parser.add_argument("--batches", type=int, default=32, help="of each moment")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = make_config(arguments)
    run = set_up(
        config,
        arguments.seed,
        arguments.output / arguments.data,  # names the files; a run here writes nothing else
        mesh=sharding.make_mesh(config.mesh.data),
        sources=open_sources(config),
        cache=ImageCache(),
    )
    record(run, moments(run, arguments.batches), arguments.output)


if __name__ == "__main__":
    main()
