import os
import signal
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from project import ROOT

from nat_jax.runtime import preemption, sharding
from nat_jax.runtime.preemption import Preempted, StopOnSignal
from nat_jax.training.checkpoint import Checkpoints


def test_a_mesh_takes_all_devices():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="to be the number of devices, 1; got mesh.data = 3"):
        sharding.make_mesh(3, devices=jax.devices()[:1])


@pytest.mark.parametrize("model", [1, 2, 4])
def test_devices_along_model_belong_to_one_process(monkeypatch, model):
    """However JAX orders the devices of several processes."""
    chips = [types.SimpleNamespace(process_index=i // 2 % 4, id=i) for i in range(16)]
    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", lambda _, devices: devices)
    ordered = sharding._in_order(chips)
    assert [chip.process_index for chip in ordered] == sorted(c.process_index for c in chips)
    rows = np.array(ordered).reshape(-1, model)
    assert all(len({chip.process_index for chip in row}) == 1 for row in rows)


def test_slices_of_a_pod_are_ordered_one_by_one(monkeypatch):
    chips = [types.SimpleNamespace(process_index=0, slice_index=i % 2, id=i) for i in range(6)]
    asked = []

    def wired(shape, devices):
        asked.append((shape, [chip.id for chip in devices]))
        return devices[::-1]

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", wired)
    assert [chip.id for chip in sharding._in_order(chips)] == [4, 2, 0, 5, 3, 1]
    assert asked == [((3,), [0, 2, 4]), ((3,), [1, 3, 5])]


def test_on_a_tpu_pod_a_process_works_alone_on_one_chip():
    chips = [types.SimpleNamespace(platform="tpu") for _ in range(4)]
    assert sharding.alone(chips, processes=1) == chips
    assert sharding.alone(chips, processes=2) == chips[:1]
    cpus = [types.SimpleNamespace(platform="cpu") for _ in range(4)]
    assert sharding.alone(cpus, processes=2) == cpus


def test_a_batch_keeps_its_values_and_its_order():
    mesh = sharding.make_mesh()
    local = {"index": np.arange(8, dtype=np.int32), "image": np.zeros((8, 2, 2, 3), np.uint8)}
    batch = sharding.global_batch(local, mesh)
    np.testing.assert_array_equal(batch["index"], local["index"])
    assert batch["index"].sharding == sharding.over_data(mesh)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert stop.asked() is None
        os.kill(os.getpid(), number)
        assert stop.asked() == number
    assert signal.getsignal(number) is before
    assert Preempted(number, 5).code == 128 + number


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopOnSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work():
        with StopOnSignal() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, None)]


class Runtime:
    """Stands for JAX's runtime in one of several processes."""

    def __init__(self, monkeypatch):
        self.questions, self.stop, self.signals = [], False, []
        monkeypatch.setattr(preemption.jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(
            preemption.multihost_utils, "reached_preemption_sync_point", self._reached
        )
        monkeypatch.setattr(preemption.os, "kill", lambda _, number: self.signals.append(number))

    def _reached(self, number):
        self.questions.append(number)
        return self.stop


def test_several_processes_stop_where_the_runtime_says(monkeypatch):
    runtime = Runtime(monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    with StopOnSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) is before  # it is the runtime's
        assert stop.asked() is None
        runtime.stop = True
        assert stop.asked() == signal.SIGTERM
    with StopOnSignal() as stop:  # the next seed, whose steps begin anew
        stop.asked()
    first = runtime.questions[0]
    assert runtime.questions == [first, first + 1, first + 2]


def test_ctrl_c_is_passed_on_to_the_other_processes(monkeypatch):
    runtime = Runtime(monkeypatch)
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert runtime.signals == [signal.SIGTERM]
        assert stop.asked() is None  # not before all are asked
        runtime.stop = True
        assert stop.asked() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


PROGRAM = """
import os, signal, sys
import jax
import jax.numpy as jnp
from nat_jax.runtime import c_signals, preemption

def taken(number):
    print("taken", flush=True)

jax.distributed.is_initialized = lambda: sys.argv[1] == "several"
with c_signals.handled(signal.SIGTERM, taken):  # as JAX's runtime does
    os.kill(os.getpid(), signal.SIGTERM)
    with preemption.nothing_to_save():
        print("nothing to save", flush=True)
        if sys.argv[2] == "during":
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
    ("processes", "when", "said", "code"),
    [
        ("several", "during", ["taken", "nothing to save"], -signal.SIGTERM),
        ("several", "after", ["taken", "nothing to save", "taken"], 0),
        ("one", "during", ["taken", "nothing to save", "taken", "taken"], 0),
    ],
)
def test_with_nothing_to_save_sigterm_ends_a_process_at_once(processes, when, said, code):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, processes, when],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split("\n")[:-1] == said and done.returncode == code, done.stderr


def test_saving_leaves_the_question_to_the_loop(tmp_path, monkeypatch):
    """A second one who asks, with older numbers, would make the runtime miss the notice."""
    asked = []
    monkeypatch.setattr(
        preemption.multihost_utils,
        "reached_preemption_sync_point",
        lambda number: asked.append(number) or False,
    )
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"assignment": jnp.arange(8)}, {})
    checkpoints.close()
    assert asked == []
