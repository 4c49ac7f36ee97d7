"""The distribution: what it declares is what it uses, and a wheel runs outside the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from project import ROOT, project_files

import nat_jax

# Names under which distributions are imported, where the two differ.
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

# Needed by a dependency that does not declare it.
ON_BEHALF = {"flatbuffers", "importlib-resources"}


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
    assert core - used == ON_BEHALF

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


def test_the_version_is_written_once(pyproject: dict[str, Any]) -> None:
    assert "version" in pyproject["project"]["dynamic"]
    holders = [
        path.relative_to(ROOT).as_posix()
        for path in project_files()
        if path.suffix in (".py", ".toml", ".cfg")
        and re.search(rf"""["']{re.escape(nat_jax.__version__)}["']""", path.read_text("utf-8"))
    ]
    assert holders == ["nat_jax/__init__.py"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {nat_jax.__version__}" in changelog


def addresses(texts: Mapping[str, str]) -> list[str]:
    """Return the files that hold an address of the project itself."""
    host = r"(github|gitlab|bitbucket|codeberg)\.(com|org)/[\w.-]+/nat[_-]?jax"
    return [name for name, text in texts.items() if re.search(host, text, re.IGNORECASE)]


def test_the_public_address_stands_in_one_place() -> None:
    """Badges and notebooks must write it out; test_notebooks.py compares them with that place."""
    texts = {}
    for path in project_files():
        data = path.read_bytes()
        if b"\0" not in data:
            texts[path.relative_to(ROOT).as_posix()] = data.decode("utf-8")
    copies = {name for name in texts if name.startswith("notebooks/")}
    copies |= {"README.md", "tests/test_notebooks.py"}
    assert set(addresses(texts)) - copies == {"pyproject.toml"}
    assert addresses({"README.md": "https://github.com/" + "someone/nat_jax"}) == ["README.md"]


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
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = python("-c", "import nat_jax; print(nat_jax.__file__, nat_jax.__version__)")
    assert where.split() == [str(site / "nat_jax" / "__init__.py"), nat_jax.__version__]
    python("-m", "nat_jax.main", "--config=configs/smoke.py", "--workdir=run")
    assert (elsewhere / "run" / "report.html").stat().st_size > 1000
    assert (elsewhere / "run" / "metrics.jsonl").read_text().startswith("{")
