"""The command line: mistakes are one message, exit code 2, and nothing written."""

import json
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


# What is wrong with the command line, and what the message says.
MISTAKES = [
    ([], "--config is missing. Known: "),
    (["--config.batch_size=3"], "--config is missing. Known: "),
    (["--config"], "--config: expected a file. Known: "),
    (["--config", "--workdir=x"], "--config: expected a file. Known: "),
    (["--config=configs/nothing.py"], "there is no file configs/nothing.py. Known: "),
    (["--config", "configs/nothing.py"], "there is no file configs/nothing.py. Known: "),
    (["configs/digits.py"], "'configs/digits.py'; write --config=configs/digits.py"),
    (["config=x.py"], "'config=x.py'; write --config=x.py"),
    ([DIGITS, "digits"], "unexpected argument 'digits'; write --name=value"),
    ([DIGITS, "--workdri=x"], "unknown flag --workdri. Did you mean --workdir?"),
    ([DIGITS, "--batch_size=3"], "Did you mean --config.batch_size?"),
    ([DIGITS, "--learning_rate=3"], "Did you mean --config.optim.learning_rate?"),
    ([DIGITS, "--config.batchsize=64"], "unknown key 'batchsize'. Did you mean batch_size? Known"),
    ([DIGITS, "--config.optim.lr=1"], "unknown key 'optim.lr'. Known there: optim.decay_start"),
    (
        [DIGITS, "--config.lr=1"],
        "steps, task. --help lists the keys that matter, with their groups",
    ),
    ([DIGITS, "--config.momentum=1"], "Did you mean optim.momentum?"),
    ([DIGITS, "--config.optim=1"], "'optim' is a group. Set one of its keys: optim.decay_start"),
    ([DIGITS, "--config.model.options.depth=3"], "Set it in a config file of your own"),
    ([DIGITS, "--config.batch_size=many"], "batch_size: expected a whole number; got 'many'"),
    ([DIGITS, "--config.epochs=1,5"], "epochs: expected a number; got '1,5'"),
    ([DIGITS, "--config.data.flip=maybe"], "data.flip: expected True or False; got 'maybe'"),
    ([DIGITS, "--config.seeds=x"], "seeds: expected whole numbers, for instance --config.seeds="),
    ([DIGITS, "--config.task=knm"], "task: unknown 'knm'. Known: pretrain"),
]
# Config files with a mistake, and what the message says.
WRONG_FILES = [
    ("def get_config(:", "wrong.py, line 1: invalid syntax"),
    ("import nothing_at_all", "wrong.py, line 1: ModuleNotFoundError: No module named"),
    ("", "the file has no function get_config()"),
    ("def get_config():\n    return None", "must return a ConfigDict; it returned a NoneType"),
    (
        "def get_config():\n    return 1 / 0",
        "wrong.py, line 2: ZeroDivisionError: division by zero",
    ),
    (
        "from nat_jax import config\n"
        "def get_config():\n    c = config.default()\n    c.batchsize = 3\n    return c",
        "wrong.py, line 4: unknown key 'batchsize'. Did you mean batch_size?",
    ),
    (
        "from nat_jax import config\n"
        "def get_config():\n    c = config.default()\n    c.epochs = 'x'\n    return c",
        "wrong.py, line 4: TypeError: ",
    ),
]
# Gives each command line of a list to the program, and prints exit codes and what was printed.
# jax is imported once for all: the copies that fork makes of this process start in no time.
FORKED = """
import json, os, sys
from nat_jax import config, main
said = []
for arguments in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(writing, 1), os.dup2(writing, 2)
        sys.argv = ["main", *arguments]
        try:
            main.run()
        except SystemExit as error:
            os._exit(error.code)
        finally:
            os._exit(99)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    said.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text])
print(json.dumps(said))
"""


def test_a_mistake_is_one_message(tmp_path):
    lines = [list(arguments) for arguments, _ in MISTAKES]
    for number, (text, _) in enumerate(WRONG_FILES):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "wrong.py").write_text(text + "\n")
        lines.append([f"--config={number}/wrong.py"])
    program = [sys.executable, "-W", "ignore", "-c", FORKED, json.dumps(lines)]
    before = set(tmp_path.iterdir())
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = [message for _, message in (*MISTAKES, *WRONG_FILES)]
    for line, message, (code, text) in zip(lines, expected, json.loads(done.stdout), strict=True):
        assert code == 2, (line, text)
        assert message in text, (line, text)
        assert text.splitlines()[-1].startswith("nat_jax: "), (line, text)
        assert "Traceback" not in text, (line, text)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DIGITS, "--config.data.source=imagnet"], "unknown source 'imagnet'; known: digits"),
        ([DIGITS, "--workdir=/dev/null/run"], "cannot use /dev/null/run"),
    ],
)
def test_a_mistake_that_needs_a_look_is_one_message(tmp_path, arguments, message):
    result = run(tmp_path, *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_below_the_users_file_keeps_its_traceback(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import json\n\ndef get_config():\n    return json.loads('')\n")
    result = run(tmp_path, f"--config={broken}")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "JSONDecodeError" in result.stderr


def test_the_package_is_a_program_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "nat_jax", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage: python -m nat_jax.main"), done.stderr


@pytest.mark.slow
def test_a_config_of_the_library_runs_from_anywhere(tmp_path):
    result = run(tmp_path, "--config=configs/smoke.py", "--config.epochs=1")
    assert result.returncode == 0, result.stderr
    assert "raw pixels" in result.stdout
    assert (tmp_path / "runs" / "smoke" / "report.html").exists()
