"""The benchmarks start: each answers --help, and the smallest run of one writes its results."""

import importlib
import json
import os
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from project import ROOT, python

BENCHMARKS = ROOT / "benchmarks"
COMMANDS = (
    *("ablations", "aot", "assign", "fuzz_assign", "fuzz_input", "gpu_checks", "input_pipeline"),
    *("kill_resume", "match_points", "scale", "solver_for_training", "step"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_answered(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


@pytest.fixture
def fuzz_input(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("fuzz_input")


def test_random_inputs_are_read_as_a_person_reads_them(fuzz_input: ModuleType) -> None:
    outcomes, kinds, found = fuzz_input.fuzz(range(60), trains=False)
    assert not found
    assert outcomes["read"] > outcomes["refused"] > 0
    assert {"tree", "zip", "arrays", "wrong"} < {*kinds}


@pytest.mark.slow
def test_random_inputs_are_trained_on_and_judged(fuzz_input: ModuleType) -> None:
    outcomes, _, found = fuzz_input.fuzz(range(0, 60, fuzz_input.TRAINED))
    assert not found and outcomes["trained"] > 1


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("nat_jax.input.sources.folder_layout._WORD", re.compile("[a-z]+")),  # "Training" is none
        ("nat_jax.input.sources.folder_layout._folded", str),
        ("nat_jax.input.sources.zip_archive._plain_name", lambda name, path: name),
        ("nat_jax.input.sources.index_cache._left_out", lambda listing: []),
        ("nat_jax.input.sources.index_cache.list_zip", lambda path: 1 / 0),
        ("nat_jax.evaluate.evaluator.check_learnable", lambda train, test: None),
    ],
)
def test_random_inputs_find_what_is_read_wrongly(
    fuzz_input: ModuleType, monkeypatch: pytest.MonkeyPatch, place: str, wrong: Any
) -> None:
    monkeypatch.setattr(place, wrong)
    assert any(fuzz_input.fuzz([seed], trains=False)[2] for seed in range(300))


@pytest.mark.slow
def test_a_small_run_of_assign_writes_times_and_checks_totals(tmp_path) -> None:
    output = tmp_path / "assign.json"
    options = ["--sizes=16", "--batches=", "--families=sphere,matched", "--solvers=auction,scipy"]
    python(BENCHMARKS / "assign.py", *options, "--seeds=1", f"--output={output}")
    found = json.loads(output.read_text())
    assert {row["solver"] for row in found["results"]} == {"auction", "scipy"}
    assert all(row["cpu_ms"] > 0 and row["gap"] < 1e-6 for row in found["results"])
    assert output.with_suffix(".md").read_text().startswith("# Assignment solvers")


@pytest.fixture
def gpu_checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_checks")


def test_gpu_checks_go_on_with_what_is_not_done(
    gpu_checks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, ran = tmp_path / "gpu.json", list[str]()
    outcomes = {"quick": "done", "broken": "failed: ValueError: no", "lacking": "needs grain"}

    def outcome(part: str, seconds: int, options: Any) -> dict[str, Any]:
        ran.append(part)
        return {"status": outcomes[part], "seconds": 1.0}

    def run(*options: str) -> dict[str, str]:
        monkeypatch.setattr(sys, "argv", ["gpu_checks.py", f"--output={output}", *options])
        ran.clear()
        with pytest.raises(SystemExit) as ended:
            gpu_checks.main()
        found = json.loads(output.read_text())["parts"]
        assert ended.value.code == any("failed" in part["status"] for part in found.values())
        return {name: part["status"] for name, part in found.items()}

    monkeypatch.setattr(gpu_checks, "finished", outcome)
    limits = {"quick": 60, "broken": 60, "long": 6000, "lacking": 60}
    monkeypatch.setattr(gpu_checks, "parts", lambda: {k: (v, k) for k, v in limits.items()})
    first = run()
    assert ran == ["quick", "broken", "lacking"]
    assert first.pop("long").startswith("skipped: takes up to 6000 s")
    assert first == outcomes
    outcomes |= {"broken": "done", "long": "done"}
    assert run("--part=broken,quick")["broken"] == "done" and ran == ["broken"]
    assert set(run("--minutes=200").values()) == {"done", "needs grain"}
    assert ran == ["long", "lacking"]


def test_gpu_checks_refuse_what_they_cannot_go_on_with(
    gpu_checks: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "gpu.json"
    for text, options, complaint in (
        ("{", [], "is no JSON"),
        ('{"benchmark": "step"}', [], "is of another program"),
        ('{"dry": true, "parts": {}}', [], "is of a run with another --dry"),
        ("{}", [f"--wheels={tmp_path}"], "no .whl files"),
        ("{}", ["--part=lap,laps"], "no laps; known: kernel-tests, loop-tests, lap"),
    ):
        output.write_text(text)
        monkeypatch.setattr(sys, "argv", ["gpu_checks.py", f"--output={output}", *options])
        with pytest.raises(SystemExit) as ended:
            gpu_checks.main()
        assert complaint in f"{ended.value.code} {capsys.readouterr().err}"
        assert output.read_text() == text


@pytest.mark.slow
def test_gpu_checks_run_without_packages_for_data_and_configs(tmp_path: Path) -> None:
    absent, output = tmp_path / "absent", tmp_path / "gpu.json"
    absent.mkdir()
    for name in ("grain", "ml_collections", "tensorflow_datasets", "array_record"):
        problem = f"raise ModuleNotFoundError({name!r}, name={name!r})\n"
        (absent / f"{name}.py").write_text(problem)
    some = "--part=kernel-tests,lap,alexnet-f32,input,cifar10"
    program = [BENCHMARKS / "gpu_checks.py", "--dry", f"--output={output}", some]
    python(*program, PYTHONPATH=str(absent))
    first = json.loads(output.read_text())["parts"]
    assert {name: part["status"] for name, part in first.items() if part["status"] != "done"} == {
        "input": "needs grain",
        "cifar10": "needs grain",
    }
    assert first["kernel-tests"]["outcomes"]["passed"] > 0
    assert {row["solver"] for row in first["lap"]["results"]} > {"auction", "scipy"}
    assert [row["name"] for row in first["alexnet-f32"]["steps"]] == ["NAT"]
    python(*program)
    parts = json.loads(output.read_text())["parts"]
    assert parts["input"]["images_per_second"]["step, fed by the input"] > 0
    assert parts["cifar10"]["finished"] and parts["cifar10"]["scores"]
    assert parts["lap"] == first["lap"]  # not repeated


@pytest.mark.slow
def test_a_part_of_gpu_checks_that_crashes_or_hangs_is_ended(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    program = f"""
import os, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_checks

def slow(options, save):
    save(seen=1)
    time.sleep(600)

crash = lambda options, save: os.abort()
broken = lambda options, save: 1 / 0
wrong = lambda options, save: save(wrong=["two and two are five"])
parts = dict(slow=(1, slow), crash=(6, crash), broken=(6, broken), wrong=(6, wrong))
gpu_checks.parts = lambda: parts
sys.argv = ["gpu_checks.py", "--dry", "--output", {str(output)!r}]
gpu_checks.main()
"""
    done = python("-c", program, code=1)
    parts = json.loads(output.read_text())["parts"]
    assert parts["slow"]["status"].startswith("stopped") and parts["slow"]["seen"] == 1
    assert parts["crash"]["status"] == "failed: exit status -6"
    assert parts["broken"]["status"] == "failed: ZeroDivisionError: division by zero"
    assert parts["wrong"]["status"] == "done" and "two and two are five" in done.stderr
