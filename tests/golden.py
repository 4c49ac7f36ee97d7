"""Short trainings whose results are kept in `golden/`, so that a refactoring cannot change them.

    python tests/golden.py

trains again and renews the files, for a change that is meant to change results;
``python tests/golden.py --to FOLDER CASE...`` writes some cases elsewhere.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).parent / "golden"
STEPS = 12  # one epoch with re-matching, of 11 steps, and a step of the next

# Overrides of configs/smoke.py. Supervised training has one output for each class.
CASES: dict[str, dict[str, Any]] = {
    "table": {"targets.storage": "table"},
    "virtual": {"targets.storage": "virtual"},
    "basis": {"targets.kind": "basis"},
    "supervised_square": {"targets.kind": "labels", "model.dim": 10},
    "supervised_softmax": {
        "targets.kind": "labels",
        "model.dim": 10,
        "optim.loss": "softmax",
    },
    "two_views": {"data.views": 2},
    "host": {"assign.placement": "host"},
}
EIGHT_DEVICES = "eight_devices"  # the case "table" on a mesh of 8 devices

# A new process with 8 simulated devices; with fewer optimisations its programs compile sooner.
EIGHT_DEVICES_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "NPROC": "16",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


class Outcome(NamedTuple):
    """What a training gives: losses of each step, rows int32[N], features float32[16, D]."""

    losses: list[float]
    rows: Any
    features: Any


def train(case: str, workdir: Path) -> Outcome:
    """Train for 12 steps and return what a refactoring must not change."""
    import jax
    import numpy as np

    from nat_jax import config as configs
    from nat_jax import models
    from nat_jax.input.sources import open_source
    from nat_jax.train import train_and_evaluate
    from nat_jax.training import metrics

    config = smoke_config(CASES.get(case, CASES["table"]))
    state = train_and_evaluate(config, workdir)
    losses = [row["train/loss"] for row in metrics.read_rows(workdir) if "train/loss" in row]
    model = models.make_model(**configs.model_arguments(config), platform="cpu")
    test = open_source("digits", "test")
    images = np.stack(
        [np.broadcast_to(test[i]["image"].reshape(8, 8, -1), (8, 8, 3)) for i in range(16)]
    )
    weights = jax.device_get((state.params, state.batch_stats))
    features = jax.jit(lambda x: model.apply(*weights, x)[0]["z"])(images)
    return Outcome(losses, np.asarray(state.assignment), np.asarray(features))


def smoke_config(overrides: Mapping[str, Any]) -> Any:
    """Return configs/smoke.py, 12 steps long, with some other values."""
    sys.path.insert(0, str(ROOT / "configs"))
    try:
        import smoke
    finally:
        sys.path.pop(0)
    config = smoke.get_config()
    config.epochs, config.steps = 0.0, STEPS
    config.log.every_steps = 1
    config.checkpoint.every_epochs, config.checkpoint.every_steps = 0.0, STEPS
    config.eval.every_epochs = 0
    config.eval.probes, config.eval.layers, config.eval.baselines = ("knn",), ("z",), ()
    config.eval.labels_per_class = (0,)
    config.update_from_flattened_dict(overrides)
    return config


def alexnet_shapes() -> dict[str, list[int]]:
    """Return the shape of every parameter and statistic of AlexNet's state."""
    import jax

    from nat_jax import config as configs
    from nat_jax import models

    sys.path.insert(0, str(ROOT / "configs"))
    try:
        import alexnet
    finally:
        sys.path.pop(0)
    model = models.make_model(**configs.model_arguments(alexnet.get_config()), platform="cpu")
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": stats})
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}


def machine() -> dict[str, str]:
    """Return what the last bits of a result depend on."""
    import jaxlib

    lines = [platform.processor()]
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        wanted = ("vendor_id", "cpu family", "model\t", "model name", "flags")
        text = cpuinfo.read_text().split("\n\n")[0]
        lines = [line for line in text.splitlines() if line.startswith(wanted)]
    return {
        "jaxlib": jaxlib.__version__,
        "processor": " ".join(" ".join(lines).split()),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        **({"x64": "on"} if os.environ.get("JAX_ENABLE_X64", "0") != "0" else {}),
    }


def save(case: str, folder: Path) -> None:
    """Train and write ``CASE.npz``."""
    import numpy as np

    with tempfile.TemporaryDirectory() as workdir:
        outcome = train(case, Path(workdir))
    folder.mkdir(exist_ok=True)
    np.savez_compressed(
        folder / f"{case}.npz",
        machine=json.dumps(machine()),
        losses=np.asarray(outcome.losses),
        rows=outcome.rows.astype(np.int16),
        features=outcome.features,
    )


def save_in_process(cases: Iterable[str], folder: Path) -> None:
    """Train in a new process, with XLA's default settings or on the case's 8 devices."""
    cases = list(cases)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if cases == [EIGHT_DEVICES]:
        environment |= EIGHT_DEVICES_ENVIRONMENT
    command = [sys.executable, __file__, "--to", str(folder), *cases]
    subprocess.run(command, env=environment, check=True)


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--to"]:
        for case in arguments[2:]:
            save(case, Path(arguments[1]))
        return
    save_in_process(CASES, FOLDER)
    save_in_process([EIGHT_DEVICES], FOLDER)
    (FOLDER / "alexnet.json").write_text(json.dumps(alexnet_shapes(), indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main(sys.argv[1:])
