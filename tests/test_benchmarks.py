"""The benchmarks start: each answers --help, and the smallest run of one writes its results."""

import importlib
import json
import os
import re
import runpy
import sys
from types import ModuleType
from typing import Any

import pytest
from project import ROOT, python

BENCHMARKS = ROOT / "benchmarks"
COMMANDS = (
    *("ablations", "aot", "assign", "fuzz_assign", "fuzz_input", "input_pipeline", "kill_resume"),
    *("scale", "solver_for_training", "step"),
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
