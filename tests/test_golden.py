"""Results that no refactoring may change, and a run and a bundle of version 0.1 that must load."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import golden
import numpy as np
import pytest

SLOW = ("virtual", "basis", "supervised_square", "two_views", golden.EIGHT_DEVICES)
ALL = (*golden.CASES, golden.EIGHT_DEVICES)


def assert_equals_stored(case: str, outcome: golden.Outcome) -> None:
    """Compare with the stored values: to the bit on the machine that they are from."""
    with np.load(golden.FOLDER / f"{case}.npz") as stored:
        machine, losses, rows, features = (
            json.loads(str(stored["machine"])),
            stored["losses"],
            stored["rows"],
            stored["features"],
        )
    if machine == golden.machine():
        np.testing.assert_array_equal(outcome.losses, losses)
        np.testing.assert_array_equal(outcome.rows, rows)
        np.testing.assert_array_equal(outcome.features, features)
    else:
        np.testing.assert_allclose(outcome.losses, losses, rtol=1e-5)
        np.testing.assert_array_equal(outcome.rows, rows)
        np.testing.assert_allclose(outcome.features, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in golden.CASES]
)
def test_training_gives_what_it_gave(case: str, tmp_path: Path) -> None:
    assert_equals_stored(case, golden.train(case, tmp_path))


@pytest.mark.slow
def test_training_on_eight_devices_gives_what_it_gave(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import pathlib, golden, test_golden\n"
        f"outcome = golden.train({golden.EIGHT_DEVICES!r}, pathlib.Path(sys.argv[1]))\n"
        f"test_golden.assert_equals_stored({golden.EIGHT_DEVICES!r}, outcome)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=golden.ROOT,
        env=os.environ | golden.EIGHT_DEVICES_ENVIRONMENT,
        check=True,
    )


@pytest.mark.parametrize("change", ["loss", "row", "feature"])
def test_a_change_is_noticed(change: str) -> None:
    with np.load(golden.FOLDER / "table.npz") as stored:
        losses, rows, features = (stored[k].copy() for k in ("losses", "rows", "features"))
    assert_equals_stored("table", golden.Outcome(losses.tolist(), rows, features))
    if change == "loss":
        losses[-1] *= 1.0001
    elif change == "row":
        rows[[3, 5]] = rows[[5, 3]]
    else:
        features[2] *= 1.001
    with pytest.raises(AssertionError):
        assert_equals_stored("table", golden.Outcome(losses.tolist(), rows, features))


def test_alexnet_has_the_shapes_it_had() -> None:
    assert golden.alexnet_shapes() == json.loads((golden.FOLDER / "alexnet.json").read_text())


def _unzip(name: str, folder: Path) -> Path:
    with zipfile.ZipFile(golden.FOLDER / f"{name}.zip") as archive:
        archive.extractall(folder)
    return folder / name


def test_a_run_of_version_0_1_goes_on(tmp_path: Path) -> None:
    from nat_jax.train import train_and_evaluate
    from nat_jax.training import metrics

    workdir = _unzip("run_0.1", tmp_path)
    config = golden.smoke_config(golden.CASES["table"])
    with np.load(golden.FOLDER / "table.npz") as stored:
        rows, losses = stored["rows"], stored["losses"]
    finished = train_and_evaluate(config, workdir)  # nothing is left to do
    np.testing.assert_array_equal(finished.assignment, rows)
    assert int(finished.step) == golden.STEPS
    config.steps = golden.STEPS + 1  # in an epoch without re-matching
    extended = train_and_evaluate(config, workdir)
    assert int(extended.step) == golden.STEPS + 1
    np.testing.assert_array_equal(extended.assignment, rows)
    written = [row["train/loss"] for row in metrics.read_rows(workdir) if "train/loss" in row]
    np.testing.assert_array_equal(written[: golden.STEPS], losses)
    assert len(written) == golden.STEPS + 1


def test_a_bundle_of_version_0_1_gives_the_same_features(tmp_path: Path) -> None:
    import nat_jax

    bundle = nat_jax.load(_unzip("bundle_0.1", tmp_path))
    with np.load(golden.FOLDER / "bundle_0.1_features.npz") as stored:
        images, expected = stored["images"], stored["z"]
    found = np.asarray(bundle(images))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_digits_demo_gives_the_table_it_gave(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "nat_jax.main",
            "--config=configs/digits.py",
            f"--workdir={tmp_path}",
        ],
        cwd=golden.ROOT,
        check=True,
    )
    result = json.loads((tmp_path / "results" / "pretrain.json").read_text())
    expected = json.loads((golden.FOLDER / "digits.json").read_text())
    found = {_key(row): row["values"] for row in result["table"]}
    assert found.keys() == {_key(row) for row in expected["table"]}
    for row in expected["table"]:
        np.testing.assert_allclose(found[_key(row)], row["values"], atol=0.003, err_msg=_key(row))


def _key(row: dict) -> str:
    return ", ".join(
        (row.get("layer") or row["features"], row["network"], row["probe"], row["labels"])
    )
