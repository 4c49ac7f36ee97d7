"""Training runs of ``ablations.py`` and ``solver_for_training.py``, one on each of some cores."""

import concurrent.futures
import json
import queue
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import measure

PROBES = {"knn": "kNN", "linear_probe": "linear", "mlp": "MLP", "mlp_probe": "MLP"}


def folder_of(scratch: Path, name: str, seed: int) -> Path:
    """Return the folder of a run."""
    return scratch / f"{re.sub(r'[^a-zA-Z0-9]+', '_', name)}-{seed}"


def train(
    variants: Mapping[str, tuple[Path, Mapping[str, Any]]],
    seeds: Sequence[int],
    scratch: Path,
    jobs: int,
) -> dict[str, list[dict[str, Any]]]:
    """Train and judge each variant with each seed; finished runs are read, others go on.

    Args:
        variants: config file and changed keys, by name.
        seeds: of each variant.
        scratch: folder of the runs.
        jobs: runs at a time, each bound to a core of its own (by ``taskset``: Linux).

    Returns:
        The results of each variant, one for each seed.
    """
    cores: queue.Queue[int] = queue.Queue()
    for core in measure.core_numbers()[:jobs]:
        cores.put(core)

    def run(name: str, seed: int) -> dict[str, Any]:
        config, keys = variants[name]
        place = folder_of(scratch, name, seed)
        place.parent.mkdir(parents=True, exist_ok=True)
        core, log = cores.get(), place.with_suffix(".log")
        command = ["taskset", "--cpu-list", str(core), sys.executable, "-m", "nat_jax.main"]
        command += [f"--config={config}", f"--workdir={place}", f"--config.seeds=({seed},)"]
        command += [f"--config.{key}={value}" for key, value in keys.items()]
        try:
            with log.open("ab") as output:
                code = subprocess.run(
                    command, stdout=output, stderr=output, env=measure.child_environment()
                ).returncode
        finally:
            cores.put(core)
        if code:
            raise SystemExit(f"{name}, seed {seed}: exit status {code}, see {log}")
        measure.log(f"{name}, seed {seed}: done")
        return json.loads((place / "results" / "pretrain.json").read_text())

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        waiting = {name: [pool.submit(run, name, seed) for seed in seeds] for name in variants}
        try:
            return {name: [each.result() for each in found] for name, found in waiting.items()}
        except BaseException:  # Ctrl-C too: what has not begun must not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def accuracies(results: Sequence[dict[str, Any]], network: str) -> dict[str, list[float]]:
    """Return the accuracies of a network, one for each seed, by "layer probe"."""
    found: dict[str, list[float]] = {}
    for row in (row for result in results for row in result["table"] if row["network"] == network):
        layer = row.get("layer", row.get("features"))
        found.setdefault(f"{layer} {row['probe']}", []).extend(row["values"])
    return found


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"
