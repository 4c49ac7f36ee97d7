"""The whole run: train, judge, report, resume, and every mistake in one message."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from processes import assert_same_bits, leaves_of
from project import ROOT
from small_run import tiny

from nat_jax import train
from nat_jax.errors import InputError
from nat_jax.evaluate.evaluator import Evaluator
from nat_jax.input.bad_records import BadRecordError
from nat_jax.runtime.preemption import Preempted
from nat_jax.training import lock
from nat_jax.training.checkpoint import CheckpointError, Checkpoints
from nat_jax.training.lock import WorkdirInUse, WorkdirLost


def assert_same(one, other):
    assert_same_bits(leaves_of(one), leaves_of(other))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return an uninterrupted run's folder and final state."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train.train_and_evaluate(tiny(), workdir)


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_may_never_re_match(tmp_path):
    c = tiny(epochs=1.0, assign__reassign_every_epochs=0)
    state = train.train_and_evaluate(c, tmp_path)
    np.testing.assert_array_equal(state.assignment, np.arange(1437))
    assert all("assign/moved" not in row for row in rows_of(tmp_path))
    assert not any("re-match" in said for said in health_of(tmp_path))


def health_of(workdir):
    return json.loads((workdir / "results" / "health.json").read_text())


def test_a_run_leaves_what_it_promises(finished):
    workdir, state = finished
    assert not list(workdir.glob("lock-*"))
    assert int(state.step) == 15
    np.testing.assert_array_equal(np.sort(state.assignment), np.arange(1437))
    assert not np.array_equal(state.assignment, np.arange(1437))
    rows = rows_of(workdir)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 15]
    matching = [row["step"] for row in rows if "assign/cosine_after" in row]
    # Epochs 0 and 2 of 5 steps; the row of step 6 has the matching of step 5.
    assert matching == [2, 4, 6, 12, 14, 15]
    for row in (row for row in rows if row["step"] in matching):
        assert row["assign/cosine_after"] >= row["assign/cosine_before"]
    result = json.loads((workdir / "results/pretrain.json").read_text())
    assert {"task", "metric", "value", "untrained", "protocol", "run"} <= result.keys()
    networks = {row["network"] for row in result["table"]}
    assert networks == {"raw pixels", "untrained", "nat"}
    assert result["protocol"]["probes"]["knn"]["k"] == 20
    page = (workdir / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 3
    assert json.loads((workdir / "config.json").read_text())["model"]["dim"] == 6


def test_running_again_reads_the_results(finished, capsys, monkeypatch):
    workdir, state = finished
    before = (workdir / "metrics.jsonl").read_text()
    monkeypatch.delattr(Evaluator, "score")  # evaluating again would need it
    again = train.train_and_evaluate(tiny(), workdir)
    assert_same(state, again)
    assert (workdir / "metrics.jsonl").read_text() == before
    assert "raw pixels" in capsys.readouterr().out


class _Killed(Exception):
    pass


def interrupted_at(monkeypatch, workdir, step, **changes):
    """Run until just before a step, as a kill would end it."""
    real = train._Loop._dispatch

    def dispatch(self, at, state, batch):
        if at == step:
            raise _Killed
        return real(self, at, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_dispatch", dispatch)
        with pytest.raises(_Killed):
            train.train_and_evaluate(tiny(**changes), workdir)


def test_resuming_gives_the_same_bits(finished, tmp_path, monkeypatch):
    workdir, state = finished
    interrupted_at(monkeypatch, tmp_path, 12)
    assert [row["step"] for row in rows_of(tmp_path)] == [2, 4, 6, 8, 10]
    assert_same(state, train.train_and_evaluate(tiny(), tmp_path))
    quiet = [{k: v for k, v in row.items() if "time/" not in k} for row in rows_of(workdir)]
    again = [{k: v for k, v in row.items() if "time/" not in k} for row in rows_of(tmp_path)]
    assert quiet == again


ALL_IMAGES = dict(
    assign__scope="dataset",
    assign__reassign_every_epochs=1,
    batch_size=64,
    data__per_class=32,  # so that all images have a feature after an epoch: one problem to compile
    eval__probes=(),
)


@pytest.mark.slow
def test_all_images_are_matched_between_epochs_and_after_a_kill_again(tmp_path, monkeypatch):
    """The kill is between a matching and the next save."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    state = train.train_and_evaluate(tiny(**ALL_IMAGES), whole)
    assert state.features.dtype == np.float16 and state.features.shape == (320, 6)
    np.testing.assert_array_equal(np.sort(state.assignment), np.arange(320))
    assert "assign/cosine_after" not in rows_of(whole)[1]  # nothing was to be matched yet
    matched = [row for row in rows_of(whole) if "assign/cosine_after" in row]
    assert [row["step"] for row in matched] == [6, 12]  # after epochs of 5 steps
    for row in matched:
        assert row["assign/cosine_after"] > row["assign/cosine_before"] + 0.1
        assert {"time/match_seconds", "time/match_share", "assign/moved"} <= row.keys()
    text = " ".join(health_of(whole))
    assert "before re-matching after epoch 1, features" in text and "effective rank" in text

    interrupted_at(monkeypatch, killed, 10, **ALL_IMAGES)
    with pytest.raises(ValueError, match="holds a run with assign.scope = 'dataset'; this one has"):
        train.train_and_evaluate(tiny(**ALL_IMAGES | dict(assign__scope="batch")), killed)
    assert_same(state, train.train_and_evaluate(tiny(**ALL_IMAGES), killed))
    quiet = [
        [{k: v for k, v in row.items() if "time/" not in k} for row in rows_of(folder)]
        for folder in (whole, killed)
    ]
    assert quiet[0] == quiet[1]


