import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from pathlib import Path

import pytest

from nat_jax.input.work_log import WorkLog


def test_a_record_is_under_way_until_its_block_ends():
    log = WorkLog()
    assert log.under_way() == []
    with log.reading(0):
        time.sleep(0.05)
        (reading,) = log.under_way()
        assert (reading.index, reading.process) == (0, os.getpid())
        assert 0.05 <= reading.seconds < 5
    assert log.under_way() == []
    with pytest.raises(KeyError), log.reading(3):
        raise KeyError
    assert log.under_way() == []


def test_the_longest_comes_first():
    log, go_on, begun = WorkLog(), threading.Event(), threading.Barrier(2)

    def read(index: int) -> None:
        with log.reading(index):
            begun.wait()
            go_on.wait()

    threads = [threading.Thread(target=read, args=(index,)) for index in (7, 5, 6)]
    for thread in threads:
        thread.start()
        begun.wait()
        time.sleep(0.01)
    assert [reading.index for reading in log.under_way()] == [7, 5, 6]
    go_on.set()
    for thread in threads:
        thread.join()
    assert log.under_way() == []


def _die_while_reading(log: WorkLog) -> None:
    with log.reading(41):
        os._exit(3)


def test_the_dead_leave_word():
    log = WorkLog()
    worker = multiprocessing.get_context("spawn").Process(target=_die_while_reading, args=(log,))
    worker.start()
    worker.join()
    assert worker.exitcode == 3
    (reading,) = log.under_way()
    assert (reading.index, reading.process) == (41, worker.pid)


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    worker = multiprocessing.get_context("spawn").Process(target=os.getpid)
    worker.start()
    worker.join()
    left = tmp_path / f"nat_jax-work-{worker.pid}-abc"
    mine = tmp_path / f"nat_jax-work-{os.getpid()}-abc"
    other = tmp_path / "nat_jax-work-notes"
    for folder in (left, mine, other):
        folder.mkdir()
    log = WorkLog()
    assert not left.exists() and mine.exists() and other.exists()
    del log


def test_the_folder_ends_with_the_log_and_not_with_a_copy():
    log = WorkLog()
    folder = Path(log.__getstate__()["_folder"])
    copy = pickle.loads(pickle.dumps(log))
    with copy.reading(1):
        assert [reading.index for reading in log.under_way()] == [1]
    del copy
    assert folder.is_dir()
    del log
    assert not folder.exists()
