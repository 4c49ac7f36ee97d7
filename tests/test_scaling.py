"""The projections of docs/scaling.md are what the program says, from results without a fault."""

import json
import sys

import pytest
from project import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import collectives_table
import scaling

RESULTS = ROOT / "docs" / "results"


def test_the_page_shows_the_tables_of_the_program() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in scaling.tables(scaling.load(RESULTS)) if line]
    assert len(lines) > 12
    assert [line for line in lines if line not in page] == []


def test_the_listing_shows_the_results() -> None:
    rows = json.loads((RESULTS / "collectives.json").read_text())["rows"]
    assert [row["faults"] for row in rows if row["faults"]] == []
    assert (RESULTS / "collectives.md").read_text() == collectives_table.page(rows)


def test_an_exchange_takes_what_arithmetic_says() -> None:
    pod, node, nodes = (scaling.MACHINES[k] for k in (0, 1, 2))
    payload = 1e9
    assert pod.exchange(payload) == pytest.approx(2e9 * 255 / 256 / 200e9)
    assert node.exchange(payload) == pytest.approx(2e9 * 7 / 8 / 450e9)
    across = 2e9 / 8 * 3 / 4 / 50e9
    assert nodes.exchange(payload) == pytest.approx(node.exchange(payload) + across)
