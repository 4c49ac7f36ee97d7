"""How long a probe takes on cached features.

    python benchmarks/probes.py --output docs/results/probes.json

Features are random: a class centre and noise, rectified, float32[rows, dim] of ten classes, as a
convolution's would be. Every probe runs twice, first with what it has to compile and then without.
By default there are as many as CIFAR-10 has images, on an accelerator with 9,216 features each and
the paper's MLP for all its epochs, on a CPU with 1,024 and a smaller MLP for fewer. The patches of
``nat_jax.evaluate.patches`` are learned from and describe random images of 32 pixels. The table
says what each probe was given.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hardware
import jax
import numpy as np

from nat_jax.evaluate import FeatureSet, protocol
from nat_jax.evaluate.patches import learn_patches
from nat_jax.evaluate.probes.knn import knn_sweep
from nat_jax.evaluate.probes.linear import FITS, linear_probe
from nat_jax.evaluate.probes.mlp import mlp_probe

CLASSES = 10
KS = (1, 5, 10, 20, 50, 100, 200)
SIZES: dict[str, dict[str, int]] = {
    "cpu": {"dim": 1024, "mlp_width": 512, "mlp_epochs": 5},
    "accelerator": {"dim": 9216, "mlp_width": 4096, "mlp_epochs": 100},
}

Run = Callable[[], float | None]


def make_set(rows: int, dim: int, seed: int, part: int) -> FeatureSet:
    """Return rectified features around class centres that depend on the seed alone."""
    centres = np.random.default_rng(seed).normal(size=(CLASSES, dim)).astype(np.float32)
    rng = np.random.default_rng((seed, part))
    labels = rng.integers(0, CLASSES, rows).astype(np.int32)
    noise = rng.standard_normal((rows, dim), np.float32)
    np.multiply(noise, 10, out=noise)
    for start in range(0, rows, 1000):  # the sum of all would be a second copy
        noise[start : start + 1000] += centres[labels[start : start + 1000]]
    return FeatureSet(np.maximum(noise, 0, out=noise), labels)


def probe_runs(arguments: argparse.Namespace) -> dict[str, tuple[dict[str, Any], Run]]:
    """Return {name: (protocol, what to time)} of every probe on cached features."""
    train = make_set(arguments.rows, arguments.dim, arguments.seed, 0)
    test = make_set(arguments.test, arguments.dim, arguments.seed, 1)
    common = {"num_classes": CLASSES, "seed": arguments.seed}

    def swept() -> float:
        return knn_sweep(train, test, num_classes=CLASSES, ks=KS)[20, 0.07]

    runs: dict[str, tuple[dict[str, Any], Run]] = {
        f"knn, {len(KS)} values of k, weighted and plain": ({**protocol("knn"), "k": KS}, swept)
    }
    for fit in FITS:
        runs[f"linear_probe by {fit}"] = (
            protocol("linear_probe", {"fit": fit}),
            lambda fit=fit: linear_probe(train, test, fit=fit, **common),
        )
    mlp = {"hidden": arguments.mlp_width, "epochs": arguments.mlp_epochs}
    runs[f"mlp_probe, {mlp['hidden']} wide, {mlp['epochs']} epochs"] = (
        protocol("mlp_probe", mlp),
        lambda: mlp_probe(train, test, **mlp, **common),
    )
    return runs


def patch_runs(arguments: argparse.Namespace) -> dict[str, tuple[dict[str, Any], Run]]:
    """Return what to time of the baseline without deep learning."""
    rng = np.random.default_rng(arguments.seed)
    images = rng.integers(0, 256, (arguments.images, 32, 32, 3), np.uint8)
    batches = [images[start : start + 250] for start in range(0, len(images), 250)]
    options = {"centroids": arguments.centroids, "seed": arguments.seed}
    learned = []

    def learn() -> None:
        learned.append(learn_patches(batches, **options))

    def describe() -> None:
        for batch in batches:
            np.asarray(learned[-1](batch))

    said = {**options, "images": len(images), "pixels": 32}
    what = f"{len(images)} images, {arguments.centroids} centroids"
    return {
        f"patches learned, {what}": (said, learn),
        f"patches of images described, {what}": (said, describe),
    }


def timed(run: Run) -> tuple[float, float | None]:
    """Return seconds, and the accuracy if there is one."""
    begin = time.perf_counter()
    value = run()
    return time.perf_counter() - begin, value


def main() -> None:
    """Time every probe twice and say what was found."""
    kind = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    sizes = {"rows": 50_000, "test": 10_000, **SIZES[kind]}
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, size in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--images", type=int, default=2000, help="of the patches")
    parser.add_argument("--centroids", type=int, default=400, help="of the patches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    print(f"{arguments.rows} x {arguments.dim} features to learn on, {arguments.test} to judge")
    rows = []
    for name, (said, run) in {**probe_runs(arguments), **patch_runs(arguments)}.items():
        (first, value), (second, again) = timed(run), timed(run)
        if value != again:
            raise SystemExit(f"{name}: {value} and {again} from the same features and seed")
        rows.append(
            {"probe": name, "first": first, "second": second, "value": value, "protocol": said}
        )
        accuracy = "" if value is None else f"  accuracy {value:.3f}"
        print(f"{name:60} first {first:8.2f} s  second {second:8.2f} s{accuracy}", flush=True)
    if arguments.output:
        result = {
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "cpu": hardware.cpu(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "sizes": {name: getattr(arguments, name) for name in sizes},
            "seed": arguments.seed,
            "seconds": rows,
        }
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
