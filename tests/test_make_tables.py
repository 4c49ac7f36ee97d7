"""The tables of the pages are those that docs/make_tables.py writes."""

import sys

import pytest
from project import ROOT

sys.path.append(str(ROOT / "docs"))

import make_tables


def test_the_pages_have_the_tables_of_the_results() -> None:
    """The same as ``python docs/make_tables.py --check``."""
    pages = make_tables.pages()
    assert [path for path, text in pages.items() if path.read_text("utf-8") != text] == []
    used = [found[1] for text in pages.values() for found in make_tables.MARKED.findall(text)]
    assert set(used) == set(make_tables.TABLES)


def test_a_changed_number_is_written_back() -> None:
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert "| 68.6 ± 0.3 |" in page
    assert make_tables.written(page.replace("| 68.6 ± 0.3 |", "| 68.7 ± 0.3 |")) == page
    with pytest.raises(KeyError):
        make_tables.written("<!-- table: nothing -->\n<!-- end of table -->\n")
