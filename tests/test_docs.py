"""What pages say beside their code: keys and tests that exist, a picture that is as it is drawn."""

import importlib.util
import re
from types import ModuleType

import numpy as np
import pytest
from project import ROOT

from nat_jax import config
from nat_jax.cli import help_text
from nat_jax.training import metrics

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = config.flatten(config.default())
GROUPS = {key.partition(".")[0] for key in KEYS if "." in key}
FREE = ("model.options", "assign.options")  # whatever arguments a network or solver has
FENCED = re.compile(r"^[ \t]*```.*?^[ \t]*```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
FLAG = re.compile(r"--config\.([\w.]+)")
NAMED = re.compile(rf"(?:c\.)?((?:{'|'.join(sorted(GROUPS))})\.[a-z_][\w.]*)(?: ?= ?[^=].*)?")


def unknown_keys(text: str) -> list[str]:
    """Return the config keys that a page names in `code` between its blocks, and nobody reads."""
    named = []
    for code in CODE.findall(FENCED.sub("", text)):
        named += [key.rstrip(".") for key in FLAG.findall(code)]
        if (whole := NAMED.fullmatch(code)) is not None:
            named.append(whole[1])
    return [
        key for key in named if key not in KEYS and not key.startswith(FREE) and not is_no_key(key)
    ]


def is_no_key(name: str) -> bool:
    """Say whether a name such as `config.json` or `optim.measured` is a file or a part of ours."""
    module, _, rest = name.partition(".")
    if rest in ("json", "jsonl", "md", "py", "stablehlo", "txt"):
        return True
    path = ROOT / "nat_jax" / f"{module}.py"
    return (
        path.exists() and re.search(rf"^(def |class )?{rest}\b", source(module), re.M) is not None
    )


def source(module: str) -> str:
    return (ROOT / "nat_jax" / f"{module}.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_key_that_a_page_names_exists(page):
    assert unknown_keys(page.read_text(encoding="utf-8")) == []


def test_a_key_that_nobody_reads_is_found():
    text = """
    `--config.data.thread=4`, `assign.blocks`, `optim.loss`, `--config.epochs=3`, data.nothing,
    `assign.options.eps`, `optim.measured`, `targets.kinds = "sphere"` and `targets.kind = "basis"`
```bash
python -m nat_jax.main --config.task=nothing `data.thread`
```
    """
    assert unknown_keys(text) == ["data.thread", "assign.blocks", "targets.kinds"]


def missing_flags(text: str, known: set[str]) -> set[str]:
    """Return the program's flags that a page names in `code`, and that it does not have."""
    return {
        flag
        for code in CODE.findall(FENCED.sub("", text))
        for flag in re.findall(r"--(distributed\w*|workdir|coordinator|num_\w+|process_\w+)", code)
        if flag not in known
    }


def test_the_flags_that_the_questions_name_exist():
    known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source("main")))
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    assert missing_flags(text, known) == set()
    assert missing_flags("`--distributed_time=3`", known) == {"distributed_time"}


def test_every_task_that_the_questions_name_exists():
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    named = set(re.findall(r"--config\.task=(\w+)", text))
    assert named and named <= set(help_text.TASKS)


def health_words() -> list[str]:
    """Return what `metrics.health` can say of runs that are well and of those that are not."""
    well = {
        "train/loss": 0.8,
        "assign/cosine_before": 0.5,
        "assign/cosine_after": 0.6,
        "features/effective_rank": 8.0,
    }
    ill = {"train/loss": float("nan"), "assign/worst_status": 1.0, "features/effective_rank": 1.0}
    said = []
    for row, epoch in ((well, 3), (well, 0), (well | {"assign/cosine_before": 0.0}, 3), (ill, 3)):
        said += metrics.health(row, n=128, dim=10, matched_epoch=epoch)
    return said


def test_the_words_of_a_run_stand_in_the_page_as_it_says_them():
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    shown = re.findall(r'^\| "(.+)" \|', page, re.MULTILINE)
    assert len(shown) == 6
    said = "\n".join(health_words())
    for words in shown:
        for part in words.split(" ... "):
            assert part.removeprefix("warning:").strip() in said
    assert "it is learning a lot" not in said


@pytest.fixture(scope="module")
def picture() -> ModuleType:
    path = ROOT / "docs" / "images" / "how_it_works.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_picture_shows_what_the_library_computes(picture):
    drawn = picture.compute()
    facts, kept = picture.facts(drawn), picture.kept()
    assert facts["epoch"] == kept["epoch"]
    for name in ("cosine", "same_digit", "before_and_after"):  # another CPU rounds otherwise
        np.testing.assert_allclose(facts[name], kept[name], atol=0.1)
    assert sorted(facts["matched"]) == list(range(12))
    before, after = picture.means(drawn.example)
    assert after > before and drawn.example.gap < 1e-4
    cosines = np.sum(drawn.example.features * drawn.example.targets[drawn.example.matched], axis=1)
    pulls = np.linalg.norm(drawn.example.pull, axis=1)
    np.testing.assert_allclose(pulls, np.sqrt(1 - cosines**2), atol=1e-4)

    figure = picture.draw(drawn)
    maps = [axes for axes in figure.axes if axes.name == "mollweide"]
    assert len(maps) == 2 + len(picture.SNAPSHOTS)
    dots = [len(axes.collections[-1].get_offsets()) for axes in maps]
    assert dots == [12, 12] + [len(drawn.labels)] * len(picture.SNAPSHOTS)
    assert not np.allclose(kept["cosine"][0], facts["cosine"][-1], atol=0.1)
