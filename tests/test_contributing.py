"""CONTRIBUTING.md is followed to the letter, on a copy of the library.

A Python block that begins with ``# FILE`` is a new file, a ``diff`` block an edit, any other Python
block a trial of the result; its lines ``# > ...`` are its output.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from pages import TEXTS, Block, blocks, check_printed, commands
from project import ROOT, python

PAGE = "CONTRIBUTING.md"
ALL = blocks(TEXTS[PAGE], PAGE)


def new_file(block: Block) -> str:
    """Return the path of the file that a Python block is; "" for a block that is none."""
    found = re.match(r"# (\S+\.py)\n", block.body)
    return found[1] if found and block.language == "python" else ""


FILES = [block for block in ALL if new_file(block)]
EDITS = [block for block in ALL if block.language == "diff"]
TRIALS = [block for block in ALL if block.language == "python" and not new_file(block)]


def apply_edit(block: Block, folder: Path) -> Path:
    """Apply a ``diff`` block; the old lines of each hunk must be in the file once.

    Raises:
        ValueError: a hunk fits nowhere, or in several places.
    """
    name, _, hunks = block.body.partition("\n")
    name = name.removeprefix("--- ")
    path = folder / name
    text = path.read_text("utf-8")
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        places = [match.start() for match in re.finditer(f"^{re.escape(old)}", text, re.MULTILINE)]
        if len(places) != 1:
            raise ValueError(f"{block.where}: found {len(places)} times in {name}:\n{old}")
        text = text[: places[0]] + new + text[places[0] + len(old) :]
    path.write_text(text, "utf-8")
    return path


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the library, add the new files and make the edits."""
    folder = tmp_path_factory.mktemp("followed")
    for part in ("nat_jax", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    for block in FILES:
        path = folder / new_file(block)
        assert not path.exists(), block.where
        path.write_text(block.body.partition("\n")[2], "utf-8")
    for block in EDITS:
        apply_edit(block, folder)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python(*arguments, cwd=folder, code=None, PYTHONPATH=str(folder))


def test_the_recipes_work(copy: Path) -> None:
    """One program for all of them, because most of the time goes into importing jax."""
    assert len(TRIALS) == len(EDITS) > 0
    done = run(copy, "-c", "\nprint('next')\n".join(block.body for block in TRIALS))
    assert done.returncode == 0, done.stderr[-3000:]
    for block, printed in zip(TRIALS, done.stdout.split("next\n"), strict=True):
        assert "# > " in block.body
        check_printed(block, printed)


def test_the_recipes_add_something() -> None:
    for block in EDITS:
        added = [line[1:].strip() for line in block.body.splitlines() if line.startswith("+")]
        name = block.body.partition("\n")[0].removeprefix("--- ")
        there = {line.strip() for line in (ROOT / name).read_text("utf-8").splitlines()}
        assert added and not there & set(added), block.where


def test_the_result_of_the_recipes_is_clean(copy: Path) -> None:
    changed = [new_file(block) for block in FILES]
    changed += [block.body.partition("\n")[0].removeprefix("--- ") for block in EDITS]
    for check in (["check"], ["format", "--check", "--diff"]):
        done = run(copy, "-m", "ruff", *check, "--no-cache", *changed)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_of_all_recipes(copy: Path) -> None:
    (block,) = [b for b in ALL if b.language == "bash" and "configs/bars.py" in b.body]
    (line,) = commands(block.body)
    program, *arguments = line.split()
    assert program == "python"
    done = run(copy, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nearest_mean" in done.stdout
    assert (copy / "runs" / "bars" / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "edit", "result"),
    [
        ("a\nb\nc\n", "-b\n+x\n@@\n c\n+y\n", "a\nx\nc\ny\n"),
        ("a\nb\nb\n", " b\n+x\n", None),
        ("a\nb\nc\n", " d\n+x\n", None),
    ],
)
def test_an_edit_that_fits_nowhere_is_noticed(
    tmp_path: Path, text: str, edit: str, result: str | None
) -> None:
    (tmp_path / "file.py").write_text(text)
    block = Block("page:1", "", "diff", f"--- file.py\n{edit}")
    if result is None:
        with pytest.raises(ValueError, match=r"page:1: found [02] times in file\.py"):
            apply_edit(block, tmp_path)
    else:
        assert apply_edit(block, tmp_path).read_text() == result
