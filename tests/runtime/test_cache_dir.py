"""Where compiled programs are kept, and where they are not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from nat_jax.runtime import cache_dir

PROGRAM = """
import logging, jax
from nat_jax.runtime import cache_dir
logging.basicConfig(format="%(message)s", level=logging.INFO)
cache_dir.keep_programs()
jax.jit(lambda x: jax.numpy.sort(x) @ x)(jax.numpy.ones(1000)).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


def run(program: str = PROGRAM, **settings: str) -> subprocess.CompletedProcess:
    ours = ("JAX_COMPILATION_CACHE_DIR", "NAT_JAX_CACHE", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    # Whatever it takes to compile here: everything is kept.
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment | always | settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"NAT_JAX_CACHE": "a", "XDG_CACHE_HOME": "b"}, "a/file_index"),
        ({"XDG_CACHE_HOME": "b"}, "b/nat_jax/file_index"),
        ({"HOME": "c"}, "c/.cache/nat_jax/file_index"),
        ({"NAT_JAX_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "c"}, "c/.cache/nat_jax/file_index"),
    ],
)
def test_the_place(tmp_path, monkeypatch, settings, expected):
    for name in ("NAT_JAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    assert cache_dir.place("file_index") == tmp_path / expected


def test_programs_are_kept(tmp_path):
    done = run(NAT_JAX_CACHE=str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "programs"
    assert done.stdout.strip() == str(folder), done.stderr
    assert any(path.name.startswith("jit_") for path in folder.iterdir())


@pytest.mark.parametrize("elsewhere", ["there", ""])
def test_another_place_is_respected_and_so_is_none(tmp_path, elsewhere):
    there = elsewhere and str(tmp_path / elsewhere)
    done = run(NAT_JAX_CACHE=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR=there)
    assert done.stdout.strip() == there, done.stderr
    assert not (tmp_path / "cache").exists()
    assert not there or any(Path(there).iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = run(NAT_JAX_CACHE=str(tmp_path / "file"))
    assert done.returncode == 0 and done.stdout.strip() == "None"
    assert done.stderr.count("compiled programs are not kept (") == 1


def test_importing_the_library_changes_nothing():
    done = run("import jax, nat_jax.train; print(jax.config.jax_compilation_cache_dir)")
    assert done.stdout.strip() == "None", done.stderr
