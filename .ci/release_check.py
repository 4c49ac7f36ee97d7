"""Check a release beyond `.ci/run`: the wheel runs the demo in an empty environment.

    python .ci/release_check.py [--rehearse] [--config=configs/digits.py]

Checks version, changelog and git, builds a wheel from a clean clone, installs it with its
dependencies and runs it in an empty folder. The wheel is copied to dist/.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Failed(Exception):
    """A reason not to release."""


def main() -> None:
    """Check a release; exit with 1 and the reason if it is not ready."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="continue although not ready")
    parser.add_argument("--config", default="configs/digits.py", help="the demo, a packaged config")
    asked = parser.parse_args()
    try:
        wrong = not_ready(ROOT)
        for line in wrong:
            print(f"release-check: {line}", file=sys.stderr)
        if wrong and not asked.rehearse:
            raise Failed(f"{len(wrong)} to fix first; REHEARSE=1 continues anyway")
        with tempfile.TemporaryDirectory() as folder:
            version = read_version(ROOT)
            wheel = build(ROOT, Path(folder), version)
            python = install(wheel, Path(folder) / "environment")
            run_demo(python, Path(folder) / "elsewhere", asked.config, version)
            (ROOT / "dist").mkdir(exist_ok=True)
            kept = shutil.copy2(wheel, ROOT / "dist")
    except (Failed, subprocess.CalledProcessError) as error:
        sys.exit(f"release-check: {error}")
    print(f"release-check: {kept} {'would be' if wrong else 'is'} ready")


def read_version(root: Path) -> str:
    """Return ``__version__`` of the checkout, without importing it."""
    text = (root / "nat_jax" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise Failed("nat_jax/__init__.py: no line __version__ = ...")
    return found[1]


def not_ready(root: Path) -> list[str]:
    """Return the reasons not to release that are known before anything is built."""
    found = []
    version = read_version(root)
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    head = re.search(r"^## (\S+)(?: \((.*)\))?$", changelog, re.MULTILINE)
    if head is None:
        found.append("CHANGELOG.md: no heading such as '## 0.1.0 (2026-11-30)'")
    else:
        if head[1] != version:
            found.append(f"CHANGELOG.md begins with {head[1]}, nat_jax.__version__ is {version}")
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", head[2] or ""):
            found.append(f"CHANGELOG.md: {head[1]}: expected a date, got {head[2]!r}")
    status = ["git", "status", "--porcelain"]
    dirty = subprocess.run(status, cwd=root, capture_output=True, text=True, check=True).stdout
    if dirty:
        names = ", ".join(line[3:] for line in dirty.splitlines())
        found.append(f"git: not committed, so not in the wheel: {names}")
    return found


def build(root: Path, folder: Path, version: str) -> Path:
    """Build the wheel of the last commit; return its path."""
    clone, out = folder / "clone", folder / "wheel"
    say(f"the wheel, from a clean clone of {root}")
    call("git", "clone", "--quiet", str(root), str(clone))
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    call(*pip, "--wheel-dir", str(out), ".", folder=clone)
    wheels = sorted(out.glob("*.whl"))
    if [wheel.name.split("-")[:2] for wheel in wheels] != [["nat_jax", version]]:
        raise Failed(f"expected one wheel of {version}; got {', '.join(w.name for w in wheels)}")
    return wheels[0]


def install(wheel: Path, environment: Path) -> Path:
    """Install a wheel with its dependencies in a new environment; return its Python."""
    say("an empty environment")
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    call(str(python), "-m", "pip", "install", "--quiet", str(wheel))
    call(str(python), "-m", "pip", "check")
    return python


def run_demo(python: Path, folder: Path, config: str, version: str) -> None:
    """Run a packaged config in an empty folder, and check the results.

    Raises:
        Failed: another version or path was imported, a file is missing, or nothing was learned.
    """
    folder.mkdir()
    code = "import nat_jax; print(nat_jax.__version__, nat_jax.__file__)"
    imported = call(str(python), "-c", code, folder=folder, quiet=True)
    check_import(imported, python.parents[1], version)
    say(f"the demo, {config}")
    call(str(python), "-m", "nat_jax.main", "--help", folder=folder, quiet=True)
    call(str(python), "-m", "nat_jax.main", f"--config={config}", "--workdir=run", folder=folder)
    check_run(folder / "run")


def check_import(printed: str, environment: Path, version: str) -> None:
    """Check the imported package, "VERSION FILE", against the version and path of the wheel."""
    found, _, file = printed.strip().partition(" ")
    if found != version or environment not in Path(file).parents:
        raise Failed(f"expected nat_jax {version} below {environment}; got {printed.strip()}")


def check_run(run: Path) -> None:
    """Check that a run has a report, and better features than the untrained network."""
    missing = [name for name in ("report.html", "metrics.jsonl") if not (run / name).is_file()]
    result = run / "results" / "pretrain.json"
    if missing or not result.is_file():
        raise Failed(f"the demo wrote no {', '.join(missing) or result.name}")
    judged = json.loads(result.read_text(encoding="utf-8"))
    if not judged["value"] > judged["untrained"]:
        raise Failed(f"no better than untrained: {judged['value']} and {judged['untrained']}")


def call(*command: str, folder: Path = ROOT, quiet: bool = False) -> str:
    """Run a command, which must succeed, without the checkout on Python's path."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "NAT_JAX_"))}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=True,
    )
    return done.stdout or ""


def say(step: str) -> None:
    """Print the next step."""
    print(f"== {step}", flush=True)


if __name__ == "__main__":
    main()
