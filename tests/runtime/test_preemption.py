"""Stopping on SIGTERM and Ctrl-C, in one process and as one of several."""

import os
import signal
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest
from project import ROOT

from nat_jax.runtime import preemption
from nat_jax.runtime.preemption import Preempted, StopOnSignal
from nat_jax.training.checkpoint import Checkpoints


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert stop.requested() is None
        os.kill(os.getpid(), number)
        assert stop.requested() == number
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
        assert stop.requested() is None
        runtime.stop = True
        assert stop.requested() == signal.SIGTERM
    with StopOnSignal() as stop:  # the next seed, whose steps start from 0
        stop.requested()
    first = runtime.questions[0]
    assert runtime.questions == [first, first + 1, first + 2]


def test_ctrl_c_is_passed_on_to_the_other_processes(monkeypatch):
    runtime = Runtime(monkeypatch)
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert runtime.signals == [signal.SIGTERM]
        assert stop.requested() is None  # not before all are asked
        runtime.stop = True
        assert stop.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


PROGRAM = """
import os, signal
import jax
from nat_jax.runtime import preemption

def taken(number):
    print("taken", flush=True)

def run(processes, when):
    jax.distributed.is_initialized = lambda: processes == "several"
    with preemption.c_handler(signal.SIGTERM, taken):  # as JAX's runtime does
        os.kill(os.getpid(), signal.SIGTERM)
        with preemption.nothing_to_save():
            print("nothing to save", flush=True)
            if when == "during":
                os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

for case in (("several", "during"), ("several", "after"), ("one", "during")):
    print(*case, flush=True)
    child = os.fork()
    if not child:
        run(*case)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_with_nothing_to_save_sigterm_ends_a_process_at_once():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split("\n")[:-1] == [
        *("several during", "taken", "nothing to save", str(int(signal.SIGTERM))),
        *("several after", "taken", "nothing to save", "taken", "0"),
        *("one during", "taken", "nothing to save", "taken", "taken", "0"),
    ], done.stderr


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
