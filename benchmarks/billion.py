"""Train steps on a billion images, over 8 simulated devices on one machine.

    python benchmarks/billion.py --output docs/results/billion.json

The images are noise and the network is tiny. What is real is all that grows with the data set: a
permutation of a billion int32 entries, sharded over the devices and donated from step to step, and
targets of which no row is stored. Each batch holds distinct images, drawn at random. Prints the
time of a step, plain and matching; the most memory that the process needed; what the check of a
checkpoint's permutation takes; and how long the state takes to a disk and back. The exit status is
1 if

* an array in a compiled step is larger than a device's share of the permutation,
* the images that were touched do not own the same rows among them as before,
* the whole is no longer a permutation,
* a checkpoint brings back another one,
* or the process needed 14 GB or more.

With smaller --records it does the same in seconds; several are run one after the other. The
checkpoint, 4 bytes an image, is written to --scratch and removed.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import re
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEVICES = 8
# Before jax starts: it reads these once. Fewer threads than devices may deadlock.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = str(2 * DEVICES)
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import hardware  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

from nat_jax import models, optim, targets  # noqa: E402
from nat_jax.runtime import sharding  # noqa: E402
from nat_jax.train_step import Step, TrainState, create_state, state_shardings  # noqa: E402
from nat_jax.training import assignment_state  # noqa: E402
from nat_jax.training.checkpoint import Checkpoints  # noqa: E402
from nat_jax.training.host_matching import compile_step  # noqa: E402

BATCH = 256
BLOCK = BATCH // DEVICES
DIM = 16
SIDE = 8
MOST_BYTES = 14 * 10**9


def make_step(records: int) -> tuple[Step, int]:
    """Return the settings of a step, and how long the permutation is."""
    mesh = sharding.make_mesh()
    storage, length = sharding.permutation_storage("sharded", records, mesh)
    network = models.make_model(
        "convnet", dim=DIM, image_size=SIDE, frontend="sobel", widths=(8,), pools=1
    )
    step = Step(network, optim.Optimizer(0.1), mesh, block=BLOCK, storage=storage)
    return step, length


def make_state(step: Step, records: int, length: int) -> TrainState:
    """Make the first state, every array where it lives."""

    def create() -> TrainState:
        rows = targets.initial_assignment("sphere", records, jax.random.key(1), length=length)
        return create_state(step.model, step.optimizer, rows, jax.random.key(0))

    return jax.jit(create, out_shardings=state_shardings(step))()


def draw(rng: np.random.Generator, records: int, step: Step) -> dict[str, jax.Array]:
    """Draw a batch of distinct images."""
    batch = {
        "image": rng.integers(0, 256, (BATCH, SIDE, SIDE, 3), np.uint8),
        "index": rng.choice(records, BATCH, replace=False).astype(np.int32),
        "weight": np.ones(BATCH, np.float32),
    }
    return sharding.global_batch(batch, step.mesh)


def largest(program: str) -> int:
    """Return the elements of the largest array that a compiled program mentions."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def rows_of(state: TrainState, images: np.ndarray) -> np.ndarray:
    """Return the rows that some images own."""
    return np.asarray(jax.jit(lambda rows, i: rows[i])(state.assignment, images.astype(np.int32)))


def scattered(length: int, step: Step) -> jax.Array:
    """Return a permutation like that of a long training: neighbours own rows far apart."""
    factor = int(length * 0.618) | 1
    while math.gcd(factor, length) > 1:
        factor += 2

    split, parts = sharding.over_data(step.mesh), []
    for device, index in split.addressable_devices_indices_map((length,)).items():
        start, stop, _ = index[0].indices(length)
        rows = np.empty(stop - start, np.int32)
        for at in range(start, stop, 2**20):  # a 64-bit copy of a block at a time
            images = np.arange(at, min(at + 2**20, stop), dtype=np.int64)
            rows[at - start : at - start + images.size] = images * factor % length
        parts.append(jax.device_put(rows, device, may_alias=False).block_until_ready())
    return jax.make_array_from_single_device_arrays((length,), split, parts)


def peak() -> int:
    """Return the most bytes that this process has needed."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak does not begin with that of the parent
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, int]:
    """Return a result, its seconds, and the bytes that Python and NumPy needed for it."""
    tracemalloc.start()
    begin = time.perf_counter()
    result = function(*arguments)
    seconds = time.perf_counter() - begin
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, seconds, most


def to_disk_and_back(step: Step, state: TrainState, scratch: Path | None) -> dict:
    """Save a state and restore it; deletes its permutation in between.

    Returns:
        The seconds that training stands still for a save, those until it is on disk, those of
        restoring; the bytes on disk; and whether another permutation came back.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        checkpoints, path = Checkpoints(Path(folder)), Path(folder)
        expected = assignment_state.checksum(state.assignment)
        begin = time.perf_counter()
        checkpoints.save(1, state, {})
        standing = time.perf_counter() - begin
        checkpoints.wait()
        saving = time.perf_counter() - begin
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        state.assignment.delete()
        begin = time.perf_counter()
        restored, _ = checkpoints.restore(
            sharding.abstract(state, state_shardings(step)), expect={}
        )
        restoring = time.perf_counter() - begin
        checkpoints.close()
    return {
        "seconds_standing_still": round(standing, 2),
        "seconds_to_save": round(saving, 2),
        "seconds_to_restore": round(restoring, 2),
        "bytes": size,
        "another_came_back": assignment_state.checksum(restored.assignment) != expected,
    }


