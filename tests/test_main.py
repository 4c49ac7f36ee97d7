"""The command line: mistakes are one message, exit code 2, and nothing written."""

import subprocess
import sys

import pytest
from project import ROOT

DIGITS = f"--config={ROOT / 'configs' / 'digits.py'}"


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "nat_jax.main", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing. Known: "),
        (["--config=configs/nothing.py"], "there is no file configs/nothing.py. Known: "),
        (
            [DIGITS, "--config.batchsize=64"],
            "unknown key 'batchsize'. Did you mean batch_size? Known",
        ),
        ([DIGITS, "--config.optim.lr=1"], "unknown key 'optim.lr'."),
        ([DIGITS, "--config.model.options.depth=3"], "Set it in a config file of your own"),
        (["--config", "configs/nothing.py"], "there is no file configs/nothing.py. Known: "),
        ([DIGITS, "--config.batch_size=many"], "many"),
        ([DIGITS, "--config.task=knm"], "task: unknown 'knm'. Known: pretrain"),
        ([DIGITS, "--workdri=x"], "Unknown command line flag 'workdri'"),
        ([DIGITS, "digits"], "unexpected argument 'digits'"),
        ([DIGITS, "--config.data.source=imagnet"], "unknown source 'imagnet'; known: digits"),
        ([DIGITS, "--workdir=/dev/null/run"], "cannot use /dev/null/run"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, arguments, message):
    result = run(tmp_path, *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_config_without_its_function_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("")
    result = run(tmp_path, "--config=empty.py")
    assert result.returncode == 2
    assert "the file has no function get_config()" in result.stderr


def test_an_error_that_is_not_the_users_keeps_its_traceback(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    result = run(tmp_path, f"--config={broken}")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.slow
def test_a_config_of_the_library_runs_from_anywhere(tmp_path):
    result = run(tmp_path, "--config=configs/smoke.py", "--config.epochs=1")
    assert result.returncode == 0, result.stderr
    assert "raw pixels" in result.stdout
    assert (tmp_path / "runs" / "smoke" / "report.html").exists()
