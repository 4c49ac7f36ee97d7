"""Train with exact, default and rough matchings, and compare the features.

    python benchmarks/solver_for_training.py --source arrays:PATH \
        --output docs/results/solver_for_training.json

Every arm is the Fashion-MNIST config on its first images, re-matched in every epoch so that the
matching counts for as much as it can, judged by kNN and a linear probe on z. The arms differ in
``assign.solver`` and ``assign.options`` alone: SciPy, which is exact, the auction at its default,
and the auction with an ``eps`` in units of cosine. All arms have the same seeds, so that
differences can be taken seed by seed; the spread over seeds shows which of them mean something.

With ``--costs``, a folder that ``assign.py --record fashion_mnist`` wrote, the solvers are also
timed on late costs.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import training_runs

from nat_jax import assign
from nat_jax.input.sources import open_source
from nat_jax.training.metrics import read_rows

ARMS: dict[str, tuple[str, dict[str, float]]] = {
    "scipy": ("scipy", {}),
    "auction": ("auction", {}),
    "auction, eps 0.05": ("auction", {"eps": 0.05}),
    "auction, eps 0.2": ("auction", {"eps": 0.2}),
}
METRICS = ("assign/cosine_after", "assign/gap", "time/images_per_second")

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
    arrays = {}
    for name, most in (("train", count), ("test", None)):
        records = open_source(source, name)
        chosen = [records[i] for i in range(len(records))[:most]]
        arrays[f"x_{name}"] = np.stack([record["image"] for record in chosen])
        arrays[f"y_{name}"] = np.asarray([record["label"] for record in chosen])
    np.savez(folder / "images.npz", **arrays)
    return f"arrays:{folder / 'images.npz'}"


def variant(arm: str, source: str, folder: Path, epochs: float) -> tuple[Path, dict[str, Any]]:
    """Return an arm's config file, which this writes, and its keys."""
    solver, options = ARMS[arm]
    file = training_runs.folder_of(folder, arm, 0).with_suffix(".py")
    path = str(measure.ROOT / "configs" / "fashion_mnist.py")
    file.write_text(_CONFIG.format(path=path, options=options))
    return file, {
        "data.source": source,
        "epochs": epochs,
        "assign.solver": solver,
        "assign.reassign_every_epochs": 1,
        "eval.probes": ("knn", "linear_probe"),
        "eval.layers": ("z",),
        "eval.labels_per_class": (0,),
    }


def found_of(results: list[dict[str, Any]], folders: list[Path]) -> dict[str, list[float]]:
    """Return accuracies, and medians of the metrics, of an arm's runs, one for each seed."""
    accuracies = training_runs.accuracies(results, "nat")
    found = {probe: accuracies[f"z {probe}"] for probe in ("knn", "linear_probe")}
    for name in METRICS:
        logged = [[row[name] for row in read_rows(folder) if name in row] for folder in folders]
        # The first row contains the time of compiling.
        found[name.partition("/")[2]] = [statistics.median(rows[1:] or rows) for rows in logged]
    return found


def solve_ms(costs: Path) -> dict[str, float]:
    """Return the CPU milliseconds of each arm's solve on late costs, as in the train step."""
    with np.load(costs / "fashion_mnist_late.npz") as saved:
        problems = [jnp.asarray(-z @ t.T) for z, t in zip(saved["z"], saved["t"], strict=True)]

    def solver_of(arm: str) -> Any:
        solver, options = ARMS[arm]
        return jax.jit(lambda cost: assign.solve(cost, solver=solver, **options).col4row)

    solvers = {arm: solver_of(arm) for arm in ARMS}
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(3):
        for cost in problems:
            for arm, solve in solvers.items():
                _, seconds = measure.timed(
                    lambda solve=solve, cost=cost: jax.block_until_ready(solve(cost))
                )
                taken[arm] += [1000 * seconds["cpu"]] * bool(turn)
    return {arm: round(statistics.median(each), 3) for arm, each in taken.items()}


def summary(arms: dict[str, dict[str, Any]]) -> str:
    """Return the table: accuracies, and their differences to those of the exact matching."""
    rows = []
    for arm, found in arms.items():
        cells = [arm]
        for probe in ("knn", "linear_probe"):
            values, exact = ([100 * v for v in each[probe]] for each in (found, arms["scipy"]))
            differences = [v - e for v, e in zip(values, exact, strict=True)]
            cells += [training_runs.spread(each, 2) for each in (values, differences)]
        cells.append(f"{statistics.mean(found['cosine_after']):.4f}")
        cells.append(f"{statistics.mean(found['images_per_second']):.0f}")
        cells.append(f"{found['solve_ms']:.2f}" if "solve_ms" in found else "")
        rows.append(cells)
    head = ["solver", "kNN %", "- exact", "linear %", "- exact", "cosine", "images/s", "solve ms"]
    return measure.table(head, rows)


def main() -> None:
    """Run the arms and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="arrays:PATH of Fashion-MNIST")
    parser.add_argument("--images", type=int, default=6_000)
    parser.add_argument("--epochs", type=float, default=9.0)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--costs", type=Path, help="folder that assign.py --record wrote")
    parser.add_argument("--workdir", type=Path, help="for the runs; finished ones are read")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    folder = options.workdir or Path(tempfile.mkdtemp(prefix="solver_for_training_"))
    folder.mkdir(parents=True, exist_ok=True)
    # First, because a fault of the costs or of a solver should not wait for the training.
    timed = solve_ms(options.costs) if options.costs else {}
    source = first_images(options.source, options.images, folder)
    variants = {arm: variant(arm, source, folder, options.epochs) for arm in ARMS}
    seeds = range(options.seeds)
    results = training_runs.train(variants, seeds, folder, jobs=1)
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        folders = [training_runs.folder_of(folder, arm, seed) for seed in seeds]
        arms[arm] = found_of(results[arm], folders)
        arms[arm] |= {"solve_ms": timed[arm]} if arm in timed else {}
    print(summary(arms))
    result = {"benchmark": "solver_for_training", **measure.environment("nat_jax", "jax", "scipy")}
    result |= {key: getattr(options, key) for key in ("images", "epochs", "seeds")}
    measure.write(options.output, result | {"arms": arms})


if __name__ == "__main__":
    main()
