"""``scale.py collectives``: compile the ImageNet step for many devices, list what they exchange.

Nothing runs. The step is that of configs/alexnet.py (224 pixels, D = 2048): plain, matching on the
devices, and matching on the hosts. It is compiled for simulated CPU devices and for accelerators
that are not there. Batches are the paper's 256 images, matched as one problem, and 256 images a
device, matched in blocks of 256; the data set is ImageNet, and a billion images on 512 devices.
"""

import json
import runpy
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import aot
import collectives_read as reading
import jax
import jax.numpy as jnp
import measure
import numpy as np
from collectives_read import Collective, Sizes, bytes_of, in_loops, read
from jax.sharding import Mesh

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state, state_shardings
from nat_jax.training.host_matching import HostStep, compile_step

IMAGENET = 1_281_167
BILLION = 10**9
BLOCK = 256

# What is compiled for each target: data set and images a batch, 0 for 256 a device.
TARGETS: dict[str, tuple[tuple[int, int], ...]] = {
    "cpu:8": ((IMAGENET, 256), (IMAGENET, 0)),
    "cpu:512": ((IMAGENET, 0), (BILLION, 0)),
    "tpu:v5e:2x4": ((IMAGENET, 256),),
    "tpu:v5e:16x16": ((IMAGENET, 0),),
    "cuda:H200:2x8": ((IMAGENET, 256), (IMAGENET, 0)),
}
VARIANTS = ("plain", "match on devices", "match on hosts")
COLUMNS = {
    "gradients": (reading.GRADIENT,),
    "sums over channels": (reading.CHANNELS,),
    "features, target rows": (reading.FEATURES,),
    "indices, rows, solutions, weights": (reading.INTEGERS, reading.SOLUTION, reading.WEIGHTS),
    "single numbers": (reading.SCALARS,),
}

# Leaves each array in a collective of its own; GPU programs string them together without a shape.
APART = {
    f"xla_gpu_{kind}_combine_threshold_bytes": "0"
    for kind in ("all_reduce", "all_gather", "reduce_scatter")
}


class Problem(NamedTuple):
    """A step and the shapes of its arguments."""

    step: Step
    state: Any
    noise: targets.Targets
    batch: dict[str, jax.ShapeDtypeStruct]
    sizes: Sizes


class Compiled(NamedTuple):
    """A program, before and after the compiler."""

    name: str
    seconds: float
    lowered: jax.stages.Lowered
    program: jax.stages.Compiled


def imagenet_step(mesh: Mesh, records: int, batch: int, variant: str, *, tiny: bool) -> Problem:
    """Return the step of configs/alexnet.py, or of a tiny network, on a mesh."""
    config = runpy.run_path(str(measure.ROOT / "configs" / "alexnet.py"))["get_config"]()
    if tiny:
        config.model.name, config.model.dim, config.data.image_size = "convnet", 64, 32
    platform = mesh.devices.flat[0].platform
    network = models.make_model(
        config.model.name,
        dim=config.model.dim,
        image_size=config.data.image_size,
        frontend=config.model.frontend,
        dtype=config.model.dtype,
        platform={"cuda": "gpu"}.get(platform, platform),
    )
    storage, length = sharding.permutation_storage(config.assign.storage, records, mesh)
    step = Step(
        network,
        optim.Optimizer(config.optim.learning_rate),
        mesh,
        block=None if batch == config.batch_size else BLOCK,
        placement="host" if variant == "match on hosts" else "device",
        storage=storage,
    )
    noise, _ = targets.make_targets(
        config.targets.kind,
        records,
        network.dim,
        jax.random.key(0),
        storage=config.targets.storage,
        sharding=sharding.over_data(mesh),
    )
    return problem(step, noise, records=length, batch=batch)


