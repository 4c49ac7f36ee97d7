"""Start-up in several processes: each failure ends every process with one message in time."""

import re
import signal
import socket
import sys
import time

import pytest
from processes import CONFIG, Run, environment, free_port
from project import python


def connect(folder, *places):
    """Start processes that only connect, each told (process_id, num_processes, timeout)."""
    port = free_port()
    command = [sys.executable, "-m", "nat_jax.main", CONFIG, "--workdir=run"]
    commands = [
        [
            *command,
            f"--coordinator=127.0.0.1:{port}",
            f"--process_id={process_id}",
            f"--num_processes={count}",
            f"--distributed_timeout={timeout}",
        ]
        for process_id, count, timeout in places
    ]
    return Run(folder, commands, [environment()] * len(commands))


def assert_one_message(run, folder, limit, aborts=False):
    """Each process ends with one message; before it stands JAX's own where its runtime aborts."""
    codes = run.wait(limit)
    outputs = [run.lines(index) for index in range(len(codes))]
    assert codes == [2] * len(codes), outputs
    for lines in outputs:
        assert [line for line in lines if line.startswith("nat_jax: ")] == lines[-1:], lines
        assert len(lines) == 1 or aborts, lines
    assert not (folder / "run").exists()


def test_processes_that_cannot_meet_say_so_in_one_message_each(tmp_path):
    """Three starts at the same time, as each waits for its time limit."""
    lonely = connect(tmp_path / "lonely", (0, 2, 4))
    lost = connect(tmp_path / "lost", (1, 2, 4))
    incomplete = connect(tmp_path / "incomplete", (0, 3, 9), (1, 3, 4))
    for name, run in (("lonely", lonely), ("lost", lost), ("incomplete", incomplete)):
        assert_one_message(run, tmp_path / name, 60)
    assert "after 4 s still waiting, as process 0 of 2, coordinator" in lonely.output(0)
    assert "not all came" in lonely.output(0)
    assert "which cannot be reached: [Errno 111] Connection refused" in lost.output(0)
    assert "not all came" in incomplete.output(0)
    assert "which answers; not all processes have come to it" in incomplete.output(1)


@pytest.mark.slow
def test_different_counts_and_equal_numbers_are_refused(tmp_path):
    for name, places, reason in (
        ("higher", [(0, 2, 9), (2, 3, 9)], "Unexpected task registered with task=2"),
        ("between", [(0, 2, 9), (1, 3, 9)], "JAX sees 2. All need the same --num_processes"),
        ("equal", [(0, 3, 9), (1, 3, 9), (1, 3, 9)], "newer incarnation"),
    ):
        run = connect(tmp_path / name, *places)
        assert_one_message(run, tmp_path / name, 90, aborts=True)
        assert reason in "".join(run.output(index) for index in range(len(places)))


def test_ctrl_c_ends_a_process_that_waits(tmp_path):
    run = connect(tmp_path, (0, 2, 60))
    port = re.search(r"127.0.0.1:(\d+)", " ".join(run.processes[0].args))[1]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", int(port))):
                break
        time.sleep(0.05)
    run.processes[0].send_signal(signal.SIGINT)
    assert run.wait(10) == [-signal.SIGINT]


def test_a_task_for_one_process_refuses_several(tmp_path):
    line = ["-m", "nat_jax.main", CONFIG, "--config.task=report"]
    line += ["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1"]
    done = python(*line, cwd=tmp_path, code=2)
    assert done.stderr.startswith("nat_jax: task 'report' runs in one process; this is number 1")
