"""``scale.py billion``: train steps on very many images, over simulated devices of one machine.

A permutation of that many int32 entries, sharded over the devices and donated from step to step,
and targets of which no row is stored. Each batch holds distinct images, drawn at random.
"""

import dataclasses
import math
import re
import resource
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, TrainState, create_state, state_shardings
from nat_jax.training import assignment_state
from nat_jax.training.checkpoint import Checkpoints
from nat_jax.training.host_matching import compile_step

BATCH = 256
DIM = 16
SIDE = 8
MOST_BYTES = 14 * 10**9


def make_state(step: Step, records: int, length: int) -> TrainState:
    """Make the first state, every array on the devices where it belongs."""

    def create() -> TrainState:
        rows = targets.initial_assignment("sphere", records, jax.random.key(1), length=length)
        return create_state(step.model, step.optimizer, rows, jax.random.key(0))

    return jax.block_until_ready(jax.jit(create, out_shardings=state_shardings(step))())


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
    """Return the largest number of bytes that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():  # unlike getrusage's, this peak does not begin with that of the parent
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def traced(function: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """Return a result, its seconds, and the bytes that Python and NumPy needed for it."""
    tracemalloc.start()
    result, taken = measure.timed(function)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, {"seconds": round(taken["seconds"], 2), "bytes": most}


def to_disk_and_back(step: Step, state: TrainState, scratch: Path | None) -> dict[str, Any]:
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
        abstract = sharding.abstract(state, state_shardings(step))
        (restored, _), taken = measure.timed(lambda: checkpoints.restore(abstract, expect={}))
        checkpoints.close()
    return {
        "seconds_standing_still": round(standing, 2),
        "seconds_to_save": round(saving, 2),
        "seconds_to_restore": round(taken["seconds"], 2),
        "bytes": size,
        "another_came_back": assignment_state.checksum(restored.assignment) != expected,
    }


def examine(records: int, steps: int, scratch: Path | None) -> dict[str, Any]:
    """Run steps, every second one matching, and check what they leave."""
    mesh = sharding.make_mesh()
    storage, length = sharding.permutation_storage("sharded", records, mesh)
    network = models.make_model(
        "convnet", dim=DIM, image_size=SIDE, frontend="sobel", widths=(8,), pools=1
    )
    step = Step(network, optim.Optimizer(0.1), mesh, block=BATCH // mesh.size, storage=storage)
    noise, _ = targets.make_targets("sphere", records, DIM, jax.random.key(2), storage="virtual")
    state, creating = measure.timed(lambda: make_state(step, records, length))
    peaks, faults = {"created": peak()}, []
    rng = np.random.default_rng(0)
    programs, memory = {}, {}
    for name, reassign in (("plain", False), ("match", True)):
        function = compile_step(step, reassign=reassign)
        programs[name] = function.lower(state, noise, draw(rng, records, step)).compile()
        found = programs[name].memory_analysis()
        memory[name] = {
            "arguments": found.argument_size_in_bytes,
            "donated": found.alias_size_in_bytes,
            "temporary": found.temp_size_in_bytes,
        }
        if (elements := largest(programs[name].as_text())) > length // mesh.size:
            faults.append(f"{name}: an array of {elements:,} elements")
    milliseconds: dict[str, list[float]] = {name: [] for name in programs}
    touched = []
    for number in range(steps):
        name = ("plain", "match")[number % 2]
        batch = draw(rng, records, step)
        touched.append(np.asarray(batch["index"]))
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(programs[name](state, noise, batch))
        milliseconds[name].append(1e3 * (time.perf_counter() - begin))
    peaks["ran"] = peak()
    images = np.unique(np.concatenate(touched))
    owned = np.asarray(jax.jit(lambda rows, i: rows[i])(state.assignment, images))
    if not np.array_equal(np.sort(owned), images):  # at first each image owned its own
        faults.append("the images that were touched own other rows than before")
    if not (moved := int(np.sum(owned != images))):
        faults.append("no image moved")
    if error := assignment_state.permutation_error(state.assignment):
        faults.append(f"not a permutation: {error}")
    state.assignment.delete()
    rows = scattered(length, step)
    error, check = traced(lambda: assignment_state.permutation_error(rows))
    if error:
        faults.append(f"a permutation is taken for none: {error}")
    _, checksum = traced(lambda: assignment_state.checksum(rows))
    peaks["checked"] = peak()
    checkpoint = to_disk_and_back(step, dataclasses.replace(state, assignment=rows), scratch)
    if checkpoint.pop("another_came_back"):
        faults.append("a checkpoint brought back another permutation")
    peaks["restored"] = peak()
    if peaks["restored"] >= MOST_BYTES:
        faults.append(f"{peaks['restored'] / 1e9:.1f} GB")
    sizes = {"records": records, "permutation_length": length, "devices": mesh.size}
    return sizes | {
        "batch": BATCH,
        "block": step.block,
        "steps": steps,
        "images_touched": int(images.size),
        "images_moved": moved,
        "seconds_to_create": round(creating["seconds"], 2),
        "step_ms": {
            name: {"median": round(statistics.median(each), 2)}
            | {"min": round(min(each), 2), "max": round(max(each), 2)}
            for name, each in milliseconds.items()
        },
        "program_bytes_a_device": memory,
        "peak_bytes": peaks,
        "check": check,
        "checksum": checksum,
        "checkpoint": checkpoint,
        "faults": faults,
    }


def show(row: dict[str, Any]) -> None:
    """Print what was measured."""
    steps = (f"{name} {row['step_ms'][name]['median']:.1f} ms" for name in row["step_ms"])
    peaks = (f"{name} {measure.size(count)}" for name, count in row["peak_bytes"].items())
    print(f"{row['records']:,} images: a step {', '.join(steps)}; memory {', '.join(peaks)}")
    print(f"  {row['images_moved']:,} of {row['images_touched']:,} touched images moved")
    for name in ("check", "checksum", "checkpoint"):
        print(f"  {name}: {row[name]}", flush=True)