def problem(step: Step, noise: targets.Targets, *, records: int, batch: int) -> Problem:
    """Return a step with the shapes of its arguments.

    Args:
        step: the settings.
        noise: virtual targets.
        records: entries of the permutation.
        batch: B.
    """
    state = jax.eval_shape(
        lambda: create_state(
            step.model, step.optimizer, jnp.zeros(records, jnp.int32), jax.random.key(0), step.scope
        )
    )
    side = step.model.image_size
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((batch,), np.int32),
        "weight": jax.ShapeDtypeStruct((batch,), np.float32),
    }
    devices = step.mesh.shape["data"]
    return Problem(
        step,
        sharding.abstract(state, state_shardings(step)),
        sharding.abstract(noise, sharding.replicated(step.mesh)),
        sharding.abstract(shapes, sharding.batch_shardings(step.mesh)),
        Sizes.of(state, batch=batch, dim=step.model.dim, block=step.block, devices=devices),
    )


def compile_all(
    given: Problem, *, reassign: bool, options: dict[str, Any] | None = None
) -> Iterator[Compiled]:
    """Compile the programs of a step."""
    function = compile_step(given.step, reassign=reassign)
    arguments = (given.state, given.noise, given.batch)
    if not isinstance(function, HostStep):
        yield _compile("step", function.lower, arguments, options)
        return
    first = _compile("pre_match", function.pre_match.lower, arguments, options)
    yield first
    matching = sharding.abstract(first.lowered.out_info, first.program.output_shardings)
    blocks, b, _ = matching.cost.shape
    mesh = given.step.mesh
    solutions = jax.ShapeDtypeStruct((mesh.size, blocks, b + 3), np.int32)
    solutions = sharding.abstract(solutions, sharding.over_all(mesh))
    labels = {name: given.batch[name] for name in ("index", "weight")}
    arguments = (given.state, given.noise, labels, matching, solutions)
    yield _compile("post_match", function.post_match.lower, arguments, options)


def _compile(
    name: str, lower: Callable[..., Any], arguments: tuple, options: dict[str, Any] | None
) -> Compiled:
    begin = time.monotonic()
    lowered = lower(*arguments)
    program = lowered.compile(options)
    return Compiled(name, round(time.monotonic() - begin, 1), lowered, program)


def examine(given: Problem, *, reassign: bool, apart: dict[str, str] | None = None) -> dict:
    """Compile a step; return its collectives, its memory, and what is wrong with them.

    Args:
        given: the step.
        reassign: whether it matches its batch.
        apart: the compiler's options with which each array has a collective of its own, if that is
            not so anyway.
    """
    found: list[Collective] = []
    faults, programs = [], []
    for compiled in compile_all(given, reassign=reassign):
        text = compiled.program.as_text()
        joined = read(text, given.sizes)
        if apart:
            text = compiled.lowered.compile(apart).as_text()
        collectives = read(text, given.sizes)
        if abs(sum(each.bytes for each in collectives) - sum(each.bytes for each in joined)) > 1024:
            faults.append(f"{compiled.name}: other bytes are sent when collectives are joined")
        if count := in_loops(text):
            faults.append(f"{compiled.name}: {count} collectives in loops")
        found += collectives
        memory = compiled.program.memory_analysis()
        needed = {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,  # donated: once
            "temporary": memory.temp_size_in_bytes,
        }
        row = {"name": compiled.name, "seconds": compiled.seconds, "collectives": len(joined)}
        programs.append(row | {"bytes": needed | {"all": sum(needed.values())}})
    faults += given.sizes.faults(
        found,
        reassign=reassign,
        sharded=given.step.storage == "sharded",
        halves=len(programs) > 1,
    )
    return {
        "faults": faults,
        "sent": round(sum(each.sent for each in found)),
        "programs": programs,
        "collectives": [
            {
                "kind": each.kind,
                "devices": each.devices,
                "bytes": each.bytes,
                "source": each.source,
                "parts": [[part.carries, part.dtype, list(part.shape)] for part in each.parts],
            }
            for each in found
        ],
    }


