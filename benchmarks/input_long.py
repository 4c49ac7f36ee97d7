"""Loops of ``benchmarks/input_pipeline.py`` that run for a while: waiting for data, and memory.

Run with a JSON argument, in a process of its own; prints JSON, and what goes on to standard error.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from input_contenders import make_transform

_EVERY = 1000  # batches
_WARM = 10  # batches: the first ones are waited for, whatever comes later


def start(spec: dict[str, Any]) -> dict[str, Any]:
    """Run a loop in a fresh process and return what it found."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(spec)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    if done.returncode:
        return {"skipped": f"exit code {done.returncode}"}
    return json.loads(done.stdout)


def waiting(spec: dict[str, Any]) -> dict[str, Any]:
    """Take a batch, do nothing for as long as an accelerator's step, and so on.

    Returns:
        share: of the loop's time that went into waiting for batches; longest_ms: the longest wait.
    """
    from nat_jax.input import pipeline
    from nat_jax.input.sources import open_source

    batches: Any = pipeline.train_batches(
        open_source(spec["source"], "train"),
        make_transform("random_crop"),
        batch_size=spec["batch"],
        seed=spec["seed"],
        start_step=0,
        num_steps=_WARM + spec["steps"],
        threads=spec["threads"],
    )
    for _ in range(_WARM):
        next(batches)
        time.sleep(spec["step_seconds"])
    waits = []
    begin = time.perf_counter()
    for _ in range(spec["steps"]):
        asked = time.perf_counter()
        next(batches)
        waits.append(time.perf_counter() - asked)
        time.sleep(spec["step_seconds"])
    seconds = time.perf_counter() - begin
    return {
        "share": float(f"{sum(waits) / seconds:.3g}"),
        "longest_ms": float(f"{1000 * max(waits):.3g}"),
        "median_ms": float(f"{1000 * statistics.median(waits):.3g}"),
    }


def memory(spec: dict[str, Any]) -> dict[str, Any]:
    """Take many batches of small images, and look at the memory as it goes.

    Returns:
        rows: batches so far and resident MB of this process and of its children; the slopes are
        MB for 1,000 batches, fitted from a quarter of the way on.
    """
    from nat_jax.input import pipeline, transforms
    from nat_jax.input.sources import open_source

    source = open_source(spec["source"], "train")
    batches: Any = pipeline.train_batches(
        source,
        transforms.train_transform(image_size=32, pad=4),
        batch_size=spec["batch"],
        seed=spec["seed"],
        start_step=0,
        num_steps=spec["batches"],
        threads=spec["threads"],
        workers=spec["workers"],
    )
    rows = []
    begin = time.perf_counter()
    every = min(_EVERY, max(1, spec["batches"] // 5))
    for number, _ in enumerate(batches, 1):
        if number % every == 0:
            rows.append({"batches": number, **resident()})
            print(f"{number} batches: {rows[-1]}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begin
    settled = rows[len(rows) // 4 :]
    slopes = {}
    if len(settled) > 1:
        for key in ("main_mb", "workers_mb"):
            line = statistics.linear_regression(
                [row["batches"] / 1000 for row in settled], [row[key] for row in settled]
            )
            slopes[f"{key}_for_1000_batches"] = float(f"{line.slope:.3g}")
    return {
        "images": spec["batches"] * spec["batch"],
        "images_per_second": round(spec["batches"] * spec["batch"] / seconds),
        **slopes,
        "rows": rows,
    }


def resident() -> dict[str, float]:
    """Return the resident memory of this process and of its children, in MB."""
    workers = [
        child
        for task in Path("/proc/self/task").glob("*/children")
        for child in task.read_text().split()
    ]
    return {
        "main_mb": _resident_mb("self"),
        "workers_mb": round(sum(_resident_mb(child) for child in workers), 1),
    }


def _resident_mb(process: str) -> float:
    try:
        pages = int(Path("/proc", process, "statm").read_text().split()[1])
    except OSError:  # it has just ended
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps({"waiting": waiting, "memory": memory}[arguments["what"]](arguments)))
