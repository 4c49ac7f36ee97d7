"""The lock of a workdir: one owner at a time, and none that is gone keeps others waiting."""

import json
import logging
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nat_jax.errors import InputError
from nat_jax.training import lock
from nat_jax.training.lock import WorkdirInUse, WorkdirLost, held


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_BEAT", 0.02)
    monkeypatch.setattr(lock, "_POLL", 0.005)
    monkeypatch.setattr(lock, "_STALE", 0.3)


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave(folder: Path, **changes: Any) -> Path:
    """Leave a lock as another owner had it: by default, of this process in this thread."""
    with held(folder):
        owner = json.loads((folder / "lock-1.json").read_text())
    path = folder / "lock-1.json"
    path.write_text(json.dumps({**owner, "run": "other", **changes}))
    return path


ELSEWHERE = {"kernel": ["node7", "boot", "pid:[1]", 0], "host": "node7", "pid": 71}


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_it_is_there_inside_only_however_that_ends(tmp_path: Path, end: Any) -> None:
    for _ in range(2):
        try:
            with held(tmp_path / "run") as check:
                assert locks(tmp_path / "run") == ["lock-1.json"]
                check()
                if end:
                    raise end
        except (ValueError, KeyboardInterrupt, SystemExit):
            pass
        assert locks(tmp_path / "run") == []


@pytest.mark.parametrize("content", ["", "[]", "3", '{"run": "x"}'])
def test_a_damaged_lock_is_stale_after_a_while(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock-1.json").write_text(content)
    with held(tmp_path):
        assert locks(tmp_path) == ["lock-2.json"]


def test_a_living_owner_elsewhere_is_named(tmp_path: Path) -> None:
    path = leave(tmp_path, **ELSEWHERE, since="2026-01-02 03:04:05 +0000")
    ended = threading.Event()

    def live() -> None:
        count = 0
        while not ended.wait(0.02):
            count += 1
            path.write_text(json.dumps({**json.loads(path.read_text()), "count": count}))

    thread = threading.Thread(target=live)
    thread.start()
    with (
        pytest.raises(WorkdirInUse, match="process 71 on node7, since 2026-01-02 03:04.*--workdir"),
        held(tmp_path),
    ):
        pass
    ended.set()
    thread.join()
    assert locks(tmp_path) == ["lock-1.json"]


@pytest.mark.parametrize("content", ["as it was", ""])
def test_one_that_stands_still_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    path = leave(tmp_path, **ELSEWHERE)
    if not content:
        path.write_text("")  # killed before it could write more
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "nat_jax"), held(tmp_path) as check:
        assert time.monotonic() - began >= lock._STALE
        assert locks(tmp_path) == ["lock-2.json"]
        check()
    assert "waiting up to" in caplog.text and "takes over" in caplog.text
    assert locks(tmp_path) == []


def zombie() -> tuple[subprocess.Popen[bytes], int]:
    """Return a process that has ended and that nobody has waited for, and when it started."""
    process = subprocess.Popen(["true"])
    while (stat := Path(f"/proc/{process.pid}/stat").read_text().split())[2] != "Z":
        time.sleep(0.001)
    return process, int(stat[21])


def test_an_owner_that_is_gone_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, began = zombie()
    parent, start = os.getppid(), lock._start_of(os.getppid())
    monkeypatch.setattr(lock, "_STALE", 3600.0)
    monkeypatch.setattr(lock.time, "sleep", lambda _: pytest.fail("waits"))
    gone = [
        {},  # this thread itself, interrupted before it could release
        {"started": 1},  # its number belongs to another process now
        {"pid": ended.pid, "started": began},
    ]
    for changes in gone:
        leave(tmp_path, **changes)
        with held(tmp_path):
            assert locks(tmp_path) == ["lock-2.json"]
    for changes in ({"pid": parent, "started": start}, {"started": 1, **ELSEWHERE}):
        leave(tmp_path, **changes)  # it lives, or nobody here can know
        with pytest.raises(pytest.fail.Exception, match="waits"), held(tmp_path):
            pass
        (tmp_path / "lock-1.json").unlink()
    ended.wait()


def test_another_thread_is_another_run(tmp_path: Path) -> None:
    refused = []

    def second() -> None:
        try:
            with held(tmp_path):
                pass
        except WorkdirInUse as error:
            refused.append(str(error))

    with held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refused) == 1 and str(os.getpid()) in refused[0]


def test_the_owner_notices_that_its_lock_was_removed(tmp_path: Path) -> None:
    with pytest.raises(WorkdirLost, match="removed, or another run took over"):  # noqa: SIM117
        with held(tmp_path) as check:
            check()
            (tmp_path / "lock-1.json").unlink()
            check()


def test_a_suspended_owner_finds_another_and_leaves_it_alone(tmp_path: Path) -> None:
    with held(tmp_path) as check:
        (tmp_path / "lock-1.json").unlink()
        theirs = leave(tmp_path, **ELSEWHERE).read_bytes()
        time.sleep(5 * lock._BEAT)  # its counter goes on
        assert (tmp_path / "lock-1.json").read_bytes() == theirs
        with pytest.raises(WorkdirLost):
            check()
    assert (tmp_path / "lock-1.json").read_bytes() == theirs


@pytest.mark.parametrize("owner", [{"started": 1}, ELSEWHERE])
def test_of_many_readers_of_a_stale_lock_one_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: dict[str, Any]
) -> None:
    monkeypatch.setattr(lock, "_STALE", 0.1)
    rounds, readers = (20, 6) if owner == {"started": 1} else (3, 6)
    for number in range(rounds):
        folder = tmp_path / str(number)
        leave(folder, **owner)
        start, done = threading.Barrier(readers), threading.Barrier(readers)
        owners: list[bool] = []

        def read(folder=folder, start=start, done=done, owners=owners) -> None:
            start.wait()
            try:
                with held(folder) as check:
                    done.wait()  # until all others were refused
                    check()
                    owners.append(True)
            except WorkdirInUse:
                owners.append(False)
                done.wait()

        threads = [threading.Thread(target=read) for _ in range(readers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(owners) == [False] * (readers - 1) + [True]
        assert locks(folder) == []


def test_a_folder_that_cannot_be_used_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--workdir: cannot use .*file.*Choose another"):  # noqa: SIM117
        with held(tmp_path / "file"):
            pass
