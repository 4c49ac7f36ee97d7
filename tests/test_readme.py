"""What the documentation shows works: Python blocks run, commands are those that are tested.

Lines ``# > ...`` of a Python block are what it prints, all of it.

A block that cannot be run here says why in a comment right above it:

    <!-- needs: a TPU pod -->      not run; Python is still compiled, nat_jax commands are checked
    <!-- slow -->                  Python: run with ``pytest -m slow``
    <!-- continues -->             Python: run after the block before it, as one program
"""

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from absl import flags
from ml_collections import config_flags
from project import ROOT

from nat_jax import config, evaluate, report

# Set-up that .ci/run performs, word for word or in equal parts.
INSTALLS = ("pip install -e .", "pip install -e '.[test]'")
# Each is run by .ci/run.
CHECKS = ("pytest", "pytest -m slow", "bash .ci/run", "ruff check .", "mypy")
# Results of which the README shows the last convolution with all labels, and how it calls them.
SUMMARISED = {"fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}

FENCE = re.compile(
    r"^(?:<!--\s*(?P<marker>needs: [^>]+?|slow|continues)\s*-->[ \t]*\n)?"
    r"(?P<indent>[ \t]*)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
PRINTED = re.compile(r"^[ \t]*# ?> ?(.*)$", re.MULTILINE)  # the formatter adds a space


class Block(NamedTuple):
    """A fenced block: where it stands, its marker ("" for none), language and text."""

    where: str
    marker: str
    language: str
    body: str


def blocks(text: str, name: str) -> list[Block]:
    """Return the fenced blocks of a page; a continuing block holds those before it too."""
    found: list[Block] = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        body = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        marker = match["marker"] or ""
        if marker == "continues":
            before = [block for block in found if block.language == match["language"]][-1]
            marker, body = before.marker, before.body + body
        found.append(Block(f"{name}:{line}", marker, match["language"], body))
    return found


def all_blocks() -> list[Block]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [
        block
        for page in pages
        if page.exists()
        for block in blocks(page.read_text("utf-8"), page.relative_to(ROOT).as_posix())
    ]


def dead_links(page: str, text: str) -> list[str]:
    """Return the links of a page that lead nowhere: to no heading of it, or to no file."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if path.startswith(("http://", "https://")):
            continue
        there = (ROOT / page).parent / path
        if (path and not there.exists()) or (not path and anchor not in anchors):
            found.append(link)
    return found


@pytest.mark.parametrize("page", ["README.md", *(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page: str):
    page = page if page == "README.md" else f"docs/{page}"
    assert dead_links(page, (ROOT / page).read_text("utf-8")) == []


def test_dead_links_are_found():
    text = "# A page\n## What, then?\n[a](#what-then) [b](#nowhere) [c](docs/nothing.md) [d](docs)"
    assert dead_links("README.md", text) == ["#nowhere", "docs/nothing.md"]


def tables() -> dict[str, str]:
    """Return the lines of the README's tables of accuracies, by the file they are from."""
    results = ROOT / "docs" / "results"
    rows = {
        name: json.loads((results / f"{name}.json").read_text("utf-8"))["table"]
        for name in ("digits", *SUMMARISED)
    }
    found = {"digits": report.markdown_table(rows["digits"]).strip()}
    for name, title in SUMMARISED.items():
        last = max(row["features"] for row in rows[name] if row["features"].startswith("conv"))
        of_last = [r for r in rows[name] if (r["features"], r["labels"]) == (last, "all")]
        lines = report.markdown_table(of_last).strip().splitlines()[2:]
        found[name] = "\n".join(line.replace("| all |", f"| {title} |", 1) for line in lines)
    return found


def missing_tables(text: str) -> list[str]:
    """Return the results whose table does not stand in a text, figure for figure."""
    return [name for name, table in tables().items() if table not in text]


def test_tables_are_those_of_the_results() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert missing_tables(text) == []
    assert missing_tables(text.replace("| 68.6 ± 0.3 |", "| 68.7 ± 0.3 |")) == ["digits"]
    assert missing_tables(text.replace("| 51.1 |", "| 51.2 |")) == ["cifar10"]


def commands(body: str) -> list[str]:
    """Return the simple commands of a bash block, without comments and prompts."""
    lines = body.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        line = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
        found += [part.strip() for part in line.split("&&") if part.strip()]
    return found


def check_main(arguments: list[str]) -> None:
    """Check a ``python -m nat_jax.main`` command as far as that needs no device and no records.

    Raises:
        Exception: the config file does not load, or an override or its value is wrong.
    """
    from nat_jax import main  # defines the program's flags

    values, argv = flags.FlagValues(), ["main", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    folder = Path.cwd()
    os.chdir(ROOT)
    try:
        values(argv)
        settings = values[holder.name].value
    finally:
        os.chdir(folder)
    if settings is None:
        raise ValueError("--config is missing")
    config.validate(settings, evaluate.PROBES)
    if settings.task not in main.TASKS:
        raise ValueError(f"unknown task {settings.task!r}")


def complaint(command: str) -> str | None:
    """Say what is wrong with a command that the documentation shows; None if it is tested."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return None
    bare = shlex.join(words)
    known = {shlex.join(shlex.split(line)) for line in (*INSTALLS, *CHECKS)}
    if bare in known:
        return None
    if words[:3] == ["python", "-m", "nat_jax.main"]:
        try:
            check_main(words[3:])
        except Exception as error:
            return f"{command}: {error}"
        return None
    if words[0] == "make" and len(words) == 2:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        there = re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE)
        return None if there else f"{command}: no such target"
    return f"{command}: no test runs it; mark the block with <!-- needs: what it needs -->"


def shell_complaints(block: Block) -> list[str]:
    found = []
    for command in commands(block.body):
        if block.marker.startswith("needs:"):
            _, main, arguments = command.partition("python -m nat_jax.main")
            if not main:
                continue
            command = main + arguments  # whatever launches it, the line itself must be right
        if (wrong := complaint(command)) is not None:
            found.append(f"{block.where}: {wrong}")
    return found


def run_python(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a program of its own, in an empty folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, "-c", block.body],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def check_python(block: Block, folder: Path) -> None:
    """Run a block as a program; it must end well and print what it says, if it says so."""
    done = run_python(block, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    check_printed(block, done.stdout)


def check_python_here(block: Block, folder: Path) -> None:
    """Do the same in this process, which has loaded jax already."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(block.body, block.where, "exec"), {"__name__": "__main__"})
    check_printed(block, printed.getvalue())


def check_printed(block: Block, printed: str) -> None:
    shown = PRINTED.findall(block.body)
    assert not shown or printed.splitlines() == shown


ALL = all_blocks()
SHELL = [block for block in ALL if block.language in ("bash", "sh", "shell", "console")]
PYTHON = [block for block in ALL if block.language in ("python", "py")]


def where(block: Block) -> str:
    return block.where


def test_every_block_says_its_language() -> None:
    assert [block.where for block in ALL if not block.language] == []


@pytest.mark.parametrize("block", SHELL, ids=where)
def test_shown_commands_are_tested_ones(block: Block) -> None:
    assert shell_complaints(block) == []


@pytest.mark.parametrize("block", PYTHON, ids=where)
def test_shown_python_compiles(block: Block) -> None:
    compile(block.body, block.where, "exec")


@pytest.mark.parametrize("block", [b for b in PYTHON if not b.marker], ids=where)
def test_shown_python_runs(block: Block, tmp_path: Path) -> None:
    check_python_here(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in PYTHON if b.marker == "slow"], ids=where)
def test_shown_slow_python_runs(block: Block, tmp_path: Path) -> None:
    check_python(block, tmp_path)


PAGE = """
text
<!-- needs: a TPU -->
```bash
gcloud things   # a comment
```
```python
x = 1
```
<!-- continues -->
```python
assert x == 1
```

- item
  ```bash
  pip install -e . && python -m nat_jax.main \\
      --config=configs/digits.py
  ```
<!-- slow -->
```python
raise SystemExit(3)
```
```
plain
```
"""


def test_blocks_are_found_with_their_markers() -> None:
    found = blocks(PAGE, "page.md")
    assert [(b.language, b.marker) for b in found] == [
        ("bash", "needs: a TPU"),
        ("python", ""),
        ("python", ""),
        ("bash", ""),
        ("python", "slow"),
        ("", ""),
    ]
    assert found[2].body == "x = 1\nassert x == 1\n"
    assert found[0].where == "page.md:4"
    assert commands(found[3].body) == [
        "pip install -e .",
        "python -m nat_jax.main      --config=configs/digits.py",
    ]


def test_a_failing_block_fails(tmp_path: Path) -> None:
    assert run_python(Block("", "", "python", "raise SystemExit(3)"), tmp_path).returncode == 3
    assert run_python(Block("", "", "python", "import nat_jax"), tmp_path).returncode == 0
    with pytest.raises(AssertionError):
        check_python(Block("", "", "python", "raise SystemExit(3)"), tmp_path)
    with pytest.raises(AssertionError):
        check_python(Block("", "", "python", "print(1)\n#> 2"), tmp_path)
    right = Block("", "", "python", "if True:\n    print(1)\n    #> 1\nprint()\n#>")
    check_python(right, tmp_path)
    check_python_here(right, tmp_path)
    with pytest.raises(AssertionError):
        check_python_here(Block("", "", "python", "print(1)\n#> 2"), tmp_path)
    with pytest.raises(ZeroDivisionError):
        check_python_here(Block("", "", "python", "1 / 0"), tmp_path)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("gcloud things", "no test runs it"),
        ("make nothing", "no such target"),
        ("python -m nat_jax.main --workdir=x", "--config is missing"),
        ("python -m nat_jax.main --config=configs/nothing.py", "nothing.py"),
        ("python -m nat_jax.main --config=configs/digits.py --config.batchsize=3", "batch"),
        ("python -m nat_jax.main --config=configs/digits.py --config.batch_size=0", "batch_size"),
        ("python -m nat_jax.main --config=configs/digits.py --work_dir=x", "work_dir"),
        ("python -m nat_jax.main --config=configs/digits.py --config.task=nothing", "nothing"),
        ("pip install nat_jax", "no test runs it"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, problem: str) -> None:
    wrong = complaint(command)
    assert wrong is not None and problem in wrong
    assert shell_complaints(Block("page", "", "bash", command))
    marked = shell_complaints(Block("page", "needs: x", "bash", command))
    assert bool(marked) == ("nat_jax.main" in command)
    launched = Block("page", "needs: a cluster", "bash", f"srun --ntasks=2 {command}")
    assert bool(shell_complaints(launched)) == ("nat_jax.main" in command)


@pytest.mark.parametrize(
    "command",
    [
        "pip install -e '.[test]'",
        'pip install -e ".[test]"',
        "JAX_PLATFORMS=cpu pytest",
        "make demo",
        "python -m nat_jax.main --config=configs/digits.py --config.batch_size=64 --workdir=x",
    ],
)
def test_a_right_command_is_accepted(command: str) -> None:
    assert complaint(command) is None
