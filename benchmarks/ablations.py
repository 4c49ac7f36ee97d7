"""Measure what four choices in configs/modern/cifar10.py are worth, by runs without them.

    python benchmarks/ablations.py --source folder:PATH --output docs/results/ablations_cifar10.json

Trains the config on half of the images, re-matching in every epoch, then with one choice undone at
a time, for each seed, and judges all by the same probes. All do equal work, an equal number of
images through the network: one view of each image has twice the epochs of two. Several runs share
the machine, one on each core; a finished run is read, one that was stopped goes on.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import measure
import training_runs

CONFIG = "configs/modern/cifar10.py"
VIEWS = 2  # of the config
# What is undone, by name.
VARIANTS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "one view": {"data.views": 1},
    "D = 128": {"model.dim": 128},
    "matched in blocks of 32": {"assign.block": 32},
    "colours as they are": {"data.color_jitter": 0.0, "data.grayscale": 0.0},
}
# Re-matching in every epoch, as there are few; quick probes on the last convolution and z.
COMMON: dict[str, Any] = {
    "assign.reassign_every_epochs": 1,
    "eval.probes": ("knn", "linear_probe"),
    "eval.layers": ("last_conv", "z"),
    "eval.labels_per_class": (0,),
    "eval.linear_fit": "ridge",
    "eval.max_train": 20_000,
    "eval.baselines": (),
}


def keys_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of a variant."""
    changes = VARIANTS[name]
    given = {"data.source": options.source, "data.per_class": options.per_class}
    epochs = options.epochs * (VIEWS / changes.get("data.views", VIEWS))
    return {**COMMON, **given, "epochs": epochs, **changes}


def summary(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each variant, and one for the untrained network of the config."""
    networks = {"untrained": ("untrained", results[next(iter(results))])}
    networks |= {name: ("nat", found) for name, found in results.items()}
    return [
        {
            "name": name,
            **{
                key: {
                    "values": values,
                    "mean": statistics.fmean(values),
                    "std": statistics.stdev(values) if len(values) > 1 else None,
                }
                for key, values in training_runs.accuracies(found, network).items()
            },
        }
        for name, (network, found) in networks.items()
    ]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table, in percent."""
    columns = [key for key in rows[0] if key != "name"]
    head = [f"{layer}, {training_runs.PROBES[probe]}" for layer, probe in map(str.split, columns)]
    cells = [
        [
            row["name"],
            *(training_runs.spread([100 * v for v in row[key]["values"]], 1) for key in columns),
        ]
        for row in rows
    ]
    return measure.table(["", *head], cells)


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="images, as data.source")
    parser.add_argument("--per-class", type=int, default=2500, help="images to train on")
    parser.add_argument("--epochs", type=float, default=3.0, help="of the config")
    parser.add_argument("--seeds", type=measure.words, default=["0", "1"], help="comma-separated")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one on each core")
    parser.add_argument("--scratch", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds]
    config = measure.ROOT / CONFIG
    scratch = options.scratch / f"{options.per_class}x{options.epochs:g}"
    variants = {name: (config, keys_of(name, options)) for name in VARIANTS}
    results = training_runs.train(variants, seeds, scratch, options.jobs)
    rows = summary(results)
    first = results[next(iter(results))][0]
    written = {"benchmark": "ablations", **measure.environment("nat_jax", "jax"), "config": CONFIG}
    written |= {"per_class": options.per_class, "epochs": options.epochs, "seeds": seeds}
    written |= {"variants": VARIANTS, "common": COMMON, "rows": rows}
    written |= {key: first[key] for key in ("run", "protocol") if key in first}
    measure.write(options.output, written)
    print(markdown(rows))


if __name__ == "__main__":
    main()
