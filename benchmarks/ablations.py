"""What four things in configs/modern/cifar10.py are worth: runs without them, for equal work.

    python benchmarks/ablations.py --source folder:PATH --output docs/results/ablations_cifar10.json

Trains the config on half of the images, re-matching in every epoch, then with one thing undone at a
time, for each seed, and judges all by the same probes. Equal work is an equal number of images
through the network: one view of each image has twice the epochs of two. Several runs share the
machine, one on each core; a run that is there already is read, one that was stopped goes on. Prints
a table and writes it as JSON. Linux alone (`taskset`).
"""

import argparse
import concurrent.futures
import datetime
import json
import os
import queue
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from hardware import cpu

from nat_jax.report.tables import probe_name

ROOT = Path(__file__).parents[1]
CONFIG = "configs/modern/cifar10.py"
VIEWS = 2  # of the config
# What is undone, by name.
VARIANTS: dict[str, dict[str, Any]] = {
    "nothing undone": {},
    "one view": {"data.views": 1},
    "D = 128": {"model.dim": 128},
    "matched in blocks of 32": {"assign.block": 32},
    "colours as they are": {"data.color_jitter": 0.0, "data.grey": 0.0},
}
# Re-matching in every epoch, as there are few; probes on the last convolution and z, quick ones.
COMMON: dict[str, Any] = {
    "assign.reassign_every_epochs": 1,
    "eval.probes": ("knn", "linear_probe"),
    "eval.layers": ("last_conv", "z"),
    "eval.labels_per_class": (0,),
    "eval.linear_fit": "ridge",
    "eval.max_train": 20_000,
    "eval.baselines": (),
}


def command(name: str, seed: int, options: argparse.Namespace) -> list[str]:
    """Return the command line of one run."""
    changes = VARIANTS[name]
    keys = {
        **COMMON,
        "data.source": options.source,
        "data.per_class": options.per_class,
        "epochs": options.epochs * (VIEWS / changes.get("data.views", VIEWS)),
        "seeds": (seed,),
        **changes,
    }
    return [
        sys.executable,
        "-m",
        "nat_jax.main",
        f"--config={ROOT / CONFIG}",
        f"--workdir={folder(name, seed, options)}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
    ]


def folder(name: str, seed: int, options: argparse.Namespace) -> Path:
    """Return the folder of one run."""
    plain = re.sub(r"\W+", "_", name)
    length = f"{options.per_class}x{options.epochs:g}"  # other lengths are other runs
    return options.scratch / length / f"{plain}-{seed}"


def run(name: str, seed: int, options: argparse.Namespace, cores: queue.Queue) -> dict[str, Any]:
    """Train and judge one variant on a core that is free; return its results."""
    place = folder(name, seed, options)
    place.parent.mkdir(parents=True, exist_ok=True)
    core = cores.get()
    try:
        with place.with_suffix(".log").open("ab") as log:
            code = subprocess.run(
                ["taskset", "--cpu-list", str(core), *command(name, seed, options)],
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            ).returncode
    finally:
        cores.put(core)
    if code:
        raise SystemExit(f"{name}, seed {seed}: exit {code}, see {place.with_suffix('.log')}")
    print(f"{name}, seed {seed}: done", flush=True)
    found: dict[str, Any] = json.loads((place / "results" / "pretrain.json").read_text())
    return found


def summary(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each variant, and one for the untrained network of the config."""
    first = next(iter(results))
    rows = [_row("untrained", "untrained", results[first])]
    return rows + [_row(name, "nat", found) for name, found in results.items()]


def _row(name: str, network: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return {"name": ..., "conv4 knn": {"values": one of each seed, "mean", "std"}, ...}."""
    scores: dict[str, list[float]] = {}
    for result in found:
        for row in result["table"]:
            if row["network"] == network:
                scores.setdefault(f"{row['features']} {row['probe']}", []).extend(row["values"])
    return {
        "name": name,
        **{
            key: {
                "values": values,
                "mean": statistics.fmean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
            }
            for key, values in scores.items()
        },
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the table, in percent."""
    columns = [key for key in rows[0] if key != "name"]
    words = (key.split() for key in columns)
    heads = [f"{layer}, {probe_name(probe)}" for layer, probe in words]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        cells = [
            f"{100 * row[key]['mean']:.1f}"
            + ("" if row[key]["std"] is None else f" ± {100 * row[key]['std']:.1f}")
            for key in columns
        ]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", required=True, help="images, as data.source")
    parser.add_argument("--per-class", type=int, default=2500, help="images to train on")
    parser.add_argument("--epochs", type=float, default=3.0, help="of the config")
    parser.add_argument("--seeds", default="0,1", help="separated by commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one on each core")
    parser.add_argument("--scratch", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    cores: queue.Queue[int] = queue.Queue()
    for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
        cores.put(core)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        waiting = {
            name: [pool.submit(run, name, seed, options, cores) for seed in seeds]
            for name in VARIANTS
        }
        try:
            results = {name: [each.result() for each in found] for name, found in waiting.items()}
        except BaseException:  # Ctrl-C too: what has not begun shall not
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    rows = summary(results)
    written = {
        "config": CONFIG,
        "per_class": options.per_class,
        "epochs": options.epochs,
        "seeds": seeds,
        "variants": VARIANTS,
        "common": COMMON,
        "run": next(iter(results.values()))[0]["run"],
        "protocol": next(iter(results.values()))[0]["protocol"],
        "cpu": cpu(),
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    options.output.write_text(json.dumps(written, indent=1) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
