import os
import signal
import threading

import jax
import numpy as np
import pytest

from nat_jax import sharding
from nat_jax.preemption import Preempted, StopOnSignal


def test_a_mesh_takes_all_devices():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="mesh.data: expected 1, the number of devices; got 3"):
        sharding.make_mesh(3, devices=jax.devices()[:1])


def test_a_batch_keeps_its_values_and_its_order():
    mesh = sharding.make_mesh()
    local = {"index": np.arange(8, dtype=np.int32), "image": np.zeros((8, 2, 2, 3), np.uint8)}
    batch = sharding.global_batch(local, mesh)
    np.testing.assert_array_equal(batch["index"], local["index"])
    assert batch["image"].sharding.spec[0] == "data"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == number
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
