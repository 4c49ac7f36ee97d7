"""Compile the solvers for accelerators that are not there, and count what a round costs them.

    python benchmarks/aot.py --platform all --output docs/results/aot.json

Needs no accelerator, only the compilers: `pip install 'jax[cuda12]'` for GPUs, `pip install libtpu`
for TPUs (each is skipped, with a line, where it is missing). Compiles the auction, the Pallas
program of one launch, and the matching of a train step over 16 devices. Prints for each: the
operations (on a GPU: launches) in one iteration of the innermost loops, the collectives inside any
loop, the temporary memory of a device, and, where `ptxas` is at hand, the registers and spilled
bytes of the Pallas program. Nothing runs, so nothing is timed. The exit status is 1 if something
did not compile or a loop holds a collective: devices whose loops end at different times would wait
for each other. That they would be seen is shown by a control, a batch of loops over the devices
under plain jit.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin looks for a driver
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu asks the cloud about the machine
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax import assign, models, optim
from nat_jax.assign import _kernel
from nat_jax.train_step import Step, match

COLLECTIVES = re.compile(
    r"^(all-reduce|all-gather|all-to-all|reduce-scatter|collective-(permute|broadcast))"
)
# Operations that are neither a launch on a GPU nor work on a TPU.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "iota", "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler wants to know of a GPU; sizes in bytes."""

    name: str
    capability: tuple[int, int]
    cores: int
    lanes: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2: int
    shared_per_core: int

    def description(self) -> str:
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  threads_per_core_limit: {1536 if self.capability == (8, 9) else 2048}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {self.shared_per_core - 1024}
  shared_memory_per_core: {self.shared_per_core} l2_cache_size: {self.l2}
  core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock_ghz}
  memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 0 }}
device_description_str: "NVIDIA {self.name}"
"""


GPUS = (
    Gpu("H200", (9, 0), 132, 128, 1.98, 150 * 10**9, 4800 * 10**9, 50 * 2**20, 228 * 2**10),
    Gpu("A100", (8, 0), 108, 64, 1.41, 80 * 10**9, 2039 * 10**9, 40 * 2**20, 164 * 2**10),
    Gpu("L4", (8, 9), 58, 128, 2.04, 24 * 10**9, 300 * 10**9, 48 * 2**20, 100 * 2**10),
)


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
        whole = functools.partial(assign.auction, kernel=True)
        yield Program(f"auction with it {_times(shape)}", whole, arguments[:1])


def step_programs(mesh: Mesh) -> Iterator[Program]:
    """Yield the matching of the train step: a block of the batch on each device."""
    model = models.make_model("convnet", dim=64, image_size=32, frontend="sobel", pools=2)
    blocks, b = mesh.size, 256
    step = Step(model, optim.Optimizer(0.1), mesh, block=b)
    rows = jax.ShapeDtypeStruct((blocks * b,), jnp.int32)
    weight = jax.ShapeDtypeStruct((blocks * b,), jnp.float32)
    features = jax.ShapeDtypeStruct((blocks * b, 64), jnp.float32)
    arguments = (features, features, rows, weight)
    function = functools.partial(match, step)
    yield Program(f"match of a step {blocks}x{b}", function, arguments, split=True)
    x = jax.ShapeDtypeStruct((blocks, b), jnp.float32)
    yield Program("control: plain jit", _loops_in_lock_step, (x,), split=True, control=True)


def _loops_in_lock_step(x: jax.Array) -> jax.Array:
    def double(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.max(x) < 1, lambda x: 2 * x, x)

    return jax.vmap(double)(x)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def computations(text: str) -> dict[str, list[tuple[str, str]]]:
    """Return the (opcode, line) pairs of each computation of an optimised program."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in text.splitlines():
        begin = re.match(r"(?:ENTRY )?%?([\w.-]+) .*->.*\{$", line)
        if begin:
            name = begin[1]
            found[name] = []
        operation = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line)
        if operation and name:
            found[name].append((operation[1], line))
    return found


