"""``--help``: complete, true, and there at once; the table of keys in the pages."""

from pathlib import Path

from project import ROOT, python

from nat_jax import main, models, schema
from nat_jax.cli import help_text
from nat_jax.input.sources import SOURCES

CALL = """
import sys
from nat_jax import config, main
main.run()
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_help_comes_without_jax_and_ends_well(tmp_path: Path) -> None:
    done = python("-c", CALL, "--help", cwd=tmp_path)
    *shown, loaded = done.stdout.splitlines()
    assert shown[0].startswith("usage: python -m nat_jax.main --config=FILE")
    assert "absl" in loaded.split()
    assert not {"jax", "numpy", "flax", "grain"} & set(loaded.split())
    assert max(map(len, shown)) <= 100
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("[!_]*.py")]
    first = {line.split()[0] for line in shown if line.strip()}
    flags = {"--config", "--workdir", "--distributed=auto", "--process_id"}
    assert {*main.TASKS, *files, *flags, "data.source", "eval.probes"} <= first
    assert "configs/cifar10.py CIFAR-10: 50,000 colour images of 32x32 pixels." in [
        " ".join(line.split()) for line in shown
    ]


def test_the_names_in_a_meaning_are_those_that_there_are() -> None:
    for key, known in (("model.name", models.MODELS), ("data.source", SOURCES)):
        names = schema.KEYS[key].help.split(" | ") + [schema.KEYS[key].default]
        assert {name.partition(":")[0] for name in names} == set(known)


def test_the_page_has_the_table_of_keys() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert help_text.markdown_table_of_keys() in page


def test_long_names_and_long_words_stay_within_the_page() -> None:
    rows = [("a" * 40, "word " * 40), ("b", "c")]
    lines = help_text._section("Title:", rows).splitlines()
    assert lines[:2] == ["Title:", "  " + "a" * 40]
    assert max(map(len, lines)) <= 100
    assert lines[-1].split() == ["b", "c"]
    assert lines[-1].index("c") == lines[2].index("word")
