"""Two ways to solve on the hosts of several processes; part of ``benchmarks/step.py``.

Two processes on this machine, each bound to a core of its own, which imitates two hosts; connected
over loopback. The costs of K blocks lie on their devices, half of them on each, or for K = 1 on
both. Taken in turns, from the costs to the solution of all blocks on each device:

    share   what ``nat_jax.training.host_matching.HostSolver`` does: each process solves a half,
            and a sum over the devices brings the solutions together
    all     the costs of all blocks are gathered, and each process solves all of them

    python benchmarks/step_hosts.py ROUNDS

prints the rows as one line of JSON.
"""

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROCESSES = 2
_BLOCKS = (1, 2, 8, 32)
_SIZE, _DIM = 256, 128
_LIMIT = 300  # seconds that the processes may take


def measure(rounds: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Start the processes; return a row for each number of blocks and each way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rounds), str(port), str(index)],
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        for index in range(_PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=_LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise RuntimeError("--hosts: a process has failed")
    rows = json.loads(said[0].splitlines()[-1])
    for row in rows:
        say(f"hosts: {row}")
    return rows


def _environment() -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "NPROC": "4",  # threads of XLA's client, which needs more than a core's one
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }


def work(rounds: int, port: int, index: int) -> list[dict[str, Any]]:
    """Take turns in one of the processes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[index % len(cores)]})
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", _PROCESSES, index)
    rows = [row for blocks in _BLOCKS for row in compare(blocks, rounds)]
    jax.distributed.shutdown()
    return rows


def compare(blocks: int, rounds: int) -> list[dict[str, Any]]:
    """Time both ways on one number of blocks; all processes must call this."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from step_contenders import PROBLEMS

    from nat_jax import train_step
    from nat_jax.runtime import sharding
    from nat_jax.training import host_matching

    mesh = sharding.make_mesh()
    step = train_step.Step(PROBLEMS["tiny"].model(), PROBLEMS["tiny"].optimizer, mesh)
    solver, together = host_matching.HostSolver(step), jax.jit(host_matching._together)
    solve = functools.partial(train_step.solve, step)
    everywhere = sharding.replicated(mesh)
    gather = jax.jit(lambda cost: cost, out_shardings=everywhere)
    random = np.random.default_rng(0)
    z, t = (random.standard_normal((blocks, _SIZE, _DIM), np.float32) for _ in range(2))
    z = z + 3 * random.standard_normal(_DIM)  # features near one direction, as early in training
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (z, t)]
    costs = -np.einsum("kid,kjd->kij", *unit).astype(np.float32)
    where = sharding.over_data(mesh) if blocks % mesh.size == 0 else everywhere
    cost = jax.make_array_from_callback(costs.shape, where, lambda at: costs[at])

    def share() -> tuple[Any, float]:
        said, seconds = solver(cost)
        return together(said), seconds

    def all_of_them() -> tuple[Any, float]:
        every = np.asarray(gather(cost).addressable_data(0))
        begin = time.perf_counter()
        solution = jax.device_get(solve(jax.device_put(every, jax.local_devices()[0])))
        return solution, time.perf_counter() - begin

    ways = {"share": share, "all": all_of_them}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            multihost_utils.sync_global_devices(name)
            begin = time.perf_counter()
            solution, solving = way()
            found[name] = np.asarray(jax.block_until_ready(solution).col4row)
            taken[name].append((time.perf_counter() - begin, solving))
    np.testing.assert_array_equal(found["share"], found["all"])
    sent = {"share": 4 * blocks * (_SIZE + 3), "all": 4 * blocks * _SIZE**2 if blocks > 1 else 0}
    rows = []
    for name, times in taken.items():
        whole, solving = np.median(np.array(times[1:]), axis=0)
        rows.append({
            "blocks": blocks,
            "way": name,
            "ms": round(1000 * float(whole), 2),
            "solving_ms": round(1000 * float(solving), 2),
            "bytes_exchanged": sent[name],
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    print(json.dumps(work(*map(int, sys.argv[1:]))))
