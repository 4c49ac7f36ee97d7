"""The shape of the library: imports run one way, light imports stay light, no stray files."""

import ast
import importlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from project import ROOT, project_files, python

import nat_jax


def order() -> dict[str, int]:
    """Return the level of each room, from the line of docs/design.md that has their order."""
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    line = page.partition("## Imports")[2].partition("```text\n")[2].partition("```")[0]
    levels = [level.replace(",", " ").split() for level in line.split("->")]
    return {room: -number for number, rooms in enumerate(levels) for room in rooms}


def sources() -> dict[str, str]:
    """Return the text of every module by its dotted name below nat_jax ("" is the package)."""
    package = ROOT / "nat_jax"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    return found


def imported(text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Yield the nat_jax modules that a module imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the complete path: from nat_jax..."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name != "nat_jax" and not name.startswith("nat_jax."):
                continue
            below = name.removeprefix("nat_jax").removeprefix(".")
            while below not in modules:  # a function of a module rather than a module
                below = below.rpartition(".")[0]
            yield below


def room(module: str) -> str:
    return module.partition(".")[0]


def violations(modules: Mapping[str, str]) -> list[str]:
    """Return the imports that do not lead to a lower room, and the cycles inside rooms."""
    level = order()
    graph = {name: set(imported(text, modules)) - {"", name} for name, text in modules.items()}
    found = [f"{name}: not in the order of docs/design.md" for name in graph if not known(name)]
    for name, targets in graph.items():
        for target in sorted(targets):
            if not name:
                found.append(f"nat_jax/__init__ imports {target}; it must load it on first use")
            elif room(target) != room(name) and level.get(room(target), 0) >= level[room(name)]:
                found.append(f"{name} imports {target}, which is not below it")
        if (
            name
            and level.get(room(name), 0) < level["config"]
            and "ml_collections" in modules[name]
        ):
            found.append(f"{name} knows ml_collections; pass it plain arguments")
    return found + cycles(graph)


def known(module: str) -> bool:
    return not module or room(module) in order()


def cycles(graph: Mapping[str, set[str]]) -> list[str]:
    done: set[str] = set()
    found = []

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            found.append("cycle: " + " -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph.get(name, ())):
                # a package's __init__ gathers its modules; importing from one runs it first
                if not name.startswith(f"{target}."):
                    visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    return found


def test_imports_run_one_way() -> None:
    assert violations(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("runtime.sharding", "from nat_jax import models", "not below"),
        ("models.layers", "import nat_jax.train_step", "not below"),
        ("assign._paths", "from nat_jax.targets import Targets", "not below"),
        ("assign._paths", "def f():\n    from nat_jax import train", "not below"),
        ("losses", "from nat_jax import config", "not below"),
        ("losses", "from ml_collections import ConfigDict", "plain arguments"),
        ("", "from nat_jax import assign", "on first use"),
        ("models.frontend", "from nat_jax.models.layers import Layers", "cycle"),
    ],
)
def test_the_order_can_be_broken(module: str, line: str, complaint: str) -> None:
    modules = dict.fromkeys(
        ("", "runtime", "runtime.sharding", "losses", "config", "targets", "assign._paths"), ""
    )
    modules |= {
        "assign": "from nat_jax.assign import _paths",
        "models": "from nat_jax.models.layers import Layers",
        "models.layers": "from nat_jax.models import frontend",
        "models.frontend": "",
        "train_step": "from nat_jax.targets import Targets",
        "train": "from nat_jax import train_step, assign",
    }
    assert violations(modules) == []
    assert complaint in "\n".join(violations(modules | {module: line}))


def test_a_new_room_needs_a_place() -> None:
    assert not known("helpers.things")


LOADED = """
import importlib, sys
importlib.import_module({!r})
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def loaded_by(module: str) -> set[str]:
    return set(python("-c", LOADED.format(module), cwd=ROOT).stdout.split())


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("nat_jax", {"jax", "numpy", "flax", "grain", "tensorflow_datasets"}),
        ("nat_jax.input", {"jax", "flax", "tensorflow_datasets", "sklearn"}),
    ],
)
def test_a_light_import_stays_light(module: str, unwanted: set[str]) -> None:
    """That of ``nat_jax.assign`` is tested in tests/assign/test_import.py."""
    assert not loaded_by(module) & unwanted


def test_a_heavy_import_would_be_seen() -> None:
    assert "jax" in loaded_by("nat_jax.losses")


def test_tensorflow_is_imported_nowhere() -> None:
    named = re.compile(r"^\s*(import|from) tensorflow\b(?!_)", re.MULTILINE)
    assert [name for name, text in sources().items() if named.search(text)] == []
    assert named.search("def f():\n    import tensorflow as tf")


def test_old_names_of_modules_are_attributes() -> None:
    for old, new in nat_jax._ALIASES.items():
        assert getattr(nat_jax, old) is importlib.import_module(f"nat_jax.{new}")


def stray(name: str, text: str) -> list[str]:
    """Return what should not be in a file of the project."""
    found = []
    if Path(name).name == "utils.py":
        found.append(f"{name}: name the file after what it does")
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", line):
            found.append(f"{name}:{number}: unfinished")
        if re.search(r"(?<![\w.:/~$}>-])/(home|root|Users|tmp|work|mnt|opt|srv)/\w", line):
            found.append(f"{name}:{number}: a path of one machine")
        if re.search(r"\bpy" r"pi\.org|\bpython" r"hosted\.org", line):
            found.append(f"{name}:{number}: the host of a package registry; link to the project")
    return found


def test_no_file_has_anything_stray() -> None:
    found = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" not in data:
            found += stray(str(path.relative_to(ROOT)), data.decode("utf-8"))
    assert found == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nat_jax/utils.py", ""),
        ("README.md", "TO" + "DO: write"),
        ("README.md", "see " + "/home" + "/someone/data"),
        ("docs/data.md", "[a](https://py" + "pi.org/project/a)"),
    ],
)
def test_stray_things_are_found(name: str, text: str) -> None:
    assert len(stray(name, text)) == 1
    right = "#!/usr/bin/env python\nfolder:PATH, https://x.org/opt/a"
    assert stray("nat_jax/input/sources.py", right) == []
