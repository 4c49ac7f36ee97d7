"""What the pages show works: links, config keys, commands and Python blocks."""

import re
import runpy
from pathlib import Path

import numpy as np
import pages
import pytest
from pages import TEXTS, Block
from project import ROOT

from nat_jax import config

BLOCKS = {page: pages.blocks(text, page) for page, text in TEXTS.items()}
# test_contributing.py follows CONTRIBUTING.md, whose blocks belong together.
PROGRAMS = [
    program
    for page, found in BLOCKS.items()
    if page != "CONTRIBUTING.md"
    for program in pages.programs(found)
    if not program[0].marker.startswith("needs:")
]
QUICK = [program for program in PROGRAMS if not program[0].marker]
SLOW = [program for program in PROGRAMS if program[0].marker == "slow"]
KEYS = config.flatten(config.default())
GROUPS = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))
FREE = ("model.options", "assign.options")  # the arguments of a network or a solver
FILES = ("json", "jsonl", "md", "py", "stablehlo", "txt")


def where(program: list[Block]) -> str:
    return program[0].where


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    assert pages.dead_links(page, TEXTS[page]) == []


def test_dead_links_are_found() -> None:
    text = (
        "# A page\n## `What`, then?\n[a](#what-then) [b](#nowhere) [c](docs/nothing.md) [d](docs)"
    )
    text += " [e](docs/data.md#sources) [f](docs/data.md#nowhere) [g](https://jax.dev/x#y)"
    found = pages.dead_links("README.md", text)
    assert found == ["#nowhere", "docs/nothing.md", "docs/data.md#nowhere"]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_are_right(page: str) -> None:
    assert [block.where for block in BLOCKS[page] if not block.language] == []
    assert [
        wrong
        for block in BLOCKS[page]
        if block.language in pages.SHELL and "configs/bars.py" not in block.body
        for wrong in pages.shell_complaints(block)
    ] == []
    assert [said for span in pages.spans(TEXTS[page]) if (said := pages.complaint(span))] == []


def test_commands_in_the_configs_are_right() -> None:
    for path in sorted((ROOT / "configs").rglob("[!_]*.py")):
        shown = pages.header(path)
        assert shown, path
        assert [wrong for command in shown if (wrong := pages.complaint(command))] == []


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("gcloud things", "no test runs it"),
        ("pip install nat_jax", "no test runs it"),
        ("make nothing", "no such target"),
        ("python -m nothing", "there is no module nothing"),
        ("python benchmarks/nothing.py", "there is no program"),
        ("python benchmarks/step.py --rounds 3 --outputt x", "step.py has no --outputt"),
        ("python -m nat_jax.main --workdir=x", "--config is missing"),
        ("python -m nat_jax.main --config=configs/nothing.py", "nothing.py"),
        ("python -m nat_jax.main --config=configs/digits.py --config.batchsize=3", "batch"),
        ("python -m nat_jax.main --config=configs/digits.py --config.batch_size=0", "batch_size"),
        ("python -m nat_jax.main --config=configs/digits.py --work_dir=x", "work_dir"),
        ("python -m nat_jax.main --config=configs/digits.py --config.task=nothing", "nothing"),
    ],
)
def test_a_wrong_command_is_noticed(command: str, problem: str) -> None:
    assert problem in str(pages.complaint(command))
    assert list(pages.shell_complaints(Block("page", "", "bash", command)))
    launched = Block("page", "needs: a cluster", "bash", f"srun --ntasks=2 {command}")
    assert bool(list(pages.shell_complaints(launched))) == ("nat_jax.main" in command)


@pytest.mark.parametrize(
    "command",
    [
        'pip install -e ".[test]"',
        "JAX_PLATFORMS=cpu pytest",
        "make demo",
        "python -m nat_jax.main --config=configs/digits.py --config.batch_size=64 --workdir=x",
    ],
)
def test_a_right_command_is_accepted(command: str) -> None:
    assert pages.complaint(command) is None


