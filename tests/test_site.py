"""The documentation site: every page is in the contents, and links between pages are rewritten.

``bash .ci/run`` builds the site, with warnings as errors; nothing here needs Sphinx.
"""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from project import ROOT

import nat_jax

TOCTREE = re.compile(
    r"^:::\{toctree\}\n(?P<md>.*?)^:::$|^\.\. toctree::\n(?P<rst>(?:[ \t]+.*\n|\n)*)",
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture(scope="module")
def conf() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def listed(page: Path, docs: Path) -> list[str]:
    """Return the pages that a page's tables of contents name, from ``docs`` and without suffix."""
    entries = []
    for found in TOCTREE.finditer(page.read_text("utf-8") + "\n"):
        lines = (found["md"] or found["rst"]).splitlines()
        entries += [line.strip() for line in lines if line.strip() and line.strip()[0] != ":"]
    names = [re.sub(r"^.*<(.*)>$", r"\1", entry) for entry in entries]  # of "Title <name>"
    return [(page.parent / name).relative_to(docs).as_posix() for name in names]


def wrongly_listed(docs: Path) -> list[str]:
    """Return the pages that do not stand exactly once in the tables of contents."""
    pages = [path for path in docs.rglob("*") if path.suffix in (".md", ".rst")]
    named = [name for page in pages for name in listed(page, docs)]
    there = {page.relative_to(docs).with_suffix("").as_posix() for page in pages} - {"index"}
    return sorted(
        name for name in there | set(named) if named.count(name) != 1 or name not in there
    )


def test_every_page_is_in_the_contents() -> None:
    assert wrongly_listed(ROOT / "docs") == []


def test_a_page_that_is_not_in_the_contents_is_found(tmp_path: Path) -> None:
    (tmp_path / "api").mkdir()
    (tmp_path / "index.md").write_text(":::{toctree}\n:hidden:\n\nOne <one>\napi/index\n:::\n")
    (tmp_path / "api" / "index.rst").write_text("API\n\n.. toctree::\n   :maxdepth: 1\n\n   two\n")
    for name in ("one.md", "api/two.rst"):
        (tmp_path / name).write_text("# Page\n")
    assert wrongly_listed(tmp_path) == []
    (tmp_path / "three.md").write_text("# Three\n\n:::{toctree}\none\nnowhere\n:::\n")
    assert wrongly_listed(tmp_path) == ["nowhere", "one", "three"]


def test_the_version_is_the_library_s(conf: dict[str, Any]) -> None:
    assert conf["version"] == conf["release"] == nat_jax.__version__
    assert conf["html_title"].endswith(nat_jax.__version__)


@pytest.mark.parametrize(
    ("file", "link", "expected"),
    [
        ("docs/data.md", "features.md#export", "features.md#export"),
        ("docs/data.md", "results/digits.json", "results/digits.json"),
        ("docs/data.md", "https://jax.dev/x", "https://jax.dev/x"),
        ("docs/data.md", "#speed", "#speed"),
        ("docs/data.md", "../nat_jax/train.py", "REPOSITORY/blob/main/nat_jax/train.py"),
        ("docs/data.md", "../tests", "REPOSITORY/tree/main/tests"),
        ("docs/data.md", "../README.md#configs", "REPOSITORY/blob/main/README.md#configs"),
        ("docs/data.md", "../CONTRIBUTING.md#a-model", "contributing.md#a-model"),
        ("docs/data.md", "../nowhere.py", "../nowhere.py"),
        ("docs/results/step.md", "../../launch/README.md", "../launch.md"),
        ("docs/launch.md", "../launch/README.md", "REPOSITORY/blob/main/launch/README.md"),
        ("launch/README.md", "../docs/scaling.md#what-is-held", "scaling.md#what-is-held"),
        ("launch/README.md", "local.sh", "REPOSITORY/blob/main/launch/local.sh"),
        ("CONTRIBUTING.md", "docs/results/README.md", "results/README.md"),
        ("CONTRIBUTING.md", "CHANGELOG.md", "changelog.md"),
        ("CONTRIBUTING.md", "docs/results", "REPOSITORY/tree/main/docs/results"),
    ],
)
def test_links_lead_to_the_site_or_to_the_repository(
    conf: dict[str, Any], file: str, link: str, expected: str
) -> None:
    expected = expected.replace("REPOSITORY", conf["REPOSITORY"])
    text = "See [`a`]({}) and\n![b]({}).\n"
    assert conf["links_for_site"](text.format(link, link), file) == text.format(expected, expected)


def test_code_is_left_alone(conf: dict[str, Any]) -> None:
    fence = "```python\nx = f[a](../tests)\n```\n"
    text = f"`[a](../tests)`\n\n{fence}\n- item\n\n  ```\n  [a](../tests)\n  ```\n"
    assert conf["links_for_site"](text, "docs/data.md") == text
