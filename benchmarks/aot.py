"""Compile the solvers for accelerators that are not there, and count what a round costs them.

    python benchmarks/aot.py --platform all --output docs/results/aot.json

Needs no accelerator, only the compilers: `pip install 'jax[cuda12]'` for GPUs, `pip install libtpu`
for TPUs (each is skipped, with a line, where it is missing). Compiles the auction, the Pallas
program of one launch, and the matching of a train step over 16 devices. Prints for each: the
operations (on a GPU: launches) in one iteration of the innermost loops, the collectives inside any
loop, the temporary memory of a device, and, where `ptxas` is installed, the registers and spilled
bytes of the Pallas program. Nothing runs, so nothing is timed. The exit status is 1 if something
did not compile or a loop holds a collective: devices whose loops end at different times would wait
for each other. A control, a batch of loops over the devices under plain jit, must have some.

``--gpus`` and ``--programs`` select some of the GPUs and of the programs, by parts of their names.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin looks for a driver
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud about the machine
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import argparse
import dataclasses
import functools
import importlib.util
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import collectives_read as reading
import jax
import jax.numpy as jnp
import measure
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax import assign, models, optim
from nat_jax.assign import _kernel
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, apply_matching, build_costs, solve_sharded


class Gpu(NamedTuple):
    """A GPU's description for the compiler; sizes in bytes."""

    capability: tuple[int, int]
    cores: int
    lanes: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2: int
    shared_per_core: int


GPUS = {
    "H200": Gpu((9, 0), 132, 128, 1.98, 150 * 10**9, 4800 * 10**9, 50 * 2**20, 228 * 2**10),
    "A100": Gpu((8, 0), 108, 64, 1.41, 80 * 10**9, 2039 * 10**9, 40 * 2**20, 164 * 2**10),
    "L4": Gpu((8, 9), 58, 128, 2.04, 24 * 10**9, 300 * 10**9, 48 * 2**20, 100 * 2**10),
}


def description(name: str) -> str:
    """Return the text that XLA reads."""
    gpu = GPUS[name]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {1536 if gpu.capability == (8, 9) else 2048}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {gpu.shared_per_core - 1024}
  shared_memory_per_core: {gpu.shared_per_core} l2_cache_size: {gpu.l2}
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {gpu.bandwidth} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


@dataclasses.dataclass(frozen=True)
class Program:
    """A function of arrays, and their shapes; ``split`` ones are split over the devices."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    split: bool = False
    control: bool = False  # must have collectives in its loops


def solver_programs() -> Iterator[Program]:
    """Yield the auction as users call it."""
    for shape in ((256, 256), (32, 256, 256), (1024, 1024)):
        cost = jax.ShapeDtypeStruct(shape, jnp.float32)
        yield Program(f"auction {_times(shape)}", assign.auction, (cost,))


def kernel_programs() -> Iterator[Program]:
    """Yield the Pallas program, alone and as a part of the auction."""
    for shape in ((256, 256), (300, 300), (1024, 1024), (32, 256, 256), (208, 300, 300)):
        *batch, _, m = shape
        function: Callable[..., Any] = jax.vmap(_kernel.solve) if batch else _kernel.solve
        sizes = (shape, (*batch, m), (*batch, 4), batch, batch)
        types = (jnp.float32, jnp.float32, jnp.float32, jnp.int32, jnp.float32)
        arguments = tuple(map(jax.ShapeDtypeStruct, map(tuple, sizes), types))
        yield Program(f"Pallas program {_times(shape)}", function, arguments)
        auction = functools.partial(assign.auction, kernel=True)
        yield Program(f"auction with it {_times(shape)}", auction, arguments[:1])


def step_programs(mesh: Mesh) -> Iterator[Program]:
    """Yield the matching of the train step: a block of the batch on each device."""
    model = models.make_model("convnet", dim=64, image_size=32, frontend="sobel", pools=2)
    blocks, b = mesh.size, 256
    step = Step(model, optim.Optimizer(0.1), mesh, block=b)
    rows = jax.ShapeDtypeStruct((blocks * b,), jnp.int32)
    weight = jax.ShapeDtypeStruct((blocks * b,), jnp.float32)
    features = jax.ShapeDtypeStruct((blocks * b, 64), jnp.float32)
    arguments = (features, features, rows, weight)

    def match(
        z: jax.Array, batch_targets: jax.Array, rows: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        cost = build_costs(step, z, batch_targets, weight)
        return apply_matching(step, z, rows, cost, solve_sharded(step, cost))

    yield Program(f"match of a step {blocks}x{b}", match, arguments, split=True)
    x = jax.ShapeDtypeStruct((blocks, b), jnp.float32)
    yield Program("control: plain jit", _loops_in_lock_step, (x,), split=True, control=True)


def _loops_in_lock_step(x: jax.Array) -> jax.Array:
    def double(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.max(x) < 1, lambda x: 2 * x, x)

    return jax.vmap(double)(x)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def examine(target: str, program: Program, mesh: Mesh, capability: tuple[int, int] | None) -> dict:
    """Compile a program for the devices of a mesh; return what is known of the result."""
    where = NamedSharding(mesh, P("data") if program.split else P())
    arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in program.arguments]
    row = {"target": target, "program": program.name, "devices": mesh.size}
    row |= {"control": program.control}
    is_kernel = program.name.startswith("Pallas")
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump} if is_kernel else {}
        begin = time.monotonic()
        try:
            lowered = jax.jit(program.function).lower(*arguments)
            compiled = lowered.compile(compiler_options=options)
        except Exception as error:  # a refusal of any kind is a result
            return row | {"compiled": False, "error": f"{type(error).__name__}: {error}"[:500]}
        seconds = time.monotonic() - begin
        machine_code = assemble(Path(dump), capability) if is_kernel and capability else {}
    text = compiled.as_text()
    found = reading.loops(text)
    innermost = [[each["source"], each["operations"]] for each in found if each["innermost"]]
    return row | {
        "compiled": True,
        "seconds": round(seconds, 1),
        "loops": len(found),
        "operations_per_round": max((count for _, count in innermost), default=0),
        "collectives_in_loops": sum(loop["collectives"] for loop in found),
        "operations": sum(opcode not in reading.FREE for opcode, _ in reading.entry(text)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        **machine_code,
        "innermost_loops": innermost,
    }


def assemble(dump: Path, capability: tuple[int, int]) -> dict:
    """Assemble the kernel's PTX; return its registers and spilled bytes, {} without ptxas."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    tools = [path for folder in folders or () for path in Path(folder).glob("*/bin/ptxas")]
    sources = [path for path in dump.glob("*.ptx") if ".entry auction" in path.read_text()]
    if not tools or not sources:
        return {}
    arch = "sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else "")
    command = [tools[0], "-v", f"--gpu-name={arch}", sources[0], "-o", dump / "out"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "spilled_bytes": r"(\d+) bytes spill stores"}
    found = {name: re.search(pattern, report) for name, pattern in patterns.items()}
    return {name: int(match[1]) for name, match in found.items() if match}


