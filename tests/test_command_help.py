"""``--help``: complete, true, and there at once."""

import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

from nat_jax import command_help, config, evaluate, main, models, records

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
    for name in (*main.TASKS, *(key.name for key in command_help.KEYS)):
        assert any(line.split()[:1] == [name] for line in shown), name
    for flag in ("--config", "--workdir", "--distributed=auto", "--process_id"):
        assert any(line.split()[:1] == [flag] for line in shown), flag


def test_a_run_does_load_jax() -> None:
    done = run(ROOT, f"from nat_jax import config; print(*{LOADED})")
    assert {"jax", "numpy"} <= set(done.stdout.split())


def test_every_task_has_its_line() -> None:
    assert list(command_help.TASKS) == list(main.TASKS)
    assert all(command_help.TASKS.values())


def test_every_config_has_its_line() -> None:
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("[!_]*.py")}
    lines = dict(command_help.configs())
    assert set(lines) == files
    assert lines["configs/cifar10.py"] == "CIFAR-10: 50,000 colour images of 32x32 pixels."


def wrong_keys(keys: tuple[command_help.Key, ...]) -> list[str]:
    """Return the keys that no config has or whose default is another one."""
    defaults = config.flatten(config.default())
    found = []
    for key in keys:
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        if key.name not in defaults or defaults[key.name] != default:
            found.append(key.name)
    return found


def test_the_ten_keys_have_these_defaults() -> None:
    assert len(command_help.KEYS) == 10
    assert wrong_keys(command_help.KEYS) == []
    other = command_help.Key("batch_size", 255, "")
    unknown = command_help.Key("batchsize", 256, "")
    assert wrong_keys((other, unknown)) == ["batch_size", "batchsize"]


def test_the_named_choices_are_those_that_there_are() -> None:
    meaning = {key.name: f"{key.default} | {key.meaning}" for key in command_help.KEYS}
    for name, known in (("model.name", models.MODELS), ("data.source", records.SOURCES)):
        named = {choice.partition(":")[0] for choice in meaning[name].split(" | ")}
        assert named == set(known)
    assert set(command_help.KEYS[-1].default) <= set(evaluate.PROBES)


def test_long_names_and_long_words_stay_within_the_page() -> None:
    rows = [("a" * 40, "word " * 40), ("b", "c")]
    lines = command_help._section("Title:", rows).splitlines()
    assert lines[:2] == ["Title:", "  " + "a" * 40]
    assert max(map(len, lines)) <= 100
    assert lines[-1].split() == ["b", "c"]
    assert lines[-1].index("c") == lines[2].index("word")
