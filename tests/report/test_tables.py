"""The table of results: order, marks, gains and words."""

import re
from typing import Any

import pytest

from nat_jax.report.tables import arrange, markdown_table, outcome, text_table


def _row(layer: str, network: str, mean: float, **other: Any) -> dict[str, Any]:
    return {
        "layer": layer,
        "network": network,
        "probe": "knn",
        "labels": "all",
        "mean": mean,
        "std": None,
        "values": [mean],
        "seeds": [0],
    } | other


def _rows(trained: float = 0.9) -> list[dict[str, Any]]:
    return [
        _row("z", "nat", trained),
        _row("z", "untrained", 0.76),
        _row("pixels", "raw pixels", 0.93),
    ]


def test_lines_are_ordered_and_the_best_is_marked() -> None:
    table = arrange(_rows() + [_row("z", "nat", 0.5, labels="10 per class")])
    lines = table.groups["all"]
    assert [line.network for line in lines] == ["raw pixels", "untrained", "nat"]
    assert [line.cells[0].best for line in lines] == [True, False, False]
    assert lines[2].cells[0].gain == pytest.approx(14.0)
    assert lines[0].cells[0].gain is None and lines[1].cells[0].gain is None
    alone = table.groups["10 per class"][0].cells[0]
    assert alone.best and alone.gain is None
    equal = arrange([_row("z", "nat", 0.90004), _row("z", "untrained", 0.9)])
    assert all(line.cells[0].best for line in equal.groups["all"])  # what looks equal
    rows = [_row("conv3", "nat", 0.9), _row("conv1", "nat", 0.8), *_rows()]
    layers = [line.layer for line in arrange(rows).groups["all"]]
    assert layers == ["pixels", "z", "z", "conv3", "conv1"]
    assert arrange([]).groups == {} and text_table([])


def test_text_table() -> None:
    rows = _rows() + [_row("z", "nat", 0.88, probe="linear_probe", std=0.01, seeds=[0, 1, 2])]
    text = text_table(rows)
    assert "over 3 seeds" in text and "all labels" in text
    assert re.search(r"z +NAT +90\.0 +88\.0 ± 1\.0\*", text)
    assert re.search(r"raw pixels +93\.0 *\* +-", text)
    assert not any(line != line.rstrip() for line in text.splitlines())
    columns = {line.index(".") for line in text.splitlines() if re.search(r"\d\.\d", line)}
    assert len(columns) == 1  # decimals stand in line
    assert "±" not in text_table(_rows())


def test_markdown_table() -> None:
    lines = markdown_table(_rows()).splitlines()
    assert lines[0] == "| labels | features | network | kNN |"
    assert lines[1] == "| --- | --- | --- | ---: |"
    assert lines[2:] == [
        "| all | – | raw pixels | **93.0** |",
        "| all | z | untrained | 76.0 |",
        "| all | z | NAT | 90.0 |",
    ]


def test_outcome_is_honest() -> None:
    assert outcome(_rows()) == "kNN on z: 76.0 % untrained → 90.0 % NAT (raw pixels 93.0 %)."
    conv = [_row("conv3", "untrained", 0.93), _row("conv3", "nat", 0.92)]
    assert outcome(_rows() + conv).endswith("above the untrained network in 1 of 2 comparisons.")
    assert outcome(_rows(0.7) + conv).endswith("not above the untrained network in any of 2.")
    better = [_row("conv3", "untrained", 0.93), _row("conv3", "nat", 0.94)]
    assert outcome(_rows() + better).endswith("in all 2 comparisons.")


def test_outcome_without_the_usual_rows() -> None:
    few = [_row("conv3", "nat", 0.5, probe="mlp_probe", labels="10 per class")]
    assert outcome(few) == "MLP on conv3 with 10 labels per class: 50.0 % NAT."
    assert "No trained network" in outcome([_row("pixels", "raw pixels", 0.9)])


def test_rejects() -> None:
    with pytest.raises(ValueError, match="key mean"):
        arrange([{k: v for k, v in _rows()[0].items() if k != "mean"}])
    with pytest.raises(ValueError, match="got two"):
        arrange(_rows() + _rows()[:1])


def test_several_networks_of_a_kind_are_told_apart() -> None:
    rows = [
        _row("z", "untrained", 0.5),
        _row("z", "nat", 0.6),
        _row("z", "nat: other", 0.7),
        _row("patches", "k-means patches", 0.8),
    ]
    lines = arrange(rows).groups["all"]
    assert [line.network for line in lines] == ["k-means patches", "untrained", "nat", "nat: other"]
    assert [line.cells[0].gain for line in lines[1:]] == [
        None,
        pytest.approx(10),
        pytest.approx(20),
    ]
    assert "| all | – | k-means patches | **80.0** |" in markdown_table(rows)
    assert "| all | z | NAT: other | 70.0 |" in markdown_table(rows)
