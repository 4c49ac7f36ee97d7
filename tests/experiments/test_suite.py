"""The suite: one line per run, failures next to results, resuming by the same command."""

import json
import re
import signal
import sys
import time

import pytest
from processes import Run, environment
from test_members import suite

from nat_jax import main, train
from nat_jax.experiments import claims, members
from nat_jax.experiments.suite import run_suite
from nat_jax.runtime.preemption import Preempted
from nat_jax.training import workdir as workdirs

PART = ("table3_imagenet", "fig2_epochs", "table1_softmax", "table1_square")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(train, "train_and_evaluate", trained)


def part(names=PART[2:], seeds=(0, 1), **changes):
    return suite(suite__experiments=names, seeds=seeds, **changes)


def trained(config, workdir):
    """Leave what a finished run leaves, with accuracies that follow from its config."""
    supervised = config.targets.kind == "labels"
    value = 0.4 + 0.01 * config.seeds[0] + (0.01 if config.optim.loss == "softmax" else 0.0)
    rows = [
        {"layer": layer, "network": network, "probe": probe, "labels": "all", "mean": found}
        for network, found in (("untrained", 0.2), ("supervised" if supervised else "nat", value))
        for layer in ("z", "conv2")
        for probe in (*config.eval.probes, *(["own"] if supervised and layer == "z" else []))
    ]
    data = {split: {"records": 10_000, "source": "digits"} for split in ("train", "test")}
    result = {"table": rows, "protocol": data}
    workdirs.write_json(workdir / "results" / "pretrain.json", result)
    judged = {"step": 10, "epoch": 2.0, "eval/conv2/mlp_probe/all": 0.35}
    (workdir / "metrics.jsonl").write_text(json.dumps(judged) + "\n")
    print("a table")


def lines(captured):
    return [line for line in captured.out.splitlines() if line.startswith("[")]


