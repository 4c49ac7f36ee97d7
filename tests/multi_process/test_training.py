"""Training in several processes: the same result, written once, through every kind of end."""

import json
import runpy
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from processes import HERE, LOST, Run, assert_close, assert_same_bits, leaves_of, state

from nat_jax import train
from nat_jax.training import assignment_state, checkpoint, lock


@pytest.fixture(scope="module")
def two(start, tmp_path_factory) -> tuple[Path, Run]:
    """Run two processes with two devices each to the end."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    run = start(workdir, processes=2, devices=2)
    run.finish()
    return workdir, run


def test_two_processes_end_as_one_alone(start, two, tmp_path):
    config = runpy.run_path(str(HERE / "tiny.py"))["get_config"]()
    config.data.source = f"arrays:{start.args[0]}"
    alone = leaves_of(train.train_and_evaluate(config, tmp_path))
    assert_same_bits(state(two[0], 0), state(two[0], 1))
    assert_close(alone, state(two[0]))


def test_what_is_written_once_is_written_once(two):
    workdir, run = two
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    for name in ("config.json", "report.html", "results/pretrain.json"):
        assert (workdir / name).is_file()
    assert len(list(workdir.glob("results/judged/pretrain-*.json"))) == 1
    assert not [*workdir.glob(".*"), *workdir.glob("lock-*")]
    result = json.loads((workdir / "results" / "pretrain.json").read_text())
    assert result["run"]["processes"] == 2
    assert run.output(0).count("report: ") == 1
    assert run.lines(1) == []


@pytest.mark.slow
def test_one_process_matches_all_images_for_both(start, tmp_path):
    """The permutation and the features are sharded over both."""
    workdir = tmp_path / "run"
    changes = {"scope": "dataset", "storage": "sharded", "reassign_every_epochs": "1"}
    arguments = [f"--config.assign.{key}={value}" for key, value in changes.items()]
    start(workdir, *arguments, processes=2, devices=2).finish()
    assert_same_bits(state(workdir, 0), state(workdir, 1))
    rows = state(workdir)[".assignment"]
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(rows)))
    assert state(workdir)[".features"].shape == (len(rows), 6)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    matched = [row for row in map(json.loads, lines) if "assign/cosine_after" in row]
    assert [row["step"] for row in matched] == [6, 11, 16, 21]  # after epochs of 5 steps
    assert all(row["assign/cosine_after"] > row["assign/cosine_before"] for row in matched)
    digests = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True).digests()
    expected = state(workdir)[".features"]
    assert digests["features"] == f"{assignment_state.checksum(expected):016x}"


def assert_lost(run: Run, victim: int, seconds: float) -> None:
    """Wait until the others have ended, each with a message, in the time they are given."""
    run.processes[victim].wait(300)
    died = time.monotonic()
    codes = run.wait(seconds + 60)
    assert time.monotonic() - died < seconds
    for index, code in enumerate(codes):
        if index != victim:
            reason = "another process" if code == LOST[0] else "another task died"
            assert code in LOST and reason in run.output(index), run.output(index)


@pytest.mark.slow
def test_interrupted_in_every_way_it_ends_with_the_same_bits(start, two, tmp_path):
    """Ctrl-C, a kill during a save, a kill of the coordinator, SIGTERM while judging; same line."""
    workdir = tmp_path / "run"
    places = dict(processes=2, devices=2)

    first = start(workdir, **places, STEP_SECONDS="0.15")
    first.wait_for("step 2/24")
    first.processes[0].send_signal(signal.SIGINT)
    assert first.wait() == [130, 143]
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert 2 < saved < 16

    # The other one's half of the save will never come. To wait for it would take till the heartbeat
    # fails, after 100 seconds.
    second = start(workdir, **places, DIE_AT="16")
    second.wait_for(f"resumed {workdir} at step {saved} of 24")
    assert_lost(second, victim=1, seconds=40)
    assert second.processes[0].returncode == LOST[0]

    heartbeat = "--distributed_heartbeat=30"  # the bound, if a save is under way just then
    third = start(workdir, heartbeat, **places, STEP_SECONDS="0.15")
    third.wait_for("step 18/24")
    third.processes[0].kill()
    assert_lost(third, victim=0, seconds=80)

    fourth = start(workdir, **places, JUDGE_SECONDS="600")
    fourth.wait_for("judging begins")
    assert f"resumed {workdir} at step 16 of 24" in fourth.output(0)
    for process in reversed(fourth.processes):
        process.send_signal(signal.SIGTERM)
    assert fourth.wait(60) == [-signal.SIGTERM, -signal.SIGTERM]

    start(workdir, **places).finish()
    assert_same_bits(state(two[0]), state(workdir))
    assert (workdir / "results" / "pretrain.json").is_file()


@pytest.mark.slow
def test_other_numbers_of_processes_and_devices_go_on(start, two, tmp_path):
    """Four go on from what one has saved, one from what four have when one of them is killed."""
    workdir = tmp_path / "run"
    start(workdir, "--config.steps=8").finish()
    heartbeat = "--distributed_heartbeat=30"
    run = start(workdir, heartbeat, processes=4, devices=1, STEP_SECONDS="0.15")
    run.wait_for("step 18/24")
    assert f"resumed {workdir} at step 8 of 24" in run.output(0)
    run.processes[2].kill()
    assert_lost(run, victim=2, seconds=80)
    last = start(workdir, devices=2)
    last.finish()
    assert f"resumed {workdir} at step 16 of 24" in last.output(0)
    assert_close(state(two[0]), state(workdir))


@pytest.mark.slow
def test_a_damaged_copy_is_found_before_it_is_saved(start, tmp_path):
    run = start(tmp_path / "run", processes=2, devices=2, DAMAGE_AT="10")
    assert run.wait() == [2, 2]
    for index in (0, 1):
        assert "step 16: the copies of 'assignment' differ: " in run.output(index)
        assert "process 1" in run.output(index)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.seeds=({process},)",
            "seeds: process 1 of 2 differs from process 0: [1] instead of [0]",
        ),
        ("--workdir={process}", "--workdir: process 0 writes into "),
    ],
)
def test_processes_that_were_started_differently_are_refused(start, tmp_path, argument, message):
    run = start(tmp_path / "run", argument, processes=2)
    assert run.wait() == [2, 2]
    for index in (0, 1):
        assert f"nat_jax: process {index}: {message}" in run.output(index)
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.slow
def test_a_second_run_is_refused_in_all_its_processes(start, tmp_path):
    with lock.held(tmp_path / "run"):
        run = start(tmp_path / "run", processes=2)
        assert run.wait() == [2, 2]
    assert "nat_jax: process 0: --workdir: another run uses " in run.output(0)
    assert "nat_jax: process 1: process 0 cannot use " in run.output(1)
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_others_within_the_heartbeat(start, tmp_path):
    """Two runs at the same time, as both wait for it: the first process hangs, or the second."""
    places = dict(processes=2, devices=1, STEP_SECONDS="0.5")
    runs = [start(tmp_path / name, "--distributed_heartbeat=10", **places) for name in "ab"]
    for victim, run in enumerate(runs):
        run.wait_for("step 2/24")
        run.processes[victim].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    codes = [run.processes[1 - victim].wait(120) for victim, run in enumerate(runs)]
    assert set(codes) <= set(LOST)
    assert time.monotonic() - stopped < 150
    for victim, run in enumerate(runs):
        run.processes[victim].kill()
        run.wait()


@pytest.mark.slow
def test_seeds_follow_each_other_and_the_later_ones_can_be_stopped(start, tmp_path):
    workdir = tmp_path / "run"
    arguments = ("--config.seeds=(0, 1)", "--config.eval.every_epochs=2")
    run = start(workdir, *arguments, processes=2, devices=1, STEP_SECONDS="0.15")
    run.wait_for("seed-1")
    run.wait_for("ETA 0:00:0")
    end = time.monotonic() + 120
    while "step 3/24" not in run.output(0).partition("seed-1")[2]:
        assert time.monotonic() < end, run.output(0)
        time.sleep(0.05)
    run.processes[1].send_signal(signal.SIGTERM)
    assert run.wait() == [143, 143]
    assert "SIGTERM: all processes stop" in run.output(0)
    saved = [int(p.name) for p in (workdir / "seed-1" / "checkpoints").iterdir()]
    assert 3 < max(saved) < 24
    start(workdir, *arguments, processes=2, devices=1).finish()
    rows = json.loads((workdir / "results" / "pretrain.json").read_text())["table"]
    assert rows and all(len(row["values"]) == 2 for row in rows)
    for seed in (0, 1):
        lines = (workdir / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines()
        judged = [r["step"] for r in map(json.loads, lines) if "eval/z/knn/all" in r]
        assert judged == [10, 20]
    np.testing.assert_array_equal(np.load(workdir / "state-0.npz")[".step"], 24)
