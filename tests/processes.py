"""Starts nat_jax in several processes on this host, as the tests see it from outside."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from project import ROOT

from nat_jax.runtime import sharding

HERE = ROOT / "tests" / "multi_process"
CONFIG = f"--config={HERE / 'tiny.py'}"
WORKER = str(HERE / "worker.py")

# Exit codes of a process whose peer is gone: found out by nat_jax in a collective, or by JAX's
# runtime, which aborts.
LOST = (75, -signal.SIGABRT)


def write_images(path: Path) -> Path:
    """Write 320 small random images in three classes, and 90 to judge."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 320), ("test", 90)):
        label = np.arange(count) % 3
        bright = 60 * label[:, None, None]
        arrays[f"x_{split}"] = (random.integers(0, 120, (count, 8, 8)) + bright).astype("u1")
        arrays[f"y_{split}"] = label
    np.savez(path, **arrays)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    cluster = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JOB_COMPLETION_INDEX")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(cluster)}
    return clean | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "NPROC": "16",  # threads of XLA's CPU client, which may deadlock with fewer than devices
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        # the oldest grain has messages that an older protobuf compiled, and the new one says so
        "PYTHONWARNINGS": "ignore::UserWarning:google.protobuf.runtime_version",
        **more,
    }


def run_program(program: str, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    """Start a Python program that is given as text, with so many simulated devices."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=environment(devices),
        stdout=subprocess.PIPE,
        text=True,
    )


class Run:
    """Some processes of one run, with what they print."""

    def __init__(self, folder: Path, commands: list[list[str]], environments: list[dict[str, str]]):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*-0.out")))
        self.logs = [folder / f"{number}-{index}.out" for index in range(len(commands))]
        self.processes = []
        for command, variables, log in zip(commands, environments, self.logs, strict=True):
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=variables,
                        cwd=folder,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def output(self, index: int) -> str:
        return self.logs[index].read_text()

    def lines(self, index: int) -> list[str]:
        """Return the lines of a process without those of Gloo, the CPU's transport."""
        lines = self.output(index).splitlines()
        return [line for line in lines if "[Gloo]" not in line and "peer ranks" not in line]

    def wait_for(self, text: str, index: int = 0, seconds: float = 300) -> None:
        """Wait until a process has printed something."""
        end = time.monotonic() + seconds
        while text not in self.output(index):
            if self.processes[index].poll() is not None or time.monotonic() > end:
                self.stop()
                raise AssertionError(self.output(index))
            time.sleep(0.02)

    def wait(self, seconds: float = 400) -> list[int]:
        """Return the exit codes; nothing is left running."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError("\n".join(map(self.output, range(len(self.logs))))) from None
        finally:
            self.stop()

    def stop(self) -> None:
        """Kill the processes and what they have started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def finish(self) -> None:
        codes = self.wait()
        logs = "\n".join(map(self.output, range(len(self.logs))))
        assert codes == [0] * len(codes), logs


def start(
    images: Path,
    workdir: Path,
    *arguments: str,
    processes: int = 1,
    devices: int = 1,
    **variables: str,
) -> Run:
    """Start a run; ``devices`` are those of each process, {process} in an argument its number."""
    command = [sys.executable, WORKER, CONFIG, f"--workdir={workdir}"]
    command += [f"--config.data.source=arrays:{images}", *arguments]
    commands = [command]
    if processes > 1:
        several = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
        several += ["--distributed_timeout=300"]
        commands = [
            [word.replace("{process}", str(index)) for word in (*command, *several)]
            + [f"--process_id={index}"]
            for index in range(processes)
        ]
    logs = workdir.with_name(f"{workdir.name}-logs")
    return Run(logs, commands, [environment(devices, **variables)] * processes)


def leaves_of(state: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a train state by name, that of its key as integers.

    All processes must call this.
    """
    flat = jax.tree_util.tree_flatten_with_path(sharding.to_host(state))[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def state(workdir: Path, process: int = 0) -> dict[str, np.ndarray]:
    """Return the final state as one process had it."""
    with np.load(workdir / f"state-{process}.npz") as file:
        return dict(file)


def assert_same_bits(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def assert_close(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    """Compare states that were computed on different devices, but for the assignment."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if "assignment" in name:
            np.testing.assert_array_equal(np.sort(value), np.arange(value.size))
            np.testing.assert_array_equal(np.sort(other[name]), np.arange(value.size))
        else:
            np.testing.assert_allclose(value, other[name], rtol=1e-3, atol=1e-4, err_msg=name)
