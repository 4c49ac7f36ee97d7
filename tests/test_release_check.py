"""The release check finds a project that is not ready, and a demo that went wrong."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from project import ROOT, python

_SPEC = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
assert _SPEC is not None and _SPEC.loader is not None
release_check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(release_check)


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=someone", "-c", "user.email=someone@localhost")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A committed project that is ready."""
    root = tmp_path / "project"
    (root / "nat_jax").mkdir(parents=True)
    (root / "nat_jax" / "__init__.py").write_text('__version__ = "1.2.0"\n')
    (root / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2026-11-30)\n\n## 1.1.0\n")
    (root / "setup.py").write_text(
        "from setuptools import setup\nsetup(name='nat_jax', version='1.2.0')\n"
    )
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=ready")
    return root


def test_a_project_that_is_ready_is_ready(checkout: Path) -> None:
    assert release_check.not_ready(checkout) == []


@pytest.mark.parametrize(
    ("changelog", "wrong"),
    [
        ("## 1.3.0 (2026-11-30)", "begins with 1.3.0, nat_jax.__version__ is 1.2.0"),
        ("## 1.2.0 (unreleased)", "1.2.0: expected a date, got 'unreleased'"),
        ("## 1.2.0", "1.2.0: expected a date, got None"),
        ("1.2.0", "no heading such as"),
    ],
)
def test_a_changelog_that_is_not_is_found(checkout: Path, changelog: str, wrong: str) -> None:
    (checkout / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}\n")
    git(checkout, "commit", "--all", "--quiet", "--message=changed")
    (found,) = release_check.not_ready(checkout)
    assert wrong in found


def test_what_is_not_committed_is_found(checkout: Path) -> None:
    (checkout / "new.py").write_text("")
    assert release_check.not_ready(checkout) == ["git: not committed, so not in the wheel: new.py"]


def test_a_version_that_is_nowhere_is_found(checkout: Path) -> None:
    (checkout / "nat_jax" / "__init__.py").write_text("")
    with pytest.raises(release_check.Failed, match="no line __version__"):
        release_check.not_ready(checkout)


def leave(run: Path, value: float) -> None:
    (run / "results").mkdir(parents=True)
    (run / "report.html").touch()
    (run / "metrics.jsonl").touch()
    judged = json.dumps({"value": value, "untrained": 0.6})
    (run / "results" / "pretrain.json").write_text(judged)


def test_a_run_is_looked_at(tmp_path: Path) -> None:
    leave(tmp_path / "good", 0.9)
    release_check.check_run(tmp_path / "good")
    leave(tmp_path / "bad", 0.6)
    with pytest.raises(release_check.Failed, match="no better than untrained"):
        release_check.check_run(tmp_path / "bad")
    for name in ("report.html", "results/pretrain.json"):
        leave(tmp_path / name.replace("/", "-"), 0.9)
        (tmp_path / name.replace("/", "-") / name).unlink()
        with pytest.raises(release_check.Failed, match=Path(name).name):
            release_check.check_run(tmp_path / name.replace("/", "-"))


def test_nothing_is_built_of_what_is_not_ready(checkout: Path) -> None:
    (checkout / ".ci").mkdir()
    script = checkout / ".ci" / "release_check.py"
    script.write_text((ROOT / ".ci" / "release_check.py").read_text())
    done = python(script, code=1)
    assert "not committed" in done.stderr and "1 to fix first" in done.stderr
    assert not (checkout / "dist").exists()


@pytest.mark.parametrize(
    ("version", "file", "right"),
    [
        ("1.2.0", "env/lib/site-packages/nat_jax/__init__.py", True),
        ("1.1.0", "env/lib/site-packages/nat_jax/__init__.py", False),
        ("1.2.0", "checkout/nat_jax/__init__.py", False),
    ],
)
def test_another_version_or_place_is_found(
    tmp_path: Path, version: str, file: str, right: bool
) -> None:
    printed = f"{version} {tmp_path / file}\n"
    if right:
        release_check.check_import(printed, tmp_path / "env", "1.2.0")
    else:
        with pytest.raises(release_check.Failed, match="expected nat_jax 1.2.0 below .*; got"):
            release_check.check_import(printed, tmp_path / "env", "1.2.0")


@pytest.mark.slow
def test_a_wheel_is_built_from_the_last_commit(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip reads it the other way round
    (checkout / "new.py").write_text("")
    wheel = release_check.build(checkout, tmp_path, "1.2.0")
    assert wheel.name.startswith("nat_jax-1.2.0-")
    (again := tmp_path / "again").mkdir()
    with pytest.raises(release_check.Failed, match="one wheel of 1.3.0; got nat_jax-1.2.0"):
        release_check.build(checkout, again, "1.3.0")
