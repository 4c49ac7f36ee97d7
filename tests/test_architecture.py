"""The shape of the library: imports run one way, files stay small, nothing stray stands in them."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from project import ROOT, project_files

# From the bottom up; a module imports from layers below its own and from its own package.
LAYERS = (
    {"errors"},
    {"runtime", "setting_checks"},
    {"assign", "input", "losses", "models", "optim", "targets"},
    {"config", "train_step"},
    {"cli", "training"},
    {"export", "report"},
    {"evaluate"},
    {"train"},
    {"experiments"},
    {"main"},
    {"__main__"},
)
SEES_CONFIG = {
    "cli.parsing",
    "config",
    "export.loading",
    "export.task",
    "evaluate.contenders",
    "evaluate.judge",
    "evaluate.retrieval",
    "evaluate.scoring",
    "evaluate.tasks",
    "evaluate.write_features",
    "experiments.findings",
    "experiments.members",
    "experiments.scales",
    "experiments.suite",
    "train",
    "training.setup",
    "training.workdir",
    "main",
}
MAX_LINES = 400


def sources() -> dict[str, str]:
    """Return the text of every module by its dotted name below nat_jax ("" is the package)."""
    package = ROOT / "nat_jax"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


def imported(text: str, modules: Mapping[str, str]) -> Iterator[str]:
    """Yield the nat_jax modules that a module imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path: from nat_jax..."
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


def violations(modules: Mapping[str, str]) -> list[str]:
    """Return what breaks the one-way order, in words."""
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    graph = {name: set(imported(text, modules)) - {"", name} for name, text in modules.items()}
    found = []
    for name, targets in graph.items():
        top = name.partition(".")[0]
        if name and top not in layer:
            found.append(f"{name}: give it a place in LAYERS")
            continue
        for target in sorted(targets):
            below = target.partition(".")[0]
            if not name:
                found.append(f"nat_jax/__init__ imports {target}; it must load it on first use")
            elif below != top and layer.get(below, 99) >= layer[top]:
                found.append(f"{name} imports {target}, which is not below it")
            if below == "config" and name not in SEES_CONFIG:
                found.append(f"{name} imports the config; pass it plain arguments")
        if name and name not in SEES_CONFIG and "ml_collections" in modules[name]:
            found.append(f"{name} knows ml_collections; pass it plain arguments")
    return found + _cycles(graph)


def _cycles(graph: Mapping[str, set[str]]) -> list[str]:
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
        ("runtime.sharding", "import nat_jax.models.convnet", "not below"),
        ("assign._paths", "from nat_jax.targets import Targets", "not below"),
        ("assign._paths", "def f():\n    from nat_jax import runtime, train", "train"),
        ("losses", "from nat_jax import train_step", "not below"),
        ("losses", "from nat_jax import config", "plain arguments"),
        ("losses", "from ml_collections import ConfigDict", "plain arguments"),
        ("", "from nat_jax import assign", "on first use"),
        ("helpers", "import jax", "LAYERS"),
        ("models.frontend", "from nat_jax.models.layers import Network", "cycle"),
    ],
)
def test_the_order_can_be_broken(module: str, line: str, complaint: str) -> None:
    modules = {
        "": "",
        "runtime": "",
        "runtime.sharding": "",
        "targets": "class Targets: ...",
        "losses": "",
        "config": "",
        "models": "from nat_jax.models.layers import Network",
        "models.network": "from nat_jax.models import frontend",
        "models.frontend": "",
        "models.convnet": "",
        "assign": "from nat_jax.assign import _paths",
        "assign._paths": "",
        "train_step": "from nat_jax.targets import Targets",
        "train": "from nat_jax import train_step, assign",
    }
    assert violations(modules) == []
    broken = violations(modules | {module: line})
    assert broken and complaint in "\n".join(broken)


def assign_is_alone(modules: Mapping[str, str]) -> bool:
    return all(
        target.partition(".")[0] == "assign"
        for name, text in modules.items()
        if name.partition(".")[0] == "assign"
        for target in imported(text, modules)
    )


def test_assign_imports_nothing_else_of_the_library() -> None:
    modules = sources()
    if "assign" not in modules:
        pytest.skip("nat_jax.assign does not exist")
    assert assign_is_alone(modules)
    assert not assign_is_alone(modules | {"assign._new": "from nat_jax.runtime import sharding"})


LOADED = """
import sys
import importlib, nat_jax
importlib.import_module("nat_jax.{module}") if "{module}" != "__version__" else None
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def loaded_by(module: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(module=module)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("__version__", {"jax", "numpy", "flax", "grain", "tensorflow_datasets"}),
        ("assign", {"flax", "grain", "tensorflow_datasets", "orbax", "ml_collections"}),
        ("input", {"jax", "flax", "tensorflow_datasets", "sklearn"}),
    ],
)
def test_a_light_import_stays_light(module: str, unwanted: set[str]) -> None:
    if module != "__version__" and module not in sources():
        pytest.skip(f"nat_jax.{module} does not exist")
    loaded = loaded_by(module)
    assert "nat_jax" in loaded
    assert not loaded & unwanted


def test_a_heavy_import_would_be_seen() -> None:
    if "training.checkpoint" not in sources():
        pytest.skip("nat_jax.training.checkpoint does not exist")
    assert {"jax", "orbax"} <= loaded_by("training.checkpoint")


def test_tensorflow_is_imported_nowhere() -> None:
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "tensorflow" not in [n.partition(".")[0] for n in names], name


def stray(name: str, text: str) -> list[str]:
    """Return what should not be in a file of the project, in words."""
    found = []
    if Path(name).name == "utils.py":
        found.append(f"{name}: name the file after what it does")
    if re.match(r"(nat_jax|configs|benchmarks)/.*\.py$", name) and text.count("\n") > MAX_LINES:
        found.append(f"{name}: {text.count(chr(10))} lines; split it, {MAX_LINES} at most")
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b", line):
            found.append(f"{name}:{number}: unfinished business")
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
        ("nat_jax/long.py", "\n" * (MAX_LINES + 1)),
        ("README.md", "TO" + "DO: write"),
        ("README.md", "see " + "/home" + "/someone/data"),
        ("nat_jax/input/sources.py", 'PATH = "' + "/work" + '/data"'),
        ("docs/data.md", "[a](https://py" + "pi.org/project/a)"),
    ],
)
def test_stray_things_are_found(name: str, text: str) -> None:
    assert len(stray(name, text)) == 1
    assert (
        stray("nat_jax/input/sources.py", "#!/usr/bin/env python\nfolder:PATH, https://x.org/opt/a")
        == []
    )
