"""The projections of docs/scaling.md are what the program says, from results without a fault."""

import json
import sys
from pathlib import Path

import pytest
from project import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import collectives_read as reading
import collectives_table
import scaling

RESULTS = ROOT / "docs" / "results"


def page_tables() -> list[str]:
    """Return the lines of the tables that the program prints, as they stand on the page."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    printed = page.partition("\n## What is held")[2].partition("\n## What follows")[0]
    return [line for line in printed.splitlines() if line.startswith("|")]


def test_the_page_shows_the_tables_of_the_program() -> None:
    assert page_tables() == [line for line in scaling.tables(scaling.load(RESULTS)) if line]


def test_another_result_would_be_another_page(tmp_path: Path) -> None:
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    changed = json.loads((RESULTS / "collectives.json").read_text())
    for row in changed["rows"]:
        if row["target"] == "tpu:v5e:16x16" and row["variant"] == "plain":
            row["programs"][0]["touched"] *= 2
    (tmp_path / "collectives.json").write_text(json.dumps(changed))
    lines = [line for line in scaling.tables(scaling.load(tmp_path)) if line]
    different = {line.split(" | ")[0] for line in lines if line not in page_tables()}
    assert "| v5e-256" in different and "| 8 H100s" not in different


def listing() -> list[dict]:
    return json.loads((RESULTS / "collectives.json").read_text())["rows"]


def test_the_listing_shows_the_results() -> None:
    rows = listing()
    assert [row["faults"] for row in rows if row["faults"]] == []
    assert (RESULTS / "collectives.md").read_text() == collectives_table.page(rows)


@pytest.mark.parametrize("row", listing(), ids=lambda row: f"{row['target']}-{row['variant']}")
def test_the_budgets_of_the_page_hold(row: dict) -> None:
    """Bytes an image, or in all, that the first table of the page states."""

    def carried(*names: str) -> int:
        return collectives_table.carried(row, names)[1]

    matching, on_hosts = row["variant"] != "plain", row["variant"] == "match on hosts"
    assert round(carried(reading.GRADIENT) / 1e6) == 267
    assert carried(reading.CHANNELS) <= 240_000 + 80_000 * on_hosts
    assert carried(reading.SCALARS) <= 40
    each = 8 * matching + 8 * (row["permutation"] == "sharded")
    assert carried(reading.INTEGERS) <= each * row["batch"]
    # A solution has the gap, the rounds and the status of its block as well.
    assert carried(reading.SOLUTION) <= on_hosts * (4 + 12 / row["block"]) * row["batch"]
    spread = matching and row["block"] * row["devices"] > row["batch"]
    most = 1e6 * (6.5 if on_hosts else 4.5) * spread
    assert carried(reading.FEATURES, reading.WEIGHTS) <= most


def test_an_exchange_takes_what_arithmetic_says() -> None:
    pod, node, nodes = (scaling.MACHINES[k] for k in (0, 1, 2))
    payload = 1e9
    assert pod.exchange(payload) == pytest.approx(2e9 * 255 / 256 / 200e9)
    assert node.exchange(payload) == pytest.approx(2e9 * 7 / 8 / 450e9)
    across = 2e9 / 8 * 3 / 4 / 50e9
    assert nodes.exchange(payload) == pytest.approx(node.exchange(payload) + across)


def test_no_projection_is_faster_than_its_limits() -> None:
    measured = scaling.load(RESULTS)
    for machine in scaling.MACHINES:
        found = scaling.project(machine, measured)
        assert found.limit < found.expected < found.cycle
        assert found.match_at_once <= found.match
        assert found.images <= min(found.trained, found.decoded)
