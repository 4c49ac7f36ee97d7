"""Batches made ahead of time: order, bounds, and workers that hang or die."""

import pickle
import sys
import threading
import time
import types
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from nat_jax.errors import InputError
from nat_jax.input import prefetch
from nat_jax.input.bad_records import BadRecordError
from nat_jax.input.prefetch import (
    Stalled,
    WorkerDied,
    check_main_program,
    check_shared_memory,
    prefetch_batches,
)
from nat_jax.input.work_log import WorkLog

DIED = "Worker process was terminated unexpectedly with exit code "  # grain's words


class Steps:
    def __init__(self, count: int, make: Callable[[int], Any]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, step: int) -> Any:
        return self._make(int(step))


def run(
    make: Callable[[int], Any], count: int = 1, convert: Callable = lambda item: item, **options
) -> Generator:
    defaults = {"threads": 0, "workers": 0, "depth": 2, "timeout": 60.0, "name_of": "{}.png".format}
    options = {**defaults, "log": WorkLog(), **options}
    return prefetch_batches(Steps(count, make), 0, convert, **options)


def fetchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("nat_jax-prefetch")]


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("threads", [0, 3])
def test_batches_are_converted_in_order_in_one_other_thread(threads: int):
    seen = set()

    def convert(item: int) -> int:
        seen.add(threading.current_thread().name)
        return item * item

    assert list(run(int, 50, convert, threads=threads)) == [i * i for i in range(50)]
    assert len(seen) == 1 and threading.current_thread().name not in seen
    assert wait_for(lambda: not fetchers())


def test_no_more_is_made_than_can_be_used():
    made: list[int] = []
    stream = run(lambda i: made.append(i) or i, 1000)
    assert [next(stream) for _ in range(10)] == list(range(10))
    time.sleep(0.2)
    assert len(made) == 12  # those used, and two ready
    stream.close()
    assert wait_for(lambda: not fetchers())


def test_a_slow_consumer_and_a_slow_source_overlap():
    begun = time.monotonic()
    for _ in run(lambda i: time.sleep(0.05), 10):
        time.sleep(0.05)
    assert time.monotonic() - begun < 0.9  # 1.0 one after the other


@pytest.mark.parametrize("where", ["making", "conversion"])
def test_a_fault_comes_after_what_was_good(where: str):
    def fail(item: int) -> int:
        if item == 2:
            raise BadRecordError("record 7")
        return item

    make, convert = (fail, int) if where == "making" else (int, fail)
    stream = run(make, 5, convert)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(BadRecordError, match="record 7"):
        next(stream)
    assert wait_for(lambda: not fetchers())


def test_a_record_that_takes_too_long_ends_the_run_by_name():
    log, release = WorkLog(), threading.Event()

    def make(step: int) -> int:
        if step:
            with log.reading(17):
                release.wait(60)
        return step

    stream = run(make, 2, log=log, timeout=0.5)
    assert next(stream) == 0
    begun = time.monotonic()
    with pytest.raises(Stalled, match=r"record 17 \(17\.png\): reading it has taken more than 0.5"):
        next(stream)
    assert 0.3 < time.monotonic() - begun < 5
    release.set()


def test_a_slow_batch_of_records_that_make_progress_is_not_stalled():
    log = WorkLog()

    def make(step: int) -> int:
        for _ in range(5):
            with log.reading(3):
                time.sleep(0.15)
        return step

    assert list(run(make, log=log, timeout=0.5)) == [0]


def test_silence_is_a_stall_too(monkeypatch):
    monkeypatch.setattr(prefetch, "_START_UP", 0.0)
    release = threading.Event()
    with pytest.raises(Stalled, match="no batch has come for . s, and no record is being read"):
        next(run(lambda i: release.wait(60), timeout=0.3))
    release.set()


def test_workers_need_a_main_program_that_can_be_imported(tmp_path, monkeypatch):
    def died() -> None:
        list(run(lambda step: (_ for _ in ()).throw(RuntimeError(f"{DIED}1. S"))))

    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    check_main_program()  # of a notebook or an interactive session
    with pytest.raises(WorkerDied, match="it says why above$"):
        died()
    (tmp_path / "script.py").touch()
    main.__file__ = str(tmp_path / "script.py")
    check_main_program()
    with pytest.raises(WorkerDied, match='needs `if __name__ == "__main__":`'):
        died()
    main.__file__ = "<stdin>"
    with pytest.raises(InputError, match=r"data.workers: .* read from standard input \(<stdin>\)"):
        check_main_program()


def test_shared_memory_that_is_too_small_is_reported_before_it_overflows(tmp_path: Path):
    check_shared_memory(2, 8, 1000, str(tmp_path))
    check_shared_memory(2, 8, 1 << 60, str(tmp_path / "missing"))
    with pytest.raises(
        ValueError, match=r"data\.workers: batches wait in .*MB free, for 2 workers"
    ):
        check_shared_memory(2, 8, 1 << 60, str(tmp_path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("-9", "a data worker died with exit code -9; the system may have been short of memory"),
        ("-7", "/dev/shm may be full"),
        ("1", "before it read anything; it says why above"),
        ("-11", "-11$"),
    ],
)
def test_the_message_has_the_likely_cause_of_death(code: str, message: str):
    def make(step: int) -> None:
        raise RuntimeError(f"{DIED}{code}. S")

    with pytest.raises(WorkerDied, match=message):
        list(run(make))


def test_another_fault_is_not_taken_for_a_death():
    with pytest.raises(RuntimeError, match="another") as info:
        list(run(lambda step: (_ for _ in ()).throw(RuntimeError("another"))))
    assert not isinstance(info.value, WorkerDied)


def test_the_folder_ends_with_the_log_and_not_with_a_copy():
    log = WorkLog()
    folder = Path(log.__getstate__()["_folder"])
    copy = pickle.loads(pickle.dumps(log))
    with copy.reading(1):
        assert [reading.record for reading in log.under_way()] == [1]
    del copy
    assert folder.is_dir()
    del log
    assert not folder.exists()
