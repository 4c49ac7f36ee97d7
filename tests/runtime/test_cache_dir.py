"""Where compiled programs are cached, and where they are not."""

import jax
import pytest
from project import python

from nat_jax.runtime import cache_dir

FOLDER, SECONDS = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"

PROGRAM = """
import jax, nat_jax.train
print(jax.config.jax_compilation_cache_dir)
from nat_jax.runtime import cache_dir
cache_dir.enable_compilation_cache()
jax.jit(lambda x: jax.numpy.sort(x) @ x)(jax.numpy.ones(1000)).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


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


def test_programs_are_cached_when_enabled_and_not_by_an_import(tmp_path):
    done = python(
        *("-c", PROGRAM),
        JAX_COMPILATION_CACHE_DIR=None,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",  # whatever it takes to compile here
        NAT_JAX_CACHE=str(tmp_path / "cache"),
    )
    folder = tmp_path / "cache" / "programs"
    assert done.stdout.split() == ["None", str(folder)], done.stderr
    assert any(path.name.startswith("jit_") for path in folder.iterdir())


@pytest.fixture
def setting():
    """Return a function that sets JAX's folder for programs as a user might have."""
    before = getattr(jax.config, FOLDER), getattr(jax.config, SECONDS)
    yield lambda folder: jax.config.update(FOLDER, folder)
    jax.config.update(FOLDER, before[0])
    jax.config.update(SECONDS, before[1])


@pytest.mark.parametrize("elsewhere", ["there", ""])
def test_another_place_is_respected_and_so_is_none(tmp_path, monkeypatch, setting, elsewhere):
    monkeypatch.setenv("NAT_JAX_CACHE", str(tmp_path / "cache"))
    setting(elsewhere)
    cache_dir.enable_compilation_cache()
    assert getattr(jax.config, FOLDER) == elsewhere
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, setting, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NAT_JAX_CACHE", str(tmp_path / "file"))
    setting(None)
    with caplog.at_level("INFO", logger="nat_jax"):
        cache_dir.enable_compilation_cache()
    assert getattr(jax.config, FOLDER) is None
    (record,) = caplog.records
    assert "set NAT_JAX_CACHE to a folder that can be written" in record.getMessage()
