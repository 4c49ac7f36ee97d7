"""CONTRIBUTING.md is followed to the letter, on a copy of the library.

A Python block that begins with ``# FILE`` is that new file, a ``diff`` block an edit, any other
Python block what one tries afterwards; its lines ``# > ...`` are what it prints.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT
from test_readme import Block, blocks, check_printed, commands, complaint, dead_links

PAGE = "CONTRIBUTING.md"
TEXT = (ROOT / PAGE).read_text("utf-8")
ALL = blocks(TEXT, PAGE)


def new_file(block: Block) -> str:
    """Return the path of the file that a Python block is; "" for a block that is none."""
    first = block.body.partition("\n")[0]
    path = first.removeprefix("# ")
    return path if block.language == "python" and path != first and path.endswith(".py") else ""


FILES = [block for block in ALL if new_file(block)]
EDITS = [block for block in ALL if block.language == "diff"]
TRIALS = [block for block in ALL if block.language == "python" and not new_file(block)]
SHELL = [block for block in ALL if block.language == "bash"]


def apply_edit(block: Block, folder: Path) -> Path:
    """Do what a ``diff`` block says; the lines of each hunk must stand in the file once.

    Raises:
        ValueError: a hunk fits nowhere or in several places.
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


def follow(folder: Path) -> list[Path]:
    """Copy the library, add the new files and make the edits; return what has changed."""
    for part in ("nat_jax", "configs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    changed = []
    for block in FILES:
        path = folder / new_file(block)
        assert not path.exists(), block.where
        path.write_text(block.body.partition("\n")[2], "utf-8")
        changed.append(path)
    return changed + [apply_edit(block, folder) for block in EDITS]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("followed")
    follow(folder)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_there_is_a_recipe_for_each() -> None:
    made = [new_file(block) for block in FILES]
    assert [Path(path).parent.as_posix() for path in made] == [
        "nat_jax/models",
        "nat_jax/input/sources",
        "nat_jax/assign",
        "nat_jax/evaluate",
        "configs",
    ]
    assert len(EDITS) == len(TRIALS) == 4
    assert all("# > " in block.body for block in TRIALS)
    assert len(FILES) + len(EDITS) + len(TRIALS) + len(SHELL) == len(ALL)


def test_the_recipes_do_what_they_say(copy: Path) -> None:
    """One program for all of them, because most of the time goes into importing jax."""
    between = "\nprint('next')\n"
    done = run(copy, "-c", between.join(block.body for block in TRIALS))
    assert done.returncode == 0, done.stderr[-3000:]
    for block, printed in zip(TRIALS, done.stdout.split("next\n"), strict=True):
        check_printed(block, printed)


def test_the_recipes_do_not_work_without_their_edits() -> None:
    """What the recipes add is not there already, so that trying them shows something."""
    for block in EDITS:
        added = [line[1:].strip() for line in block.body.splitlines() if line.startswith("+")]
        name = block.body.partition("\n")[0].removeprefix("--- ")
        there = (ROOT / name).read_text("utf-8").splitlines()
        assert added and not set(added) & {line.strip() for line in there}, block.where


def test_what_the_recipes_make_is_clean(tmp_path: Path) -> None:
    changed = [str(path.relative_to(tmp_path)) for path in follow(tmp_path)]
    for check in (["check"], ["format", "--check", "--diff"]):
        done = run(tmp_path, "-m", "ruff", *check, "--no-cache", *changed)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_of_all_recipes(copy: Path) -> None:
    (block,) = [b for b in SHELL if "configs/bars.py" in b.body]
    (line,) = commands(block.body)
    program, *arguments = line.split()
    assert program == "python"
    done = run(copy, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nearest_mean" in done.stdout
    assert (copy / "runs" / "bars" / "report.html").exists()


def test_shown_commands_are_tested_ones() -> None:
    shown = [command for block in SHELL for command in commands(block.body)]
    wrong = [complaint(command) for command in shown if "configs/bars.py" not in command]
    assert len(wrong) == len(shown) - 1
    assert set(wrong) == {None}


def test_links_lead_somewhere() -> None:
    assert dead_links(PAGE, TEXT) == []


@pytest.mark.parametrize(
    ("text", "edit", "result"),
    [
        ("a\nb\nc\n", " b\n+x\n", "a\nb\nx\nc\n"),
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