def compile_target(target: str, *, tiny: bool) -> Iterator[dict]:
    """Compile all of a target's steps; yield a row for each."""
    jax.config.update("jax_enable_compilation_cache", False)
    kind, _, rest = target.partition(":")
    # The order of devices changes no byte and no program.
    mesh = sharding.make_mesh(devices=None if kind == "cpu" else aot.devices_of(kind, rest))
    for records, batch in TARGETS[target]:
        for variant in VARIANTS:
            batch = batch or BLOCK * mesh.size
            given = imagenet_step(mesh, records, batch, variant, tiny=tiny)
            row = {"target": target, "devices": mesh.size, "records": records, "batch": batch}
            row |= {"block": given.step.block or batch, "permutation": given.step.storage}
            apart = APART if kind == "cuda" else None
            yield row | {
                "variant": variant,
                **examine(given, reassign=variant != "plain", apart=apart),
            }


def rows_of(target: str, *, tiny: bool) -> list[dict]:
    """Compile a target's steps in a process of its own; [] where its compiler is missing."""
    kind, _, count = target.partition(":")
    if kind != "cpu" and (package := aot.missing(kind)):
        print(f"{target}: skipped, its compiler is missing: pip install '{package}'")
        return []
    flags = f"--xla_force_host_platform_device_count={count}" if kind == "cpu" else ""
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": "16"}
    rows = []
    arguments = ("collectives", "--child", target, *["--tiny"] * tiny)
    for row in measure.run_child("scale.py", *arguments, **variables):
        rows.append(row)
        print(f"{target}, {row['records']:,} images, {', '.join(_cells(row))}", flush=True)
    return rows


def memory_of(row: dict) -> int:
    """Return the bytes that a device needs, in the program that needs most."""
    return max(program["bytes"]["all"] for program in row["programs"])


def carried(row: dict, names: Iterable[str]) -> tuple[int, int]:
    """Return the number of arrays of some sorts that a step exchanges, and their bytes."""
    sizes = [
        bytes_of(dtype, shape)
        for each in row["collectives"]
        for name, dtype, shape in each["parts"]
        if name in names
    ]
    return len(sizes), sum(sizes)


def _cells(row: dict) -> list[str]:
    cells = [f"{row['batch']:,}", f"{row['block']:,}", row["variant"]]
    cells.append(str(sum(program["collectives"] for program in row["programs"])))
    for names in COLUMNS.values():
        count, size = carried(row, names)
        cells.append(f"{count} x: {measure.size(size)}" if count else "")
    return [*cells, measure.size(row["sent"]), measure.size(memory_of(row))]


def page(rows: list[dict]) -> str:
    """Return the page of all steps."""
    head = ["devices", "images", "batch", "block", "step", "collectives", *COLUMNS]
    head += ["sent by each device", "memory of a device"]
    cells = ([row["target"], f"{row['records']:,}", *_cells(row)] for row in rows)
    return f"""# What the devices of a pod exchange

Read from compiled programs by `python benchmarks/scale.py collectives --output
docs/results/collectives.json`; nothing ran. The step is that of `configs/alexnet.py`. A cell is the
number of arrays and the bytes of the global arrays. "Sent" is by each device and step, if every
exchange is a ring; memory includes parameters, the batch and temporary arrays. A step that matches
on the hosts is two programs: its collectives are those of both, its memory that of the larger one.
[`collectives.json`](collectives.json) has every collective.

{measure.table(head, cells)}"""


def run(
    chosen: Iterable[str], before: Iterable[dict], *, tiny: bool
) -> tuple[list[dict], list[str]]:
    """Compile targets; return the rows, with those of other targets from before, and the faults."""
    rows: dict[str, list[dict]] = {}
    for row in before:
        rows.setdefault(row["target"], []).append(row)
    for target in chosen:
        rows[target] = rows_of(target, tiny=tiny) or rows.get(target, [])
    every = [row for name in TARGETS for row in rows.get(name, ())]
    faults = [
        f"{row['target']}, {row['batch']} images, {row['variant']}: {fault}"
        for row in every
        for fault in row["faults"]
    ]
    return every, faults


def child(target: str, *, tiny: bool) -> None:
    """Print a row of JSON for each of a target's steps."""
    for row in compile_target(target, tiny=tiny):
        print(json.dumps(row), flush=True)
