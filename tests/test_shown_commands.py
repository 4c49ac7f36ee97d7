"""The ``python -m nat_jax.main`` commands of the pages run, as a reader would run them.

Those of blocks without ``needs:`` and of the headers of configs with embedded data, in the order of
the pages, each once, in one folder with images of its own for PATH. `test_pages.py` checks all
others without running them: they take hours, or want data or hardware. .ci/run runs pip, pytest and
the linters.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pages import CHECKS, MAIN, SHELL, TEXTS, blocks, commands, header
from PIL import Image
from project import ROOT, python

# test_contributing.py runs this one, which needs the recipes of the page.
ELSEWHERE = {"python -m nat_jax.main --config=configs/bars.py"}
PLACEHOLDER = ("folder:PATH", "folder:images")  # what a reader fills in, and what the test does
# Shorter than shown: `make release-check` runs the complete demo.
DEMO = "python -m nat_jax.main --config=configs/digits.py"
ONE_SEED = ["--config.seeds=(0,)"]
SHORT = ["--config.epochs=1", "--config.batch_size=32", "--config.eval.probes=knn"]
EMBEDDED = ("configs/digits.py", "configs/smoke.py")


def to_run(page: str, text: str) -> Iterator[str]:
    """Yield the commands of a page's blocks that the slow test runs."""
    for block in blocks(text, page):
        if block.language in SHELL and not block.marker.startswith("needs:"):
            for command in commands(block.body):
                if shlex.split(command)[:3] == MAIN and command not in ELSEWHERE:
                    yield " ".join(command.split())


def runs_here(command: str) -> bool:
    """Whether a command needs no data but a folder of images."""
    return PLACEHOLDER[0] in command or any(config in command for config in EMBEDDED)


CONFIGS = sorted((ROOT / "configs").rglob("[!_]*.py"))
IN_BLOCKS = [command for page, text in TEXTS.items() for command in to_run(page, text)]
IN_HEADERS = [command for path in CONFIGS for command in header(path)]
RUN = [*IN_BLOCKS, *(c for c in IN_HEADERS if any(config in c for config in EMBEDDED))]


def test_commands_in_blocks_can_be_run_or_name_what_they_need() -> None:
    """A block whose data are not here is marked ``<!-- needs: ... -->``."""
    assert [command for command in IN_BLOCKS if not runs_here(command)] == []
    assert not runs_here("python -m nat_jax.main --config=configs/cifar10.py")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("target", ["demo", "test", "slow", "lint"])
def test_make_runs_what_is_tested(target: str) -> None:
    line = ["make", "--dry-run", "--always-make", target]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    ran = [line.replace(".venv/bin/", "") for line in done.stdout.splitlines()]
    known = {*CHECKS, *IN_BLOCKS, "ruff format --check .", "python3 -m venv .venv"}
    assert [line for line in ran if line not in known and not line.startswith("touch ")] == []
    runs = {"demo": DEMO, "lint": "mypy"}
    assert {"slow": "pytest -m slow", "test": "pytest", **runs}[target] in ran


class Place:
    """A folder in which commands run as a reader would run them, each only once."""

    def __init__(self, folder: Path):
        self.folder = folder
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
        """Run a command, after the training that it builds on; return what it prints."""
        if command in self._printed:
            return self._printed[command]
        words = shlex.split(command)
        training = " ".join(words[:4])
        if "task=convert" not in command and training != command and PLACEHOLDER[0] not in command:
            self.run(training)
        arguments = [word.replace(*PLACEHOLDER) for word in words[1:]]
        if PLACEHOLDER[0] in command and "task=" not in command:
            arguments += SHORT
        if command == DEMO:
            arguments += ONE_SEED
        if "task=mlp_probe" in command:
            arguments += ["--config.eval.mlp_epochs=5"]
        if "task=low_shot" in command:
            arguments += ["--config.eval.few_labels=(10,)", "--config.eval.few_splits=(0,)"]
        self._printed[command] = self.call(arguments)
        return self._printed[command]

    def call(self, arguments: list[str]) -> str:
        # The table that the demo's is compared with was made with XLA's default settings.
        flags = {"XLA_FLAGS": ""} if "--config=configs/digits.py" in arguments else {}
        return python(*arguments, cwd=self.folder, **flags).stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("reader"))


@pytest.mark.slow
@pytest.mark.parametrize("command", dict.fromkeys(RUN), ids=lambda line: line.partition("=")[2])
def test_a_shown_command_runs(place: Place, command: str) -> None:
    printed = place.run(command)
    named = re.findall(r"^(?:report|result|bundle|features): (.+)$", printed, re.MULTILINE)
    assert named or "task=convert" in command
    assert [name for name in named if not (place.folder / name).exists()] == []


def assert_equals_the_shown(table: list[dict]) -> None:
    """Compare a table of the demo's first seed with the pages': equal within 0.3 %."""

    def by_name(rows: list[dict]) -> dict[str, float]:
        names = ("layer", "network", "probe", "labels")
        return {" ".join(str(row[name]) for name in names): row["values"][0] for row in rows}

    found = by_name(table)
    expected = by_name(json.loads((ROOT / "docs/results/digits.json").read_text())["table"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=0.003, err_msg=name)


@pytest.mark.slow
def test_the_digits_demo_gives_the_table_that_is_shown(place: Place) -> None:
    place.run(DEMO)
    result = json.loads((place.folder / "runs/digits/results/pretrain.json").read_text())
    assert_equals_the_shown(result["table"])
    result["table"][-1]["values"][0] += 0.01
    with pytest.raises(AssertionError, match="mlp_probe"):
        assert_equals_the_shown(result["table"])


@pytest.mark.slow
def test_python_for_a_run_of_the_digits(place: Place) -> None:
    """Blocks that need the run of a command: ``<!-- needs: a run of configs/digits.py -->``."""
    place.run(f"{DEMO} --config.task=export")
    shutil.copy2(place.folder / "a.png", place.folder / "digit.png")
    shown = [
        block
        for page, text in TEXTS.items()
        for block in blocks(text, page)
        if block.marker == "needs: a run of configs/digits.py"
    ]
    assert shown
    for block in shown:
        place.call(["-c", block.body])
    with pytest.raises(AssertionError, match="there is no folder"):
        place.call(["-c", shown[0].body.replace("runs/digits", "runs/nothing")])
