"""``--help``: complete, true, and there at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from nat_jax import config, evaluate, main, models
from nat_jax.cli import help_text
from nat_jax.input.sources import SOURCES

CALL = "import sys; from nat_jax import main; sys.argv = ['main', {!r}]; main.run(); print(*{})"
LOADED = "sorted({name.partition('.')[0] for name in sys.modules})"


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_comes_without_jax_and_ends_well(tmp_path: Path, asked: str) -> None:
    done = run(tmp_path, CALL.format(asked, LOADED))
    assert done.returncode == 0, done.stderr
    *shown, loaded = done.stdout.splitlines()
    assert shown[0].startswith("usage: python -m nat_jax.main --config=FILE")
    assert not {"jax", "numpy", "flax", "grain"} & set(loaded.split())
    assert max(map(len, shown)) <= 100
    for name in (*main.TASKS, *(key.name for key in help_text.KEYS)):
        assert any(line.split()[:1] == [name] for line in shown), name
    for flag in ("--config", "--workdir", "--distributed=auto", "--process_id"):
        assert any(line.split()[:1] == [flag] for line in shown), flag


def test_a_run_does_load_jax() -> None:
    done = run(ROOT, f"from nat_jax import config; print(*{LOADED})")
    assert {"jax", "numpy"} <= set(done.stdout.split())


def test_every_task_has_its_line() -> None:
    assert list(help_text.TASKS) == list(main.TASKS)
    assert all(help_text.TASKS.values())


def test_every_config_has_its_line() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("[!_]*.py")}
    lines = dict(help_text.configs())
    assert set(lines) == files
    assert lines["configs/cifar10.py"] == "CIFAR-10: 50,000 colour images of 32x32 pixels."


def wrong_keys(keys: tuple[help_text.Key, ...]) -> list[str]:
    """Return the keys that no config has or whose default is another one."""
    defaults = config.flatten(config.default())
    found = []
    for key in keys:
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        if key.name not in defaults or defaults[key.name] != default:
            found.append(key.name)
    return found


def test_the_ten_keys_have_these_defaults() -> None:
    assert len(help_text.KEYS) == 10
    assert wrong_keys(help_text.KEYS) == []
    other = help_text.Key("batch_size", 255, "")
    unknown = help_text.Key("batchsize", 256, "")
    assert wrong_keys((other, unknown)) == ["batch_size", "batchsize"]


def test_the_named_choices_are_those_that_there_are() -> None:
    meaning = {key.name: f"{key.default} | {key.meaning}" for key in help_text.KEYS}
    for name, known in (("model.name", models.MODELS), ("data.source", SOURCES)):
        named = {choice.partition(":")[0] for choice in meaning[name].split(" | ")}
        assert named == set(known)
    assert set(help_text.KEYS[-1].default) <= set(evaluate.PROBES)


def test_long_names_and_long_words_stay_within_the_page() -> None:
    rows = [("a" * 40, "word " * 40), ("b", "c")]
    lines = help_text._section("Title:", rows).splitlines()
    assert lines[:2] == ["Title:", "  " + "a" * 40]
    assert max(map(len, lines)) <= 100
    assert lines[-1].split() == ["b", "c"]
    assert lines[-1].index("c") == lines[2].index("word")