def within(name: str, program: dict[str, list[tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    """Yield the operations of a computation and of those it calls, not of loops inside it."""
    for opcode, line in program[name]:
        yield opcode, line
        if opcode in ("call", "conditional", "async-start"):
            for group in re.findall(r"(?:to_apply|calls|\w+_computations?)=\{?([^}\s]*)", line):
                for callee in re.findall(r"%?([\w.-]+)", group):
                    yield from within(callee, program) if callee in program else ()


def loops(text: str) -> list[dict]:
    """Return for each loop what it does, whether it holds another loop, and its operations."""
    program = computations(text)
    found = []
    for operations in program.values():
        for opcode, line in operations:
            if opcode != "while":
                continue
            parts = re.findall(r"(?:condition|body)=%?([\w.-]+)", line)
            inside = [operation for part in parts for operation in within(part, program)]
            source = re.search(r'op_name="([^"]*)"', line)
            found.append({
                "source": source[1] if source else parts[-1],
                "innermost": all(opcode != "while" for opcode, _ in inside),
                "operations": sum(opcode not in FREE for opcode, _ in inside),
                "collectives": sum(bool(COLLECTIVES.match(opcode)) for opcode, _ in inside),
            })  # fmt: skip
    return found


def measure(target: str, program: Program, mesh: Mesh, capability: tuple[int, int] | None) -> dict:
    """Compile a program for the devices of a mesh; return what is known of the result."""
    sharding = NamedSharding(mesh, P("data") if program.split else P())
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in program.arguments
    ]
    row = {
        "target": target,
        "program": program.name,
        "devices": mesh.size,
        "control": program.control,
    }
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
    found = loops(text)
    innermost = [loop["operations"] for loop in found if loop["innermost"]]
    return row | {
        "compiled": True,
        "seconds": round(seconds, 1),
        "loops": len(found),
        "operations_per_round": max(innermost, default=0),
        "collectives_in_loops": sum(loop["collectives"] for loop in found),
        "operations": sum(op not in FREE for ops in entry(text) for op, _ in ops),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        **machine_code,
        "innermost_loops": [
            [loop["source"], loop["operations"]] for loop in found if loop["innermost"]
        ],
    }


def entry(text: str) -> list[list[tuple[str, str]]]:
    """Return the operations of the program's entry computation."""
    name = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)[1]
    return [list(within(name, computations(text)))]


def assemble(dump: Path, capability: tuple[int, int]) -> dict:
    """Assemble the kernel's PTX; return its registers and spilled bytes, {} without ptxas."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    tools = [path for folder in folders for path in Path(folder).glob("*/bin/ptxas")]
    sources = [path for path in dump.glob("*.ptx") if ".entry auction" in path.read_text()]
    if not tools or not sources:
        return {}
    arch = "sm_{}{}".format(*capability) + ("a" if capability == (9, 0) else "")
    command = [tools[0], "-v", f"--gpu-name={arch}", sources[0], "-o", dump / "out"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", report)[1]),
    }


def meshes(kind: str) -> Iterator[tuple[str, Mesh, tuple[int, int] | None]]:
    """Yield the name of each target, a mesh of 16 of its devices, and the compute capability."""
    if kind == "tpu":
        devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
        yield "TPU v5e", _mesh(devices), None
        return
    for gpu in GPUS:
        for shape in ("1x1x1", "1x2x8"):
            described = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                target_config=gpu.description(),
                topology=shape,
            )
            yield gpu.name, _mesh(described.devices), gpu.capability


def _mesh(devices: Any) -> Mesh:
    grid = np.array(devices).reshape(-1, 1)
    return Mesh(grid, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))


def missing(kind: str) -> str:
    """Return the package to install for a kind of device, "" if its compiler is there."""
    if kind == "tpu":
        return "" if importlib.util.find_spec("libtpu") else "libtpu"
    plugins = (f"jax_plugins.xla_cuda{version}" for version in (12, 13))
    try:
        there = any(importlib.util.find_spec(plugin) for plugin in plugins)
    except ModuleNotFoundError:
        there = False
    return "" if there else f"jax[cuda12]=={jax.__version__}"


def versions() -> dict[str, str]:
    """Return the versions of the compilers."""
    names = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Compile everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--platform", choices=("cuda", "tpu", "all"), default="all")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    rows: list[dict] = []
    print(f"{'target':8} {'program':27} {'loops':>6} {'per round':>9} {'in all':>7} {'coll.':>6}"
          f" {'temp KiB':>9} {'registers':>9} {'spilled':>8} {'compile s':>9}")  # fmt: skip
    kinds = ("cuda", "tpu") if arguments.platform == "all" else (arguments.platform,)
    for kind in kinds:
        if package := missing(kind):
            print(f"{kind}: skipped, its compiler is missing: pip install '{package}'")
            continue
        for target, mesh, capability in meshes(kind):
            programs: list[Program] = []
            if mesh.size == 1 or kind == "tpu":
                programs += solver_programs()
            if mesh.size == 1:
                programs += kernel_programs()
            if mesh.size > 1:
                programs += step_programs(mesh)
            for program in programs:
                rows.append(measure(target, program, mesh, capability))
                show(rows[-1])
    failures = [
        row
        for row in rows
        if not row["compiled"] or bool(row["collectives_in_loops"]) != row["control"]
    ]
    if rows:
        print(f"{len(rows) - len(failures)} of {len(rows)} as they should be")
    for row in failures:
        print(f"FAILED: {row['target']}, {row['program']}")
    if arguments.output:
        result = {
            "benchmark": "aot",
            "rows": rows,
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {platform.system()}, CPU",
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(failures))


def show(row: dict) -> None:
    """Print one line of the table."""
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


if __name__ == "__main__":
    main()
