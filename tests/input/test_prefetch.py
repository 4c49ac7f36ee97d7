import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from nat_jax.input.bad_records import BadRecordError
from nat_jax.input.prefetch import Stalled, WorkerDied, check_shared_memory, prefetched
from nat_jax.input.work_log import WorkLog


def run(batches: Generator, convert: Callable = lambda item: item, **options) -> Generator:
    defaults = {"depth": 2, "timeout": 60.0, "log": WorkLog(), "name_of": "{}.png".format}
    return prefetched(batches, convert, **{**defaults, **options})


def fetchers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "nat_jax-prefetch"]


def test_batches_are_converted_in_order_in_another_thread():
    seen = []

    def convert(item: int) -> int:
        seen.append(threading.current_thread().name)
        return item * item

    assert list(run((i for i in range(50)), convert)) == [i * i for i in range(50)]
    assert set(seen) == {"nat_jax-prefetch"} and not fetchers()


def test_no_more_is_fetched_than_can_be_used():
    fetched = []
    stream = run((fetched.append(i) or i for i in range(1000)), depth=3)
    assert [next(stream) for _ in range(10)] == list(range(10))
    time.sleep(0.5)
    assert 13 <= len(fetched) <= 15  # those used, three ready, one in hand
    stream.close()
    assert not fetchers()


def test_a_slow_consumer_and_a_slow_source_overlap():
    def slow() -> Generator[int, None, None]:
        for i in range(10):
            time.sleep(0.05)
            yield i

    begun = time.monotonic()
    for _ in run(slow()):
        time.sleep(0.05)
    assert time.monotonic() - begun < 0.9  # 1.0 one after the other


@pytest.mark.parametrize("where", ["source", "conversion"])
def test_a_fault_comes_after_what_was_good(where: str):
    def source() -> Generator[int, None, None]:
        yield 0
        yield 1
        if where == "source":
            raise BadRecordError("record 7")
        yield 2

    def convert(item: int) -> int:
        if item == 2:
            raise BadRecordError("record 7")
        return item

    stream = run(source(), convert)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(BadRecordError, match="record 7"):
        next(stream)
    assert not fetchers()


def test_the_source_is_closed_with_the_stream():
    closed = threading.Event()

    def source() -> Generator[int, None, None]:
        try:
            while True:
                yield 0
        finally:
            closed.set()

    stream = run(source())
    next(stream)
    assert not closed.is_set()
    stream.close()
    assert closed.wait(5)


def hanging(log: WorkLog, release: threading.Event) -> Generator[int, None, None]:
    yield 0
    with log.reading(17):
        release.wait(60)


def test_a_record_that_takes_too_long_ends_the_run_by_name():
    log, release = WorkLog(), threading.Event()
    stream = run(hanging(log, release), log=log, timeout=0.5)
    assert next(stream) == 0
    begun = time.monotonic()
    with pytest.raises(Stalled, match=r"record 17 \(17\.png\): reading it has taken more than 0.5"):
        next(stream)
    assert 0.3 < time.monotonic() - begun < 5
    release.set()


def test_a_slow_batch_of_records_that_go_on_is_no_stall():
    log = WorkLog()

    def slow() -> Generator[int, None, None]:
        for index in range(8):
            with log.reading(index):
                time.sleep(0.2)
        yield 0

    assert list(run(slow(), log=log, timeout=0.5)) == [0]


def test_silence_is_a_stall_too(monkeypatch):
    from nat_jax.input import prefetch

    monkeypatch.setattr(prefetch, "_START_UP", 0.0)
    release = threading.Event()

    def silent() -> Generator[int, None, None]:
        release.wait(60)
        yield 0

    with pytest.raises(Stalled, match="no batch has come for . s, and no record is being read"):
        next(run(silent(), timeout=0.5))
    release.set()


def test_a_suspended_process_is_no_stall(monkeypatch):
    from nat_jax.input import prefetch

    log, clock = WorkLog(), [0.0]
    monkeypatch.setattr(prefetch.time, "monotonic", lambda: time.perf_counter() + clock[0])
    go_on = threading.Event()

    def source() -> Generator[int, None, None]:
        with log.reading(3):
            time.sleep(0.5)
            clock[0] += 100  # all that a process sees of having been stopped
            go_on.wait(1)
        yield 0

    assert list(run(source(), log=log, timeout=10.0)) == [0]


def test_shared_memory_that_is_too_small_is_told_before_it_overflows(tmp_path: Path):
    check_shared_memory(2, 8, 1000, str(tmp_path))
    check_shared_memory(2, 8, 1 << 60, str(tmp_path / "missing"))
    with pytest.raises(
        ValueError, match=r"data\.workers: batches wait in .*MB free, for 2 workers"
    ):
        check_shared_memory(2, 8, 1 << 60, str(tmp_path))


@pytest.mark.parametrize(
    ("code", "message"),
    [("-7", "/dev/shm may be full"), ("1", r"before it read anything.*__main__"), ("-11", "-11$")],
)
def test_what_a_death_may_mean(code: str, message: str):
    def dead() -> Generator[int, None, None]:
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. S")
        yield 0

    with pytest.raises(WorkerDied, match=message):
        list(run(dead()))


def test_the_death_of_a_worker_is_told_from_other_faults():
    def dead(message: str) -> Generator[int, None, None]:
        yield 0
        raise RuntimeError(message)

    with pytest.raises(WorkerDied, match="a data worker died with exit code -9; the system may"):
        list(run(dead("Worker process was terminated unexpectedly with exit code -9. Search")))
    with pytest.raises(RuntimeError, match="another") as info:
        list(run(dead("another")))
    assert not isinstance(info.value, WorkerDied)