def test_a_run_whose_lock_is_gone_saves_nothing_more(finished, tmp_path, monkeypatch):
    _, state = finished
    real = train._Loop._dispatch

    def dispatch(self, at, state, batch):
        if at == 7:
            (tmp_path / "lock-1.json").unlink()
        return real(self, at, state, batch)

    def close(self):
        close_as_it_is(self)
        raise CheckpointError("another run has removed what was being saved")

    close_as_it_is = Checkpoints.close
    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_dispatch", dispatch)
        patch.setattr(Checkpoints, "close", close)
        with pytest.raises(WorkdirLost, match="goes on from the last checkpoint"):
            train.train_and_evaluate(tiny(), tmp_path)
    assert saved_steps(tmp_path) == [5]
    assert_same(state, train.train_and_evaluate(tiny(), tmp_path))


def test_a_run_in_use_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.1)
    with (
        ThreadPoolExecutor(1) as other,
        lock.held(tmp_path),
        pytest.raises(WorkdirInUse, match=f"process {os.getpid()} on .*--workdir="),
    ):
        other.submit(train.train_and_evaluate, tiny(), tmp_path).result()
    assert not list(tmp_path.iterdir())


def test_the_comparison_of_bits_can_fail(finished, tmp_path):
    _, state = finished
    other = train.train_and_evaluate(tiny(seeds=(1,)), tmp_path)
    with pytest.raises(AssertionError):
        assert_same(state, other)


def test_a_lost_config_does_not_let_another_run_resume(tmp_path):
    train.train_and_evaluate(tiny(epochs=1.0), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds a run with optim.learning_rate = 0.1"):
        train.train_and_evaluate(tiny(epochs=1.0, optim__learning_rate=0.2), tmp_path)


def test_images_without_labels_and_a_broken_one_among_them(tmp_path, caplog):
    folder = tmp_path / "flat"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i:03}.jpg")
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "001.png")
    (folder / "001.jpg").unlink()
    broken = folder / "020.jpg"
    broken.write_bytes(broken.read_bytes()[:100])
    changes = dict(data__source=f"folder:{folder}", batch_size=16, epochs=2.0)
    caplog.set_level("INFO", "nat_jax")
    state = train.train_and_evaluate(tiny(**changes), tmp_path / "run")
    assert f"no labels in folder:{folder} (train)" in caplog.text
    assert caplog.text.index("no labels in") < caplog.text.index("targets on")  # before training
    np.testing.assert_array_equal(np.sort(state.assignment), np.arange(len(state.assignment)))
    assert "1 of 58 records are bad: " in caplog.text and "020.jpg" in caplog.text
    assert caplog.text.count("1 of 1 sampled records have more than 8 bits") == 1
    assert not (tmp_path / "run/results/pretrain.json").exists()
    assert (tmp_path / "run/pictures/neighbours_z.png").exists()
    assert (tmp_path / "run/report.html").exists()
    with pytest.raises(BadRecordError, match="020.jpg"):
        train.train_and_evaluate(tiny(**changes, data__on_bad_record="error"), tmp_path / "strict")


def test_more_epochs_extend_a_finished_run_with_or_without_scores(tmp_path, caplog):
    caplog.set_level("INFO", "nat_jax")
    result = tmp_path / "results/pretrain.json"
    train.train_and_evaluate(tiny(epochs=1.0), tmp_path)
    unscored = tiny(epochs=1.0, eval__probes=(), eval__labels_per_class=(200,))
    train.train_and_evaluate(unscored, tmp_path)
    assert json.loads(result.read_text())["run"]["steps"] == 5  # still those of this network
    unscored.epochs, unscored.eval.every_epochs = 3.0, 1
    longer = train.train_and_evaluate(unscored, tmp_path)
    assert int(longer.step) == 15
    assert [row["step"] for row in rows_of(tmp_path)][-1] == 15
    assert not any(key.startswith("eval/") for row in rows_of(tmp_path) for key in row)
    assert "eval.probes is empty: probes are skipped, nearest neighbours are" in caplog.text
    assert not result.exists()
    assert "No scores: eval.probes is empty" in (tmp_path / "report.html").read_text()


