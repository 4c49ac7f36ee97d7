"""What the pages show: fenced blocks, commands and links, and what is wrong with them.

Lines ``# > ...`` of a Python block are its complete output. A comment right above a block says how
the block is tested:

    <!-- needs: a TPU pod -->      it is not run; its nat_jax commands are still checked
    <!-- slow -->                  Python: it runs with ``pytest -m slow``
    <!-- continues -->             Python: it runs after the block before it, in one program
"""

import ast
import contextlib
import importlib.util
import io
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags
from project import ROOT

from nat_jax import config, evaluate, main

PATHS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for folder in ("docs", "launch") for page in sorted((ROOT / folder).rglob("*.md"))),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PATHS}
MAIN = ["python", "-m", "nat_jax.main"]
SHELL = ("bash", "sh", "shell", "console")
# Commands that .ci/run runs.
CHECKS = (
    "pip install -e .",
    "pip install -e '.[test]'",
    "pytest",
    "pytest -m slow",
    "bash .ci/run",
    "ruff check .",
    "mypy",
    "python docs/make_tables.py --check",
)

FENCE = re.compile(
    r"^(?:<!--\s*(?P<marker>needs: [^>]+?|slow|continues)\s*-->[ \t]*\n)?"
    r"(?P<indent>[ \t]*)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
PRINTED = re.compile(r"^[ \t]*# ?> ?(.*)$", re.MULTILINE)  # the formatter adds a space


class Block(NamedTuple):
    """A fenced block: its place, its marker ("" for none), its language and its text."""

    where: str
    marker: str
    language: str
    body: str


def blocks(text: str, name: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [
        Block(
            f"{name}:{text.count(chr(10), 0, match.start('language')) + 1}",
            match["marker"] or "",
            match["language"],
            re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE),
        )
        for match in FENCE.finditer(text)
    ]


def programs(found: list[Block]) -> list[list[Block]]:
    """Return the Python programs of a page: each block with those that continue it."""
    made: list[list[Block]] = []
    for block in found:
        if block.language != "python":
            continue
        if block.marker == "continues":
            made[-1].append(block)
        else:
            made.append([block])
    return made


def run_program(program: list[Block], folder: Path) -> None:
    """Run the blocks of a program in this process; each must print what it shows."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in program:
        printed = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(compile(block.body, block.where, "exec"), names)
        check_printed(block, printed.getvalue())


def check_printed(block: Block, printed: str) -> None:
    shown = PRINTED.findall(block.body)
    assert not shown or printed.splitlines() == shown


def dead_links(page: str, text: str) -> list[str]:
    """Return the relative links of a page that lead to no file, or to no heading of a page."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+://", path):
            continue
        target = (ROOT / page).parent / path if path else None
        if target is not None and not target.exists():
            found.append(link)
            continue
        shown = text if target is None else target.read_text("utf-8") if _is_page(target) else None
        if anchor and shown is not None and anchor not in _anchors(shown):
            found.append(link)
    return found


def _is_page(path: Path) -> bool:
    return path.suffix == ".md"


def _anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(body: str) -> list[str]:
    """Return the simple commands of a bash block, without comments and prompts."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip().removeprefix("$ ")
        found += [part.strip() for part in line.split("&&") if part.strip()]
    return found


def spans(text: str) -> list[str]:
    """Return the commands of a page's sentences and tables that begin with python."""
    found = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)))
    found = (command for span in found for command in commands(span))
    return [span for span in found if re.match(r"([A-Z_]+=\S+ )*python3? ", span)]


def header(path: Path) -> list[str]:
    """Return the commands in the docstring of a config."""
    words = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return [line.strip() for line in words.splitlines() if line.startswith("    python ")]


def shell_complaints(block: Block) -> Iterator[str]:
    """Yield what is wrong with the commands of a block."""
    for command in commands(block.body):
        if block.marker.startswith("needs:"):
            _, line, arguments = command.partition(" ".join(MAIN))
            if not line:
                continue
            command = line + arguments  # without the launcher in front
        if (wrong := complaint(command)) is not None:
            yield f"{block.where}: {wrong}"


def complaint(command: str) -> str | None:
    """Return what is wrong with a command, found without running it; None for a right one."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words or shlex.join(words) in {shlex.join(shlex.split(line)) for line in CHECKS}:
        return None
    if words[:3] == MAIN:
        return _complaint_of_main(command, words[3:])
    if words[0] == "make" and len(words) == 2:
        there = re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text(), re.M)
        return None if there else f"{command}: no such target"
    if words[0] not in ("python", "python3"):
        return f"{command}: no test runs it; mark the block with <!-- needs: what it needs -->"
    if words[1] == "-m":
        found = importlib.util.find_spec(words[2])
        return None if found else f"{command}: there is no module {words[2]}"
    if words[1] == "-c":
        return f"{command}: no test runs it; mark the block with <!-- needs: what it needs -->"
    program = ROOT / words[1]
    if program.suffix != ".py" or not program.is_file():
        return f"{command}: there is no program {words[1]}"
    given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    unknown = sorted(given - _flags_of(program))
    return f"{command}: {words[1]} has no {', '.join(unknown)}" if unknown else None


def _complaint_of_main(command: str, arguments: list[str]) -> str | None:
    if "--help" in arguments or "--config=..." in arguments:
        return None
    values, argv = flags.FlagValues(), ["main", *arguments]
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        with contextlib.chdir(ROOT):
            values(argv)
            settings = values[holder.name].value
        if settings is None:
            return f"{command}: --config is missing"
        config.validate(settings, evaluate.PROBES)
    except Exception as error:
        return f"{command}: {error}"
    return None if settings.task in main.TASKS else f"{command}: unknown task {settings.task!r}"


def _flags_of(program: Path) -> set[str]:
    """Return the flags that a program, or a module of its folder that it imports, defines."""
    found = set()
    tree = ast.parse(program.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            beside = program.parent / f"{name.replace('.', os.sep)}.py"
            if beside.is_file() and beside != program:
                found |= _flags_of(beside)
    return found