def test_every_run_has_a_line_and_the_result_its_verdicts(tmp_path, capsys):
    path = run_suite(part(PART), tmp_path)
    captured = capsys.readouterr()
    assert len(lines(captured)) == 7
    assert re.fullmatch(
        r"\[1/7\] table3_imagenet/seed0: MLP on conv2 40.0 %, untrained 20.0 % "
        r"\(\d+ s; \d:\d\d:\d\d passed, about \d:\d\d:\d\d left\)",
        lines(captured)[0],
    )
    assert "a table" not in captured.out
    assert "a table" in (tmp_path / "table3_imagenet" / "seed0" / "log.txt").read_text()
    result = json.loads(path.read_text())
    verdicts = {one["claim"]: one["verdict"] for one in result["claims"]}
    assert list(verdicts.values()) == [claims.HOLDS, claims.HOLDS, claims.HOLDS]
    assert result["value"] == 3
    three, curve, square = result["claims"]
    assert three["ours"]["NAT"]["values"] == pytest.approx([0.4, 0.41])
    assert three["protocol"].startswith("MLP of width 16, 40 epochs, on conv2; 10,000 training")
    assert [d["of"] for d in curve["differences"]] == [
        "gain of the first half",
        "gain of the second half",
    ]
    assert square["differences"][0]["mean"] == pytest.approx(-0.01)
    assert [point["epoch"] for point in result["curve"]] == [0, 2, 6]
    page = (tmp_path / "report.html").read_text()
    table = (tmp_path / "results" / "suite.md").read_text()
    for words in ("36.0 against 12.0", "trend holds", "NAT - untrained"):
        assert words in page and words in table
    assert page.count("<svg") == 1 and "NAT 40.5 ± 0.7" in table
    assert (tmp_path / "pictures" / "suite_curve.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "report.html").unlink()
    main.TASKS["report"].run(part(PART), tmp_path)
    assert (tmp_path / "report.html").read_text() == page


def test_a_sweep_shows_the_probes_that_all_its_runs_have(tmp_path):
    path = run_suite(part(("table3_imagenet", "fig2_period"), seeds=(0,)), tmp_path)
    result = json.loads(path.read_text())
    shown = {tuple(found) for found in result["sweeps"]["fig2_period"].values()}
    assert shown == {("mlp_probe", "linear_probe")}
    assert any(row["probe"] == "knn" for row in result["layers"])  # of the run that both share


def test_a_failing_run_stops_no_other_and_is_tried_again(tmp_path, monkeypatch, capsys):
    def sometimes(config, workdir):
        if config.optim.loss == "softmax" and config.seeds == (1,):
            raise train.TrainingDiverged("step 3: the loss is nan")
        trained(config, workdir)

    monkeypatch.setattr(train, "train_and_evaluate", sometimes)
    result = json.loads(run_suite(part(), tmp_path).read_text())
    captured = capsys.readouterr()
    assert sum("FAILED: TrainingDiverged: step 3" in line for line in lines(captured)) == 1
    assert "1 of 4 runs have no result" in captured.out
    assert result["claims"][0]["ours"]["softmax"]["seeds"] == [0]
    assert "TrainingDiverged" in (tmp_path / "report.html").read_text()
    calls = []
    monkeypatch.setattr(
        train, "train_and_evaluate", lambda c, w: (calls.append(w.name), trained(c, w))
    )
    result = json.loads(run_suite(part(), tmp_path).read_text())
    assert calls == ["seed1"]
    assert sum("(done before)" in line for line in lines(capsys.readouterr())) == 3
    assert result["claims"][0]["ours"]["softmax"]["seeds"] == [0, 1]


def test_a_stop_goes_through_and_the_same_call_goes_on(tmp_path, monkeypatch, capsys):
    calls = []

    def stopped(config, workdir):
        calls.append(workdir)
        if len(calls) == 3:
            raise Preempted(signal.SIGTERM, 5)
        trained(config, workdir)

    monkeypatch.setattr(train, "train_and_evaluate", stopped)
    with pytest.raises(Preempted):
        run_suite(part(), tmp_path)
    result = json.loads((tmp_path / "results" / "suite.json").read_text())
    assert [run["error"] for run in result["runs"]] == [None] * 2 + ["not run yet"] * 2
    assert result["claims"][0]["differences"][0]["seeds"] == [0]
    run_suite(part(), tmp_path)
    assert calls[3:] == [calls[2], *calls[4:]] and len(calls) == 5
    assert "2 runs done before; about" in capsys.readouterr().out


def test_other_probes_are_judged_again_and_other_training_is_refused(tmp_path, monkeypatch):
    calls = []

    def counted(config, workdir):
        calls.append(workdir)
        trained(config, workdir)

    monkeypatch.setattr(train, "train_and_evaluate", counted)
    run_suite(part(), tmp_path)
    run_suite(part(eval__mlp_epochs=3), tmp_path)
    assert len(calls) == 8
    run = members.plan(part())[0]
    workdirs.write_json(tmp_path / run.folder / "config.json", {"epochs": 1.0})
    with pytest.raises(ValueError, match="holds a run with .* = .*; this suite has .*--workdir"):
        run_suite(part(), tmp_path)
    assert len(calls) == 8


def test_a_mistake_is_found_before_any_run(tmp_path):
    with pytest.raises(ValueError, match=r"data.per_class: expected at most \d+"):
        run_suite(part(data__per_class=1000), tmp_path)
    with pytest.raises(ValueError, match="optim.momentum: expected at least 0"):
        run_suite(part(optim__momentum=-1.0), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_suite_goes_on_to_the_same_result(tmp_path):
    """One run is cut short by SIGTERM, one by SIGKILL; the numbers are those of an unbroken one."""

    def start(folder):
        command = [
            *(sys.executable, "-m", "nat_jax.main", "--config=configs/paper/suite.py:digits"),
            "--config.suite.experiments=('table3_imagenet', 'table1_softmax')",
            *("--config.seeds=(0,)", "--config.epochs=60", "--config.checkpoint.every_epochs=5"),
            *("--config.eval.probes=('knn',)", "--config.eval.mlp_epochs=2"),
            f"--workdir={tmp_path / folder}",
        ]
        return Run(tmp_path / "logs", [command], [environment()])

    def kill_in(folder, number):
        run = start("broken")
        deadline = time.monotonic() + 600
        while not list((tmp_path / "broken" / folder).glob("seed0/checkpoints/[0-9]*")):
            if time.monotonic() > deadline or run.processes[0].poll() is not None:
                break  # there is nothing to cut short: the exit code says so
            time.sleep(0.05)
        run.processes[0].send_signal(number)
        return run.wait()

    assert kill_in("table3_imagenet", signal.SIGTERM) == [128 + signal.SIGTERM]
    assert kill_in("table1_softmax", signal.SIGKILL) == [-signal.SIGKILL]
    rows = {}
    for folder in ("broken", "whole"):
        start(folder).finish()
        result = json.loads((tmp_path / folder / "results" / "suite.json").read_text())
        rows[folder] = [run["rows"] for run in result["runs"]]
    assert rows["broken"] == rows["whole"] and all(rows["whole"])
