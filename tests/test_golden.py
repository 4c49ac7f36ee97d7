"""Results that no refactoring may change, and a run and a bundle of version 0.1 that must load.

The table of the digits demo is compared in test_shown_commands.py, which runs the demo.
"""

import json
import zipfile
from pathlib import Path

import golden
import numpy as np
import pytest

QUICK = ("table", "supervised_softmax", "host")
SLOW = tuple(case for case in golden.CASES if case not in QUICK)


def load(case: str, folder: Path = golden.FOLDER) -> dict[str, np.ndarray]:
    with np.load(folder / f"{case}.npz") as file:
        return dict(file)


def assert_equals_stored(case: str, found: dict[str, np.ndarray]) -> None:
    """Compare with the stored values: to the bit on the machine that they are from."""
    stored = load(case)
    exact = stored["machine"] == found["machine"]
    tolerances = {"losses": (1e-5, 0), "rows": (0, 0), "features": (1e-4, 1e-5)}
    for name, (relative, absolute) in tolerances.items():
        if exact:
            np.testing.assert_array_equal(found[name], stored[name], f"{case}: {name}")
        else:
            np.testing.assert_allclose(
                found[name], stored[name], relative, absolute, err_msg=f"{case}: {name}"
            )


@pytest.mark.parametrize(
    "cases",
    [
        QUICK,
        pytest.param(SLOW, marks=pytest.mark.slow),
        pytest.param((golden.EIGHT_DEVICES,), marks=pytest.mark.slow),
    ],
    ids=", ".join,
)
def test_training_gives_what_it_gave(cases: tuple[str, ...], tmp_path: Path) -> None:
    golden.save_in_process(cases, tmp_path)
    for case in cases:
        assert_equals_stored(case, load(case, tmp_path))


@pytest.mark.slow
def test_training_gives_the_same_in_64_bit_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    golden.save_in_process(("table",), tmp_path)
    found = load("table", tmp_path)
    assert "x64" in str(found["machine"])
    assert_equals_stored("table", found)


@pytest.mark.parametrize("change", ["losses", "rows", "features"])
def test_a_change_is_noticed(change: str) -> None:
    for machine in ("the same", "another"):
        found = load("table")
        if machine == "another":
            found["machine"] = np.array(machine)
        assert_equals_stored("table", found)
        if change == "losses":
            found["losses"][-1] *= 1.0001
        elif change == "rows":
            found["rows"][[3, 5]] = found["rows"][[5, 3]]
        else:
            found["features"][2] *= 1.001
        with pytest.raises(AssertionError):
            assert_equals_stored("table", found)


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
    rows = load("table")["rows"]

    def losses() -> list[float]:
        return [row["train/loss"] for row in metrics.read_rows(workdir) if "train/loss" in row]

    before = losses()
    finished = train_and_evaluate(config, workdir)  # nothing is left to do
    np.testing.assert_array_equal(finished.assignment, rows)
    assert int(finished.step) == golden.STEPS
    config.steps = golden.STEPS + 1  # in an epoch without re-matching
    extended = train_and_evaluate(config, workdir)
    assert int(extended.step) == golden.STEPS + 1
    np.testing.assert_array_equal(extended.assignment, rows)
    assert losses()[:-1] == before and len(before) == golden.STEPS


def test_a_bundle_of_version_0_1_gives_the_same_features(tmp_path: Path) -> None:
    import nat_jax

    bundle = nat_jax.load(_unzip("bundle_0.1", tmp_path))
    stored = load("bundle_0.1_features")
    found = np.asarray(bundle(stored["images"]))
    np.testing.assert_allclose(found, stored["z"], rtol=1e-4, atol=1e-5)