def devices_of(kind: str, rest: str) -> Sequence[Any]:
    """Return devices that are not there: of "tpu", "v5e:4x4" or of "cuda", "H200:2x8"."""
    if kind == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=rest).devices
    name, _, shape = rest.partition(":")
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=description(name),
        topology=f"1x{shape}",
    ).devices


def missing(kind: str) -> str:
    """Return the package to install for a kind of device, "" if its compiler is there."""
    if kind == "tpu":
        return "" if importlib.util.find_spec("libtpu") else "libtpu"
    try:
        plugins = (f"jax_plugins.xla_cuda{version}" for version in (12, 13))
        there = any(importlib.util.find_spec(plugin) for plugin in plugins)
    except ModuleNotFoundError:
        there = False
    return "" if there else f"jax[cuda12]=={jax.__version__}"


def jobs(kind: str, gpus: Sequence[str]) -> Iterator[tuple[str, Program, Mesh, Any]]:
    """Yield target, program, mesh and compute capability of all that is compiled."""
    if kind == "tpu":
        mesh = sharding.make_mesh(devices=devices_of("tpu", "v5e:4x4"))
        for program in (*solver_programs(), *step_programs(mesh)):
            yield "TPU v5e", program, mesh, None
        return
    for name in gpus:
        one, many = (
            sharding.make_mesh(devices=devices_of("cuda", f"{name}:{shape}"))
            for shape in ("1x1", "2x8")
        )
        for program in (*solver_programs(), *kernel_programs()):
            yield name, program, one, GPUS[name].capability
        for program in step_programs(many):
            yield name, program, many, GPUS[name].capability


def show(row: dict) -> None:
    """Print a row."""
    if not row["compiled"]:
        print(f"{row['target']:8} {row['program']:27} did not compile: {row['error']}", flush=True)
        return
    print(
        f"{row['target']:8} {row['program']:27} {row['loops']:6} {row['operations_per_round']:9} "
        f"{row['operations']:7} {row['collectives_in_loops']:6} "
        f"{row['temporary_bytes'] / 1024:9.0f} {row.get('registers', ''):>9} "
        f"{row.get('spilled_bytes', ''):>8} {row['seconds']:9}",
        flush=True,
    )


def main() -> None:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--platform", choices=("cuda", "tpu", "all"), default="all")
    parser.add_argument("--gpus", type=measure.words, default=list(GPUS), help="H200, A100, L4")
    parser.add_argument("--programs", type=measure.words, default=[""], help="parts of names")
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    rows: list[dict] = []
    print(f"{'target':8} {'program':27} {'loops':>6} {'per round':>9} {'in all':>7} {'coll.':>6}"
          f" {'temp KiB':>9} {'registers':>9} {'spilled':>8} {'compile s':>9}")  # fmt: skip
    for kind in ("cuda", "tpu") if options.platform == "all" else (options.platform,):
        if package := missing(kind):
            print(f"{kind}: skipped, its compiler is missing: pip install '{package}'")
            continue
        for target, program, mesh, capability in jobs(kind, options.gpus):
            if any(part in program.name for part in options.programs):
                rows.append(examine(target, program, mesh, capability))
                show(rows[-1])
    packages = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
    result = {"benchmark": "aot", **measure.environment(*packages), "rows": rows}
    measure.write(options.output, result)
    measure.finish([
        f"{row['target']}, {row['program']}"
        for row in rows
        if not row["compiled"] or bool(row["collectives_in_loops"]) != row["control"]
    ])  # fmt: skip


if __name__ == "__main__":
    main()
