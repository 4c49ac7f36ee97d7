"""Compile the ImageNet step for many devices, and list what they send each other and need to hold.

    python benchmarks/collectives.py --output docs/results/collectives.json

Nothing runs. The step is that of configs/alexnet.py (224 pixels, D = 2048): plain, matching on the
devices, and matching on the hosts. It is compiled for 8 and 512 simulated CPU devices, and for
accelerators that are not there: a v5e:2x4 and a v5e:16x16 of TPUs (`pip install libtpu`) and 2 x 8
H200s (`pip install 'jax[cuda12]'`); these are skipped, with a line, where their compiler is
missing. Batches are the paper's 256 images, matched as a whole, and 256 images a device, matched in
blocks of 256; the data set is ImageNet, and a billion images on 512 devices.

The exit status is 1 if a step exchanges what it should not: gradients more or less than once, more
sums over channels than batch norm needs, features or rows when it does not match, anything as large
as the data set, anything unknown, anything in a loop. Writes a table beside the JSON. Each target
is compiled in a process of its own; --targets names some of them, and those that the output already
has stay in it.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aot
import collectives_table
import jax
import jax.numpy as jnp
import numpy as np
from collectives_read import Collective, Sizes, in_loops, read, touched
from jax.experimental import topologies
from jax.sharding import Mesh

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state, state_shardings
from nat_jax.training.host_matching import HostStep, compile_step

ROOT = Path(__file__).resolve().parents[1]
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


def imagenet_step(mesh: Mesh, records: int, batch: int, variant: str) -> Problem:
    """Return the step of configs/alexnet.py on a mesh, for another data set or batch."""
    sys.path.insert(0, str(ROOT / "configs"))
    import alexnet

    config = alexnet.get_config()
    network = models.make_model(
        config.model.name,
        dim=config.model.dim,
        image_size=config.data.image_size,
        frontend=config.model.frontend,
        dtype=config.model.dtype,
        platform={"cuda": "gpu"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform),
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
            step.model, step.optimizer, jnp.zeros(records, jnp.int32), jax.random.key(0)
        )
    )
    side = step.model.image_size
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, side, side, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((batch,), np.int32),
        "weight": jax.ShapeDtypeStruct((batch,), np.float32),
    }
    sizes = Sizes.of(
        state,
        batch=batch,
        dim=step.model.dim,
        block=step.block,
        devices=step.mesh.shape["data"],
    )
    return Problem(
        step,
        sharding.abstract(state, state_shardings(step)),
        sharding.abstract(noise, sharding.replicated(step.mesh)),
        sharding.abstract(shapes, sharding.of_batch(step.mesh)),
        sizes,
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
    first = _compile("ahead", function.ahead.lower, arguments, options)
    yield first
    posed = sharding.abstract(first.lowered.out_info, first.program.output_shardings)
    blocks, b, _ = posed.cost.shape
    mesh = given.step.mesh
    said = jax.ShapeDtypeStruct((mesh.size, blocks, b + 3), np.int32)
    said = sharding.abstract(said, sharding.over_all(mesh))
    labels = {name: given.batch[name] for name in ("index", "weight")}
    arguments = (given.state, given.noise, labels, posed, said)
    yield _compile("behind", function.behind.lower, arguments, options)


def _compile(
    name: str, lower: Callable[..., Any], arguments: tuple, options: dict[str, Any] | None
) -> Compiled:
    begin = time.monotonic()
    lowered = lower(*arguments)
    program = lowered.compile(options)
    return Compiled(name, round(time.monotonic() - begin, 1), lowered, program)


def measure(given: Problem, *, reassign: bool, apart: dict[str, str] | None = None) -> dict:
    """Compile a step; return its collectives, its memory, and what is wrong with them.

    Of each program: the collectives as they are joined, the bytes that a device needs and those
    that its operations touch, and the floating-point operations of all devices, where JAX knows
    them (on CPUs).

    Args:
        given: the step.
        reassign: whether it matches its batch anew.
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
        programs.append({
            "name": compiled.name,
            "seconds": compiled.seconds,
            "collectives": len(joined),
            "bytes": _memory(compiled.program),
            "touched": touched(compiled.program.as_text()),
            "operations": (compiled.lowered.cost_analysis() or {}).get("flops"),
        })  # fmt: skip
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


def _memory(program: Any) -> dict[str, int]:
    """Return the bytes that a device needs; arguments that are donated count once."""
    memory = program.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
    }
    return parts | {"all": sum(parts.values())}


def mesh_of(target: str) -> Mesh:
    """Return a mesh of a target's devices along "data"."""
    kind, _, rest = target.partition(":")
    if kind == "cpu":
        return sharding.make_mesh()
    if kind == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name=rest).devices
    else:
        name, _, shape = rest.partition(":")
        (gpu,) = [each for each in aot.GPUS if each.name == name]
        devices = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            target_config=gpu.description(),
            topology=f"1x{shape}",
        ).devices
    # as they come: to place them along the wires changes no byte and no program
    return sharding.make_mesh(devices=devices)


def compile_target(target: str) -> None:
    """Compile all of a target's steps and print a line of JSON for each."""
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = mesh_of(target)
    apart = APART if target.startswith("cuda") else None
    for records, batch in TARGETS[target]:
        for variant in VARIANTS:
            batch = batch or BLOCK * mesh.size
            given = imagenet_step(mesh, records, batch, variant)
            row = {
                "target": target,
                "devices": mesh.size,
                "records": records,
                "batch": batch,
                "block": given.step.block or batch,
                "permutation": given.step.storage,
                "variant": variant,
            }
            row |= measure(given, reassign=variant != "plain", apart=apart)
            print(json.dumps(row), flush=True)


def rows_of(target: str) -> list[dict]:
    """Compile a target's steps in a process of its own."""
    kind, _, count = target.partition(":")
    flags = f"--xla_force_host_platform_device_count={count}" if kind == "cpu" else ""
    environment = os.environ | {"XLA_FLAGS": flags, "NPROC": "16"}
    command = [sys.executable, __file__, "--compile", target]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        rows = []
        for line in process.stdout:
            if line.startswith("{"):
                rows.append(json.loads(line))
                print(collectives_table.line(rows[-1]), flush=True)
    if process.returncode:
        raise SystemExit(f"{target}: the compiling process ended with {process.returncode}")
    return rows


def main() -> None:
    """Compile the targets and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--compile", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_target(arguments.compile)
        return
    rows: dict[str, list[dict]] = {}
    if arguments.output and arguments.output.exists():
        for row in json.loads(arguments.output.read_text())["rows"]:
            rows.setdefault(row["target"], []).append(row)
    for target in arguments.targets:
        kind = target.partition(":")[0]
        if kind != "cpu" and (package := aot.missing(kind)):
            print(f"{target}: skipped, its compiler is missing: pip install '{package}'")
            continue
        rows[target] = rows_of(target)
        if arguments.output:
            _write(arguments.output, [row for name in TARGETS for row in rows.get(name, ())])
    faults = [(row, fault) for name in rows for row in rows[name] for fault in row["faults"]]
    for row, fault in faults:
        print(f"FAILED: {row['target']}, {row['batch']} images, {row['variant']}: {fault}")
    sys.exit(bool(faults))


def _write(path: Path, rows: list[dict]) -> None:
    result = {
        "benchmark": "collectives",
        "versions": aot.versions(),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
    }
    head = json.dumps(result, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n')
    path.with_suffix(".md").write_text(collectives_table.page(rows))


if __name__ == "__main__":
    main()