def measure(records: int, steps: int, scratch: Path | None) -> dict:
    """Run steps, every second one matching, and check what they leave."""
    step, length = make_step(records)
    noise, _ = targets.make_targets("sphere", records, DIM, jax.random.key(2), storage="virtual")
    begin = time.perf_counter()
    state = jax.block_until_ready(make_state(step, records, length))
    creating, created = time.perf_counter() - begin, peak()
    rng = np.random.default_rng(0)
    programs, memory, faults = {}, {}, []
    for reassign in (False, True):
        name = "match" if reassign else "plain"
        lowered = compile_step(step, reassign=reassign).lower(
            state, noise, draw(rng, records, step)
        )
        programs[name] = lowered.compile()
        found = programs[name].memory_analysis()
        memory[name] = {
            "arguments": found.argument_size_in_bytes,
            "donated": found.alias_size_in_bytes,
            "temporary": found.temp_size_in_bytes,
        }
        if (size := largest(programs[name].as_text())) > length // DEVICES:
            faults.append(f"{name}: an array of {size:,} elements")
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    touched = []
    for number in range(steps):
        name = ("plain", "match")[number % 2]
        batch = draw(rng, records, step)
        touched.append(np.asarray(batch["index"]))
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(programs[name](state, noise, batch))
        seconds[name].append(time.perf_counter() - begin)
    ran = peak()
    images = np.unique(np.concatenate(touched))
    owned = rows_of(state, images)
    if not np.array_equal(np.sort(owned), images):  # at first each image owned its own
        faults.append("the images that were touched own other rows than before")
    if not (moved := int(np.sum(owned != images))):
        faults.append("no image moved")
    if flaw := assignment_state.flaw(state.assignment):
        faults.append(f"not a permutation: {flaw}")
    state.assignment.delete()
    rows = scattered(length, step)
    flaw, checking, checking_bytes = timed(assignment_state.flaw, rows)
    if flaw:
        faults.append(f"a permutation is taken for none: {flaw}")
    _, summing, summing_bytes = timed(assignment_state.checksum, rows)
    checked = peak()
    kept = to_disk_and_back(step, dataclasses.replace(state, assignment=rows), scratch)
    if kept.pop("another_came_back"):
        faults.append("a checkpoint brought back another permutation")
    if (most := peak()) >= MOST_BYTES:
        faults.append(f"{most / 1e9:.1f} GB")
    return {
        "records": records,
        "permutation_length": length,
        "devices": DEVICES,
        "batch": BATCH,
        "block": BLOCK,
        "steps": steps,
        "images_touched": int(images.size),
        "images_moved": moved,
        "seconds_to_create": round(creating, 2),
        "step_ms": {
            name: {"median": round(1e3 * statistics.median(each), 2)}
            | {"min": round(1e3 * min(each), 2), "max": round(1e3 * max(each), 2)}
            for name, each in seconds.items()
        },
        "program_bytes_a_device": memory,
        "peak_bytes": {"created": created, "ran": ran, "checked": checked, "restored": most},
        "check": {"seconds": round(checking, 2), "bytes": checking_bytes},
        "checksum": {"seconds": round(summing, 2), "bytes": summing_bytes},
        "checkpoint": kept,
        "faults": faults,
    }


def show(row: dict) -> None:
    """Print what was measured."""
    plain, match = (row["step_ms"][name]["median"] for name in ("plain", "match"))
    print(
        f"{row['records']:,} images on {row['devices']} devices: a step takes {plain:.1f} ms, "
        f"matching {match:.1f} ms; {row['images_moved']:,} of {row['images_touched']:,} touched "
        f"images moved\n"
        f"  memory at most {row['peak_bytes']['ran'] / 1e9:.2f} GB, "
        f"{row['peak_bytes']['checked'] / 1e9:.2f} GB with the check, "
        f"{row['peak_bytes']['restored'] / 1e9:.2f} GB with a checkpoint\n"
        f"  a permutation: {row['check']['seconds']:.1f} s and "
        f"{row['check']['bytes'] / 1e6:.0f} MB to prove; its checksum: "
        f"{row['checksum']['seconds']:.1f} s and {row['checksum']['bytes'] / 1e6:.0f} MB\n"
        f"  a checkpoint of {row['checkpoint']['bytes'] / 1e9:.2f} GB: "
        f"{row['checkpoint']['seconds_standing_still']:.1f} s of standing still, saved after "
        f"{row['checkpoint']['seconds_to_save']:.1f} s, restored in "
        f"{row['checkpoint']['seconds_to_restore']:.1f} s",
        flush=True,
    )
    for fault in row["faults"]:
        print(f"FAILED: {fault}", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[10**7, 10**8, 10**9])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--scratch", type=Path, help="where checkpoints go, 4 bytes an image")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for records in sorted(arguments.records):  # the peak is that of the process
        rows.append(measure(records, arguments.steps, arguments.scratch))
        show(rows[-1])
    if arguments.output:
        result = {
            "benchmark": "billion",
            "rows": rows,
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores, {hardware.cpu()}",
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