def test_another_protocol_judges_a_finished_run_anew(finished, capsys):
    workdir, _ = finished
    train.train_and_evaluate(tiny(eval__knn_k=5), workdir)
    result = json.loads((workdir / "results/pretrain.json").read_text())
    assert result["protocol"]["probes"]["knn"]["k"] == 5


def test_several_seeds_share_a_table(two_seeds):
    table = json.loads((two_seeds / "results/pretrain.json").read_text())["table"]
    trained = next(row for row in table if row["network"] == "nat")
    assert trained["seeds"] == [0, 3] and trained["std"] is not None
    assert {path.name for path in two_seeds.glob("seed-*")} == {"seed-0", "seed-3"}


@pytest.mark.parametrize(
    "change",
    [
        dict(targets__kind="basis", assign__block=64),
        pytest.param(
            dict(targets__storage="virtual", model__dtype="bfloat16"), marks=pytest.mark.slow
        ),
        dict(epochs=0.0, steps=5, optim__warmup_steps=2, optim__schedule="cosine"),
    ],
    ids=str,
)
def test_the_variants_train(tmp_path, change):
    state = train.train_and_evaluate(tiny(**(dict(epochs=1.0) | change)), tmp_path)
    assert int(state.step) == 5
    np.testing.assert_array_equal(np.sort(state.assignment), np.arange(1437))
    last = rows_of(tmp_path)[-1]
    assert last["assign/worst_status"] == 0
    assert last["assign/cosine_after"] > last["assign/cosine_before"] + 0.1
    said = " ".join(json.loads((tmp_path / "results/health.json").read_text()))
    assert "re-matched in epoch 0 only" in said
    assert ("without any learning" in said) == ("targets__kind" not in change)


def test_both_solvers_find_matchings_of_one_value(finished, tmp_path):
    workdir, _ = finished
    train.train_and_evaluate(tiny(assign__solver="scipy", epochs=1.0), tmp_path)
    ours, theirs = rows_of(workdir)[0], rows_of(tmp_path)[0]
    assert ours["step"] == theirs["step"] == 2
    np.testing.assert_allclose(
        ours["assign/cosine_after"], theirs["assign/cosine_after"], atol=1e-4
    )


def test_judging_on_the_way_changes_nothing(finished, tmp_path):
    _, state = finished
    watched = train.train_and_evaluate(tiny(eval__every_epochs=1), tmp_path)
    assert_same(state, watched)
    judged = [row["step"] for row in rows_of(tmp_path) if "eval/z/knn/all" in row]
    assert judged == [5, 10]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(data__source="imagnet"), "unknown source 'imagnet'; known: digits, folder:PATH"),
        (dict(data__source="folder:no/such/place"), "no/such/place"),
        (dict(model__name="vgg"), "model.name: unknown 'vgg'. Known: alexnet, convnet"),
        (dict(assign__solver="greedy"), "unknown 'greedy'. Known: auction"),
        (dict(batch_size=2048), "2048.*1437|1437.*2048"),
        (dict(assign__block=512), "assign.block: expected at most batch_size = 256; got 512"),
        (dict(eval__layers=("conv9",)), "unknown layer 'conv9'. Known: last_conv, conv1, z"),
        (dict(eval__knn_k=2000), "eval.knn_k: expected at most 1437"),
        (dict(eval__labels_per_class=(200,)), "asks for 200 records of every class of digits"),
        (dict(seeds=(0, -1)), "expected distinct integers in"),
    ],
)
def test_a_mistake_is_one_message_before_anything_is_done(tmp_path, caplog, change, message):
    caplog.set_level("INFO", "nat_jax")
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(tiny(**change), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    assert "targets on" not in caplog.text  # what set-up logs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model__dim=8), "holds a run with model.dim = 6; this one has 8"),
        (dict(seeds=(9,)), "holds a run with seeds"),
        (dict(data__white=4095), "holds a run with data.white = 0; this one has 4095"),
    ],
)
def test_another_run_in_the_workdir_is_refused(finished, change, message):
    workdir, _ = finished
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(tiny(**change), workdir)


