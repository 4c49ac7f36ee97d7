"""Train with exact, default and rough matchings, and compare the features.

    python benchmarks/solver_for_training.py --source arrays:PATH \
        --output docs/results/solver_for_training.json

Every arm is one command line of ``nat_jax.main``: the Fashion-MNIST config on its first images,
matched anew in every epoch so that the matching counts for as much as it can, judged by kNN and a
linear probe on z. The arms differ in ``assign.solver`` and ``assign.options`` alone: SciPy, which
is exact, the auction at its default, and the auction with an ``eps`` in units of cosine. The same
seeds are used in every arm, so that differences can be taken seed by seed; what two seeds differ by
says which of them mean something.

With ``--costs``, the folder of ``nat_costs.py``, the solvers are also timed on late costs, and the
time that a solve takes is given as a share of a training step.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nat_jax import assign
from nat_jax.cli import config_files
from nat_jax.evaluate import judge
from nat_jax.input.sources import open_source
from nat_jax.training.metrics import read_rows

ARMS: dict[str, tuple[str, dict[str, float]]] = {
    "scipy": ("scipy", {}),
    "auction": ("auction", {}),
    "auction, eps 0.05": ("auction", {"eps": 0.05}),
    "auction, eps 0.2": ("auction", {"eps": 0.2}),
}

# Options of a solver can be set on the command line only where the config file has them.
_CONFIG = """\
import runpy


def get_config():
    c = runpy.run_path({path!r})["get_config"]()
    c.assign.options.update({options!r})
    return c
"""


def first_images(source: str, count: int, folder: Path) -> str:
    """Write the first training images and all test images; return their source."""
    train, test = open_source(source, "train"), open_source(source, "test")
    parts = {"train": (train, min(count, len(train))), "test": (test, len(test))}
    arrays = {}
    for name, (records, number) in parts.items():
        chosen = [records[i] for i in range(number)]
        arrays[f"x_{name}"] = np.stack([record["image"] for record in chosen])
        arrays[f"y_{name}"] = np.asarray([record["label"] for record in chosen])
    np.savez(folder / "images.npz", **arrays)
    return f"arrays:{folder / 'images.npz'}"


def command(arm: str, source: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Return an arm's command line, its config file written."""
    solver, options = ARMS[arm]
    file = folder / f"{name_of(arm)}.py"
    path = str(config_files.packaged() / "fashion_mnist.py")
    file.write_text(_CONFIG.format(path=path, options=options))
    return [
        sys.executable,
        "-m",
        "nat_jax.main",
        f"--config={file}",
        f"--workdir={folder / name_of(arm)}",
        f"--config.data.source={source}",
        f"--config.seeds={tuple(range(arguments.seeds))}",
        f"--config.epochs={arguments.epochs}",
        f"--config.assign.solver={solver}",
        "--config.assign.reassign_every_epochs=1",
        "--config.eval.probes=('knn', 'linear_probe')",
        "--config.eval.layers=('z',)",
        "--config.eval.labels_per_class=(0,)",
    ]


def name_of(arm: str) -> str:
    """Return an arm's name as a file can have it."""
    return arm.replace(", ", "_").replace(" ", "_").replace(".", "p")


def judged(folder: Path, arm: str, seeds: int) -> dict[str, Any]:
    """Return what the runs of an arm have come to, one value for each seed."""
    found: dict[str, list[float]] = {"knn": [], "linear_probe": []}
    metrics: dict[str, list[float]] = {
        "assign/cosine_after": [],
        "assign/gap": [],
        "time/images_per_second": [],
    }
    for seed in range(seeds):
        place = folder / name_of(arm) / (f"seed-{seed}" if seeds > 1 else "")
        for row in json.loads((place / "judged.json").read_text())["rows"]:
            if row["network"] == judge.TRAINED and row["probe"] in found:
                found[row["probe"]].append(row["value"])
        rows = read_rows(place)
        for name, values in metrics.items():
            values.append(statistics.median(row[name] for row in rows[1:] if name in row))
    return {**found, **{name.partition("/")[2]: values for name, values in metrics.items()}}


def solve_ms(arm: str, costs: Path) -> float:
    """Return the CPU milliseconds of a solve on late costs, as the train step calls it."""
    solver, options = ARMS[arm]
    solve = jax.jit(lambda cost: assign.solve(cost, solver=solver, **options).col4row)
    taken = []
    with np.load(costs / "fashion_mnist_late.npz") as saved:
        problems = [jnp.asarray(-z @ t.T) for z, t in zip(saved["z"], saved["t"], strict=True)]
    for turn in range(3):
        for cost in problems:
            begin = time.process_time()
            jax.block_until_ready(solve(cost))
            taken += [1000 * (time.process_time() - begin)] * bool(turn)
    return statistics.median(taken)


def summary(arms: dict[str, dict[str, Any]]) -> str:
    """Return the table: accuracies, and how far they are from those of the exact matching."""
    lines = ["| solver | kNN % | - exact | linear % | - exact | cosine | images/s | solve ms |"]
    lines.append("|---|" + "---:|" * 7)
    exact = arms["scipy"]
    for arm, found in arms.items():
        cells = [arm]
        for probe in ("knn", "linear_probe"):
            values = [100 * value for value in found[probe]]
            differences = [v - 100 * e for v, e in zip(values, exact[probe], strict=True)]
            cells += [_spread(values), _spread(differences)]
        cells.append(f"{statistics.mean(found['cosine_after']):.4f}")
        cells.append(f"{statistics.mean(found['images_per_second']):.0f}")
        cells.append(f"{found['solve_ms']:.2f}" if "solve_ms" in found else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def main() -> None:
    """Run the arms, one after the other, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="arrays:PATH of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--epochs", type=float, default=9.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--costs", type=Path, help="folder that nat_costs.py wrote")
    parser.add_argument("--workdir", type=Path, help="for the runs; finished ones are read back")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    folder = arguments.workdir or Path(tempfile.mkdtemp(prefix="solver_for_training_"))
    folder.mkdir(parents=True, exist_ok=True)
    source = first_images(arguments.source, arguments.images, folder)
    # First, because what is wrong with the costs or a solver should not wait for the training.
    timed = {arm: solve_ms(arm, arguments.costs) for arm in ARMS} if arguments.costs else {}
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        done = subprocess.run(command(arm, source, folder, arguments))
        if done.returncode:
            sys.exit(f"{arm}: exit code {done.returncode}")
        arms[arm] = judged(folder, arm, arguments.seeds)
        if arm in timed:
            arms[arm]["solve_ms"] = round(timed[arm], 3)
        print(f"{arm}: {json.dumps(arms[arm])}", flush=True)
    print(summary(arms))
    result = {
        "benchmark": "solver_for_training",
        "images": arguments.images,
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
        "arms": arms,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
    }
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
