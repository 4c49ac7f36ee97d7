"""Rows on disk survive kills, and the terminal shows them."""

import io
import json
import math
import sys
import time
from pathlib import Path

import pytest

from nat_jax.runtime.atomic_files import CannotWrite
from nat_jax.training import metrics
from nat_jax.training.metrics import MetricsWriter, Progress, Timer


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_row_is_on_disk_before_close(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "run", resume_step=None)
    writer.write({"step": 1, "train/loss": 0.5})
    assert rows(tmp_path / "new" / "run") == [{"step": 1, "train/loss": 0.5}]
    writer.write({"step": 2, "train/loss": math.nan, "assign/gap": math.inf})
    writer.close()
    text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert rows(tmp_path / "new" / "run")[1] == {"step": 2, "train/loss": None, "assign/gap": None}


def test_a_row_needs_a_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None)
    with pytest.raises(ValueError, match=r"expected a 'step'; got \['train/loss'\]"):
        writer.write({"train/loss": 0.5})
    writer.close()


def test_a_full_disk_is_one_message(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None)
    writer._file = open("/dev/full", "a")  # noqa: SIM115
    for write in (lambda: writer.write({"step": 1}), writer.close):
        with pytest.raises(CannotWrite, match="metrics.jsonl: No space left .* Make room"):
            write()


@pytest.mark.parametrize(
    ("resume", "kept"), [(None, [1, 2, 3]), (2, [1, 2]), (0, []), (9, [1, 2, 3])]
)
def test_resuming_drops_later_rows_and_a_torn_line(
    tmp_path: Path, resume: int | None, kept: list[int]
) -> None:
    lines = [json.dumps({"step": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "train/lo']))
    writer = MetricsWriter(tmp_path, resume_step=resume)
    writer.write({"step": 10})
    writer.close()
    assert [row["step"] for row in rows(tmp_path)] == [*kept, 10]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_process_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path / "run", resume_step=0)
    writer.write({"step": 1})
    writer.close()
    stream = io.StringIO()
    progress = Progress(start=0, total=2, stream=stream)
    progress.update({"step": 1, "train/loss": 0.5})
    progress.close()
    assert not (tmp_path / "run").exists() and not stream.getvalue()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the tensorboard extra is not installed")
    writer = MetricsWriter(tmp_path, resume_step=0, tensorboard=True)
    writer.write({"step": 7, "train/loss": 0.5, "eval/z/knn/all": 0.9})
    writer.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content and b"eval/z/knn/all" in content


def test_missing_tensorboard_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ImportError, match=r"pip install 'nat_jax\[tensorboard\]'"):
        MetricsWriter(tmp_path, resume_step=0, tensorboard=True)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that stands still unless a test moves ``clock[0]``."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_timer_shares(clock: list[float]) -> None:
    timer = Timer()
    for matched, duration in ((False, 1.0), (False, 1.0), (True, 4.0), (True, 4.0)):
        with timer.waiting():
            clock[0] += 0.25
        clock[0] += duration - 0.25
        timer.step(50, matched=matched)
    with timer.paused():
        clock[0] += 1000.0
    row = timer.window()
    assert row["time/images_per_second"] == pytest.approx(200 / 10)
    assert row["time/data_share"] == pytest.approx(1.0 / 10)
    # a matching step takes 4 s instead of 1, and half of the steps match
    assert row["time/match_share"] == pytest.approx(0.75 / 2)

    clock[0] += 2.0
    timer.step(50, matched=False)
    row = timer.window()
    assert row["time/images_per_second"] == pytest.approx(25)
    assert row["time/data_share"] == 0 and "time/match_share" not in row


def test_timer_claims_no_match_share_without_both_kinds(clock: list[float]) -> None:
    timer = Timer()
    for _ in range(3):
        clock[0] += 1.0
        timer.step(10, matched=True)
    assert "time/match_share" not in timer.window()


LOGGED = {
    "step": 50,
    "train/loss": 0.25,
    "assign/cosine_before": 0.1,
    "assign/cosine_after": 0.456,
    "assign/moved": 0.62,
    "time/images_per_second": 5210.4,
    "time/data_share": 0.031,
    "time/match_share": 0.12,
}


def test_lines_where_there_is_no_terminal(clock: list[float]) -> None:
    stream = io.StringIO()
    progress = Progress(start=10, total=110, stream=stream)
    clock[0] += 1000.0  # compilation, which the estimate leaves out
    progress.update(LOGGED)
    clock[0] += 40.0
    progress.update({"step": 70, "train/loss": 0.2})
    scores = {"eval/z/knn/all": 0.8768, "eval/z/knn/10 per class": 0.5}
    progress.update({"step": 70, "epoch": 2.0, **scores})
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 50/110  loss 0.2500  cosine 0.100 -> 0.456  moved 62%  5,210 img/s  data 3%  "
        "match 12%",
        "step 70/110  loss 0.2000  ETA 0:01:20",
        "step 70/110  evaluated: z/knn 0.877",
    ]


def test_bar_keeps_the_last_cosines_and_starts_where_the_run_does() -> None:
    stream = io.StringIO()
    progress = Progress(start=40, total=100, stream=stream, bar=True)
    progress.update(LOGGED)
    progress.update({"step": 60, "eval/z/knn/all": 0.8768})
    progress.update({"step": 100, "train/loss": 0.125})
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    assert "100/100" in last and "loss 0.1250" in last and "cosine 0.100 -> 0.456" in last
    assert "40/100" in stream.getvalue()
    assert "evaluated: z/knn 0.877\n" in stream.getvalue()


def test_a_terminal_gets_the_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    Progress(start=0, total=3, stream=stream).close()
    assert "0/3" in stream.getvalue()