def test_changed_images_behind_the_same_name_are_refused(tmp_path):
    path = tmp_path / "data.npz"

    def write(seed):
        rng = np.random.default_rng(seed)
        np.savez(
            path,
            x_train=rng.integers(0, 256, (58, 8, 8), np.uint8),  # as many as in the folder above
            y_train=np.arange(58) % 4,
            x_test=rng.integers(0, 256, (16, 8, 8), np.uint8),
            y_test=np.arange(16) % 4,
        )

    changes = dict(data__source=f"arrays:{path}", batch_size=16, epochs=1.0)
    write(0)
    train.train_and_evaluate(tiny(**changes), tmp_path / "run")
    write(1)
    with pytest.raises(CheckpointError, match="belongs to another run.*data"):
        train.train_and_evaluate(tiny(**changes), tmp_path / "run")


def test_divergence_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    real = train.sharding.global_batch
    calls = []

    def poisoned(batch, mesh):
        calls.append(1)
        if len(calls) == 8:  # a weight that is not a number makes the loss so
            batch = batch | {"weight": np.full_like(batch["weight"], np.nan)}
        return real(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(train.sharding, "global_batch", poisoned)
        with pytest.raises(
            train.TrainingDiverged, match="step 8: the loss is nan.*that of step 5, is saved"
        ):
            train.train_and_evaluate(tiny(), tmp_path)
    assert int(train.train_and_evaluate(tiny(), tmp_path).step) == 15


def test_a_signal_saves_and_the_same_call_goes_on(finished, tmp_path, monkeypatch):
    _, state = finished
    real = train._Loop._dispatch

    def dispatch(self, at, state, batch):
        if at == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, at, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, "_dispatch", dispatch)
        with pytest.raises(Preempted) as caught:
            train.train_and_evaluate(tiny(), tmp_path)
    assert caught.value.code == 143 and caught.value.step == 8
    assert (tmp_path / "checkpoints" / "8").is_dir()
    assert_same(state, train.train_and_evaluate(tiny(), tmp_path))


@pytest.mark.parametrize("where", ["_dispatch", "_after"])
def test_a_signal_at_the_last_step_is_not_lost(tmp_path, monkeypatch, where):
    """The next seed, and judging, are for the next call."""
    real = getattr(train._Loop, where)

    def told(self, at, state, other):
        result = real(self, at, state, other)
        if at == (14 if where == "_dispatch" else 15):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train._Loop, where, told)
        with pytest.raises(Preempted) as caught:
            train.train_and_evaluate(tiny(seeds=(0, 1)), tmp_path)
    assert caught.value.code == 143 and caught.value.step == 15
    assert (tmp_path / "seed-0" / "checkpoints" / "15").is_dir()
    assert not (tmp_path / "seed-0" / "results").exists()
    assert not (tmp_path / "seed-1").exists()


def command(workdir, *changes):
    file = ROOT / "configs" / "smoke.py"
    return [
        sys.executable,
        "-m",
        "nat_jax.main",
        f"--config={file}",
        f"--workdir={workdir}",
        "--config.eval.every_epochs=0",
        "--config.eval.probes=('knn',)",
        "--config.checkpoint.every_epochs=0",
        "--config.checkpoint.every_steps=3",
        *changes,
    ]


def saved_steps(workdir):
    return [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]


def run_until_killed(workdir, log, more_steps):
    """Start the command, and kill -9 it once it has saved a checkpoint beyond those there."""
    before = max(saved_steps(workdir), default=0)
    with log.open("w") as stream:
        process = subprocess.Popen(command(workdir), stdout=stream, stderr=stream)
    deadline = time.monotonic() + 300
    while max(saved_steps(workdir), default=0) < before + more_steps:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run had ended before it could be killed"
    return before


@pytest.mark.slow
def test_kill_at_any_moment_then_the_same_line_again(tmp_path):
    """Kill -9 twice in the middle of training; the end equals an uninterrupted run's."""
    killed, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    run_until_killed(killed, log, 6)
    before = run_until_killed(killed, log, 6)
    resumed = re.search(r"resumed .* at step (\d+) of", log.read_text())
    assert before and resumed and int(resumed[1]) >= before
    assert "another run" not in log.read_text()
    for workdir in (killed, whole):
        subprocess.run(command(workdir), check=True, capture_output=True, timeout=300)
    rows = [
        [{k: v for k, v in row.items() if "time/" not in k} for row in rows_of(workdir)]
        for workdir in (killed, whole)
    ]
    assert rows[0] == rows[1]
    digests = [Checkpoints(workdir / "checkpoints").digests() for workdir in (killed, whole)]
    assert digests[0] == digests[1]
    tables = [
        json.loads((workdir / "results/pretrain.json").read_text())["table"]
        for workdir in (killed, whole)
    ]
    assert tables[0] == tables[1]
