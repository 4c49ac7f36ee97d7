"""Where the project's own files are, for tests that look at the files themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(
    *arguments: str | Path, cwd: Path | None = None, code: int | None = 0, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout's nat_jax, and check how it ends; `code` None: in any way.

    Environment variables of the tests are kept, but for those that are None here.
    """
    given = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    environment = {name: value for name, value in given.items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert code in (None, done.returncode), done.stderr[-3000:]
    return done


def project_files() -> list[Path]:
    """Return the files that git tracks or would track; skip the test where there is no git."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = sorted(set(filter(None, done.stdout.split("\0"))))
    return [ROOT / name for name in names if (ROOT / name).is_file()]
