"""Every command that README, docs, launch, CONTRIBUTING and the configs' headers show.

The slow tests run them: ``python -m nat_jax.main`` lines of blocks without ``needs:``, in the order
of the pages, each once, in one empty folder with images of its own for PATH; and the headers' lines
for embedded data. What .ci/run runs (pip, pytest, linters) is not run a second time.

Commands within sentences and tables are parsed: those of ``nat_jax.main`` as in test_readme, those
of ``benchmarks`` by whether the program is there and has the flags. They are not run, because they
take minutes to hours and want data or hardware.
"""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import ROOT
from test_readme import CHECKS, INSTALLS, Block, blocks, check_main, commands

FOLDERS = ("docs", "launch")
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md"))),
]
MAIN = ["python", "-m", "nat_jax.main"]
# test_contributing runs this one, which needs the recipes of the page.
ELSEWHERE = {"python -m nat_jax.main --config=configs/bars.py"}
# What a reader puts in, and what the test does; a training is then a short one.
STAND_IN = ("folder:PATH", "folder:images")
SHORT = ["--config.epochs=1", "--config.batch_size=32", "--config.eval.probes=knn"]
EMBEDDED = ("configs/digits.py", "configs/smoke.py")


def spans(text: str) -> list[str]:
    """Return the commands of a page's sentences and tables that begin with python."""
    text = re.sub(r"^[ \t]*```.*?^[ \t]*```[ \t]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))
    found = (command for span in found for command in commands(span))
    return [span for span in found if re.match(r"([A-Z_]+=\S+ )*python3? ", span)]


def header(path: Path) -> list[str]:
    """Return the commands in the docstring of a config."""
    words = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return [line.strip() for line in words.splitlines() if line.startswith("    python ")]


def flags_of(program: Path) -> set[str]:
    """Return the flags that a program gives to argparse."""
    return {
        argument.value
        for node in ast.walk(ast.parse(program.read_text("utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument"
        for argument in node.args
        if isinstance(argument, ast.Constant)
    }


def complaint(command: str) -> str | None:
    """Say what is wrong with a command that begins with python, as far as looking tells."""
    words = shlex.split(command)
    while "=" in words[0]:
        words.pop(0)
    if words[:3] == MAIN:
        if "--help" in words or "--config=..." in words:
            return None
        try:
            check_main(words[3:])
        except Exception as error:
            return f"{command}: {error}"
        return None
    if words[1] == "-m":
        there = importlib.util.find_spec(words[2])
        return None if there else f"{command}: there is no module {words[2]}"
    program = ROOT / words[1]
    if program.suffix != ".py" or not program.is_file():
        return f"{command}: there is no program {words[1]}"
    given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    unknown = sorted(given - flags_of(program))
    return f"{command}: {words[1]} has no {', '.join(unknown)}" if unknown else None


def to_run(page: str, text: str) -> Iterator[str]:
    """Yield the commands of a page's blocks that the slow test runs."""
    for block in blocks(text, page):
        if block.language in ("bash", "sh", "console") and not block.marker.startswith("needs:"):
            for command in commands(block.body):
                if shlex.split(command)[:3] == MAIN and command not in ELSEWHERE:
                    yield " ".join(command.split())


def lacks(command: str) -> str | None:
    """Say why a command cannot be run in an empty folder, if so."""
    if STAND_IN[0] in command or any(config in command for config in EMBEDDED):
        return None
    return f"{command}: has data of its own; mark the block with <!-- needs: what it needs -->"


def texts() -> dict[str, str]:
    return {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}


CONFIGS = sorted((ROOT / "configs").rglob("[!_]*.py"))
IN_BLOCKS = [command for page, text in texts().items() for command in to_run(page, text)]
IN_HEADERS = [command for path in CONFIGS for command in header(path)]
RUN = [*IN_BLOCKS, *(c for c in IN_HEADERS if any(config in c for config in EMBEDDED))]


@pytest.mark.parametrize("page", sorted(texts()))
def test_commands_in_sentences_and_tables_are_right(page: str) -> None:
    assert [wrong for span in spans(texts()[page]) if (wrong := complaint(span))] == []


def test_commands_in_headers_are_right() -> None:
    assert [wrong for command in IN_HEADERS if (wrong := complaint(command))] == []
    assert all(header(path) for path in CONFIGS)


def test_commands_in_blocks_can_be_run_or_say_what_they_need() -> None:
    assert [wrong for command in IN_BLOCKS if (wrong := lacks(command))] == []


def made_by(target: str) -> list[str]:
    """Return what make would run for a target."""
    line = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.replace(".venv/bin/", "") for line in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test", "slow", "lint"])
def test_make_runs_what_is_tested(target: str) -> None:
    known = {*INSTALLS, *CHECKS, *IN_BLOCKS, "ruff format --check .", "python3 -m venv .venv"}
    ran = made_by(target)
    assert [line for line in ran if line not in known and not line.startswith("touch ")] == []
    assert len(ran) > len(made_by(".venv/installed"))


WRONG = """
`python benchmarks/step.py --rounds 3
--outputt x` and `python benchmarks/nothing.py`, `FOO=1 python benchmarks/assign.py --costs DIR`
```bash
python -m nat_jax.main --config=configs/cifar10.py
```
<!-- needs: CIFAR-10 -->
```bash
python -m nat_jax.main --config=configs/cifar10.py --config.seeds="(1,)"
```
`python -m nat_jax.main --config=configs/digits.py --config.batchsize=3` and
`python3 -m venv .venv && python -m nothing`
"""


def test_a_wrong_command_is_noticed() -> None:
    wrong = [complaint(span) for span in spans(WRONG)]
    assert wrong[0] is not None and wrong[0].endswith("benchmarks/step.py has no --outputt")
    assert wrong[1] is not None and "there is no program benchmarks/nothing.py" in wrong[1]
    assert wrong[2] is None
    assert wrong[3] is not None and "batchsize" in wrong[3]
    assert wrong[4:] == [None, "python -m nothing: there is no module nothing"]
    (command,) = to_run("page.md", WRONG)
    assert "<!-- needs:" in str(lacks(command))


class Place:
    """A folder in which commands are run as a reader would; the same one is run once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._printed: dict[str, str] = {}
        random = np.random.default_rng(0)
        for split, count in (("train", 40), ("test", 20)):
            for name in ("cats", "dogs"):
                (folder / "images" / split / name).mkdir(parents=True)
                for number in range(count):
                    pixels = random.integers(0, 255, (32, 40, 3), np.uint8)
                    Image.fromarray(pixels).save(folder / f"images/{split}/{name}/{number}.jpg")
        shutil.copy2(folder / "images/test/cats/0.jpg", folder / "a.png")
        shutil.copy2(folder / "images/test/dogs/0.jpg", folder / "b.png")

    def run(self, command: str) -> str:
        """Run a command, the training that it builds on before it; return what it prints."""
        if command in self._printed:
            return self._printed[command]
        words = shlex.split(command)
        training = " ".join(words[:4])
        if "task=convert" not in command and training != command and STAND_IN[0] not in command:
            self.run(training)
        arguments = [word.replace(*STAND_IN) for word in words[1:]]
        if STAND_IN[0] in command and "task=" not in command:
            arguments += SHORT
        self._printed[command] = self._call(arguments)
        return self._printed[command]

    def run_python(self, block: Block) -> None:
        self._call(["-c", block.body])

    def _call(self, arguments: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, f"{arguments}:\n{done.stderr[-3000:]}"
        return done.stdout

    def exists(self, name: str) -> bool:
        return (self._folder / name).exists()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("reader"))


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(RUN), ids=lambda line: line.partition("=")[2])
def test_a_shown_command_runs(place: Place, command: str) -> None:
    printed = place.run(command)
    named = re.findall(r"^(?:report|result|bundle|features): (.+)$", printed, re.MULTILINE)
    assert named or "task=convert" in command
    assert [name for name in named if not place.exists(name)] == []


@pytest.mark.slow
def test_python_for_the_run_of_the_readme(place: Place) -> None:
    page = "README.md"
    (block,) = (b for b in blocks(texts()[page], page) if b.marker.endswith("configs/digits.py"))
    place.run("python -m nat_jax.main --config=configs/digits.py --config.task=export")
    place.run_python(block)
    with pytest.raises(AssertionError, match="there is no folder"):
        place.run_python(block._replace(body=block.body.replace("runs/digits", "runs/nothing")))


@pytest.mark.slow
def test_a_command_that_fails_is_noticed(place: Place) -> None:
    with pytest.raises(AssertionError, match="there is no file configs/nothing.py"):
        place.run("python -m nat_jax.main --config=configs/nothing.py")
