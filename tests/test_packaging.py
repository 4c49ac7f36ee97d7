"""The distribution declares what it imports, and its wheel runs outside the checkout."""

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, project_files, python

import nat_jax

# Distributions whose import name differs.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "absl": "absl-py",
    "array_record": "array-record",
    "google": "protobuf",
    "ml_collections": "ml-collections",
    "orbax": "orbax-checkpoint",
    "sklearn": "scikit-learn",
    "tensorboardX": "tensorboardx",
    "tensorflow_datasets": "tensorflow-datasets",
}

# Required by a dependency that does not declare it.
NOT_IMPORTED = {"flatbuffers", "importlib-resources"}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def names(requirements: list[str]) -> set[str]:
    found = (re.match(r"[\w.-]+", line) for line in requirements)
    return {match[0].lower().replace("_", "-") for match in found if match}


def imports(folder: Path) -> set[str]:
    """Return the distributions that the modules in a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    found -= {*sys.stdlib_module_names, "nat_jax"}
    return {DISTRIBUTIONS.get(name, name) for name in found}


def test_everything_imported_is_declared_and_the_other_way_round(
    pyproject: dict[str, Any], tmp_path: Path
) -> None:
    project = pyproject["project"]
    core = names(project["dependencies"])
    optional = {
        name for lines in project["optional-dependencies"].values() for name in names(lines)
    }
    used = imports(ROOT / "nat_jax")
    assert used - core - optional == set()
    assert core - used == NOT_IMPORTED

    (tmp_path / "new.py").write_text("def f():\n    import undeclared.part\n")
    assert imports(tmp_path) - core - optional == {"undeclared"}


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Return the oldest version of each requirement; "" where there is no such bound."""
    found = {}
    for line in requirements:
        bound = re.search(r">=([\d.]+)", line)
        found[next(iter(names([line])))] = bound[1] if bound else ""
    return found


def test_the_oldest_versions_are_the_lower_bounds(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    wanted = lower_bounds([*project["dependencies"], *extras["fast"], *extras["tensorboard"]])
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in line for line in pins)
    oldest = lower_bounds([line.replace("==", ">=") for line in pins])
    assert oldest == wanted
    assert oldest != wanted | lower_bounds(["jax>=0.6,<0.12"])
    assert lower_bounds(["jax<0.12", "Array_record>=0.8"]) == {"jax": "", "array-record": "0.8"}


def test_the_readme_s_test_line_is_what_is_checked() -> None:
    line = "pip install -e '.[test]' && pytest"
    assert f'bash -c "{line}"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the files that git knows, as from a clean clone."""
    clone = tmp_path_factory.mktemp("clone")
    for path in project_files():
        target = clone / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), "."], cwd=clone, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_library(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"nat_jax/py.typed"}
    for path in project_files():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith("nat_jax/"):
            wanted.add(name)
        elif name.startswith("configs/"):
            wanted.add(f"nat_jax/{name}")
    assert len(wanted) > 10
    assert wanted - inside == set()
    strangers = {name for name in inside if ".dist-info/" not in name} - wanted
    assert strangers == set()
    assert any(name.endswith("licenses/LICENSE") for name in inside)


@pytest.mark.slow
def test_the_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True, timeout=300)
    outside = functools.partial(python, cwd=elsewhere, PYTHONPATH=str(site))
    where = outside("-c", "import nat_jax; print(nat_jax.__file__, nat_jax.__version__)")
    assert where.stdout.split() == [str(site / "nat_jax" / "__init__.py"), nat_jax.__version__]
    outside("-m", "nat_jax.main", "--config=configs/smoke.py", "--workdir=run")
    assert (elsewhere / "run" / "report.html").stat().st_size > 1000
    assert (elsewhere / "run" / "metrics.jsonl").read_text().startswith("{")
