"""What ``input_pipeline.py --files`` runs: opening and using a folder of many images.

    python benchmarks/input_loops.py JSON

runs one of ``PROGRAMS``, named by ``program`` in the JSON, in this process and prints JSON.
"""

import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import measure

Spec = dict[str, Any]


def opening(spec: Spec) -> Spec:
    """Open a folder and do nothing else."""
    from nat_jax.input.sources import open_source

    source, taken = measure.timed(lambda: open_source(spec["source"], "train"))
    _, read = measure.timed(lambda: source[0])
    return {"open_seconds": taken["seconds"], "first_record_seconds": read["seconds"]}


def using(spec: Spec) -> Spec:
    """Open a folder and use it as training does; return time and memory at every point."""
    begin = time.perf_counter()
    import grain  # noqa: F401  # batches need it, and should not pay for it
    import numpy as np

    from nat_jax.input import pipeline, transforms
    from nat_jax.input.sources import open_source

    points: dict[str, dict[str, float]] = {}

    def point(name: str, **more: float) -> None:
        nonlocal begin
        seconds = round(time.perf_counter() - begin, 4)
        status = Path("/proc/self/status").read_text()
        own, mapped = (
            round(int(status.partition(f"{key}:")[2].split()[0]) / 1000, 1)
            for key in ("RssAnon", "RssFile")
        )
        points[name] = {"seconds": seconds, **more, "own": own, "mapped": mapped}
        begin = time.perf_counter()

    point("libraries imported")
    source = open_source(spec["source"], "train")
    count = len(source)
    point("opened", records=count)
    seen = np.zeros(count, np.uint8)
    steps = pipeline.steps_per_epoch(count, spec["batch"])
    for batch in pipeline.train_batches(
        source,
        transforms.train_transform(image_size=32),
        batch_size=spec["batch"],
        seed=spec["seed"],
        start_step=0,
        num_steps=steps,
        threads=spec["threads"],
    ):
        seen[batch["index"]] += 1
    once = bool(seen.max() == 1 and seen.sum() == steps * spec["batch"])
    point("an epoch of batches", images=steps * spec["batch"])
    again = pickle.loads(pickle.dumps(source))  # as worker processes get it
    same = again.fingerprint == source.fingerprint and again[count - 1] == source[count - 1]
    checks = {"batches visit no record twice": once, "pickling keeps the records": same}
    return {"points": points, "checks": checks}


PROGRAMS = {"opening": opening, "using": using}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(json.dumps(PROGRAMS[arguments["program"]](arguments)))
