"""The benchmarks start: each answers --help, and the smallest run of one writes its results."""

import json
import os
import runpy
import sys

import pytest
from project import ROOT, python

BENCHMARKS = ROOT / "benchmarks"
COMMANDS = (
    *("ablations", "aot", "assign", "fuzz_assign", "input_pipeline", "kill_resume", "scale"),
    *("solver_for_training", "step"),
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


@pytest.mark.slow
def test_a_small_run_of_assign_writes_times_and_checks_totals(tmp_path) -> None:
    output = tmp_path / "assign.json"
    options = ["--sizes=16", "--batches=", "--families=sphere,matched", "--solvers=auction,scipy"]
    python(BENCHMARKS / "assign.py", *options, "--seeds=1", f"--output={output}")
    found = json.loads(output.read_text())
    assert {row["solver"] for row in found["results"]} == {"auction", "scipy"}
    assert all(row["cpu_ms"] > 0 and row["gap"] < 1e-6 for row in found["results"])
    assert output.with_suffix(".md").read_text().startswith("# Assignment solvers")
