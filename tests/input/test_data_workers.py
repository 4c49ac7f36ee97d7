"""Batches from worker processes, each of which takes seconds to start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faulty_records import SIZE, Faulty
from project import ROOT

from nat_jax.input import transforms
from nat_jax.input.bad_records import BadRecordError
from nat_jax.input.color_jitter import ColorJitter
from nat_jax.input.pipeline import eval_batches, train_batches
from nat_jax.input.prefetch import Stalled, WorkerDied
from nat_jax.input.reader import ImageCache

TRANSFORM = transforms.train_transform(image_size=SIZE, colors=ColorJitter(0.5, 0.2))


def batches(source: Faulty, **options) -> list[dict[str, np.ndarray]]:
    defaults = {"batch_size": 4, "seed": 0, "start_step": 0, "num_steps": 33, "threads": 2}
    return list(train_batches(source, TRANSFORM, **{**defaults, **options}))


def test_a_killed_worker_is_reported_with_its_record():
    begun = time.monotonic()
    with pytest.raises(WorkerDied, match=r"exit code -9 while it read .*record 17 \(17\.png\)"):
        batches(Faulty(40, "killed", 17), workers=2)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_ctrl_c_is_not_for_the_workers():
    for workers in (2, 0):
        labels = {
            int(i) for b in batches(Faulty(40, "signals"), workers=workers) for i in b["label"]
        }
        assert labels == {int(workers > 0)}
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("raises", BadRecordError, r"record 17 of faulty: KeyError\('oops'\)"),
        ("hangs", Stalled, r"record 17 \(17\.png\): reading it has taken more than 2 s"),
    ],
)
def test_a_fault_in_a_worker_is_reported_with_its_record(fault, error, message):
    begun = time.monotonic()
    with pytest.raises(error, match=message):
        batches(Faulty(40, fault, 17), workers=2, timeout=2.0)
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_more_workers_than_steps():
    found = batches(Faulty(40), num_steps=1, workers=3)
    assert len(found) == 1
    still = transforms.eval_transform(image_size=SIZE)
    passed = list(eval_batches(Faulty(9), still, batch_size=5, workers=3))
    assert [b["index"].tolist() for b in passed] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, -1]]


def test_images_in_memory_need_no_workers(caplog):
    caplog.set_level("INFO")
    found = batches(Faulty(40), workers=2, cache=ImageCache(), num_steps=10)
    assert len(found) == 10
    assert "faulty is kept in memory: data.workers is not used" in caplog.text


SCRIPT = """
import multiprocessing
from faulty_records import SIZE, Faulty
from nat_jax.input import pipeline, transforms
if __name__ == "__main__":
    stream = pipeline.train_batches(
        Faulty(400), transforms.train_transform(image_size=SIZE), batch_size=4, seed=0,
        start_step=0, num_steps=10**6, threads=2, workers=2)
    next(stream)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
"""


def start(script: Path, text: str) -> subprocess.Popen:
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"},
    )


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_workers_end_when_their_parent_is_killed(tmp_path: Path):
    parent = start(tmp_path / "orphans.py", SCRIPT + "    list(stream)")
    assert parent.stdout is not None
    children = [int(word) for word in parent.stdout.readline().split()]
    assert len(children) == 2 and all(map(is_running, children))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 30
    while any(map(is_running, children)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(is_running, children))


@pytest.mark.slow
def test_a_stream_that_is_not_used_up_does_not_disturb_the_exit(tmp_path: Path):
    done = start(tmp_path / "leaves.py", SCRIPT)
    _, errors = done.communicate(timeout=60)
    assert done.returncode == 0 and "Traceback" not in errors
