"""Where the project's own files are, for tests that look at the files themselves."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def project_files() -> list[Path]:
    """Return the files that git tracks or would track; skip the test where there is no git."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = sorted(set(filter(None, done.stdout.split("\0"))))
    return [ROOT / name for name in names if (ROOT / name).is_file()]