@pytest.mark.parametrize("program", QUICK, ids=where)
def test_shown_python_runs(program: list[Block], tmp_path: Path) -> None:
    pages.run_program(program, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("program", SLOW, ids=where)
def test_shown_slow_python_runs(program: list[Block], tmp_path: Path) -> None:
    pages.run_program(program, tmp_path)


def test_python_that_is_not_run_compiles() -> None:
    left = [b for found in BLOCKS.values() for b in found if b.marker.startswith("needs:")]
    for block in left:
        if block.language == "python":
            compile(block.body, block.where, "exec")


PAGE = """
<!-- needs: a TPU -->
```bash
gcloud things   # a comment
```
```python
x = 1
print(x)
# > 1
```
<!-- continues -->
```python
print(x + 1)
#> 2
```

- item
  ```bash
  pip install -e . && python -m nat_jax.main \\
      --config=configs/digits.py
  ```
<!-- slow -->
```python
raise SystemExit(3)
```
`FOO=1 python benchmarks/assign.py
--costs DIR` and `not python`
"""


def test_blocks_are_found_with_their_markers(tmp_path: Path) -> None:
    found = pages.blocks(PAGE, "page.md")
    assert [block.marker for block in found] == ["needs: a TPU", "", "continues", "", "slow"]
    assert found[0].where == "page.md:3"
    main = "python -m nat_jax.main      --config=configs/digits.py"
    assert pages.commands(found[3].body) == ["pip install -e .", main]
    assert pages.spans(PAGE) == ["FOO=1 python benchmarks/assign.py --costs DIR"]
    right, wrong = pages.programs(found)
    pages.run_program(right, tmp_path)
    with pytest.raises(SystemExit):
        pages.run_program(wrong, tmp_path)
    with pytest.raises(AssertionError):
        pages.run_program([right[0], right[1]._replace(body="print(x + 2)\n# > 2")], tmp_path)
    with pytest.raises(NameError):
        pages.run_program([right[1]], tmp_path)


def unknown_keys(text: str) -> list[str]:
    """Return the config keys that a page names in `code` between its blocks, and nobody reads."""
    named = []
    for code in re.findall(r"`([^`\n]+)`", pages.FENCE.sub("", text)):
        named += [key.rstrip(".") for key in re.findall(r"--config\.([\w.]+)", code)]
        whole = re.fullmatch(rf"(?:c\.)?((?:{GROUPS})\.[a-z_][\w.]*)(?: ?= ?[^=].*)?", code)
        if whole is not None and whole[1].rpartition(".")[2] not in FILES:
            named.append(whole[1])
    return [key for key in named if key not in KEYS and not key.startswith(FREE)]


@pytest.mark.parametrize("page", TEXTS)
def test_every_key_that_a_page_names_exists(page: str) -> None:
    assert unknown_keys(TEXTS[page]) == []


def test_a_key_that_nobody_reads_is_found() -> None:
    text = """
    `--config.data.thread=4`, `assign.blocks`, `optim.loss`, `--config.epochs=3`, data.nothing,
    `assign.options.eps`, `config.json`, `targets.kinds = "sphere"` and `targets.kind = "basis"`
```bash
python -m nat_jax.main --config.task=nothing `data.thread`
```
    """
    assert unknown_keys(text) == ["data.thread", "assign.blocks", "targets.kinds"]


@pytest.mark.slow
def test_the_picture_shows_what_the_library_computes() -> None:
    """Numbers of docs/images/how_it_works.png, which are stored in the picture."""
    picture = runpy.run_path(str(ROOT / "docs" / "images" / "how_it_works.py"))
    drawn, kept = picture["compute"](), picture["kept"]()
    facts = picture["facts"](drawn)
    assert facts["epoch"] == kept["epoch"]
    for name in ("cosine", "same_digit", "before_and_after"):  # another CPU rounds differently
        np.testing.assert_allclose(facts[name], kept[name], atol=0.1)
    assert not np.allclose(kept["cosine"][0], facts["cosine"][-1], atol=0.1)
    before, after = picture["means"](drawn.example)
    assert after > before and drawn.example.gap < 1e-4
    assert len(picture["draw"](drawn).axes) > len(picture["SNAPSHOTS"])
