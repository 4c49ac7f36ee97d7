"""Charts: which panels appear, the lines they draw, and that the SVG takes a page's colours."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from nat_jax.report import charts


def _rows(seed: int = 0) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(10, 200, 10):
        row = {"step": step, "epoch": step / 10, "train/loss": 1 / step, "train/learning_rate": 1.0}
        if step % 30 == 0:
            row |= {
                "assign/cosine_before": 0.1 + 0.01 * rng.random(),
                "assign/cosine_after": 0.5,
                "assign/moved": 0.9,
                "features/effective_rank": 4.0,
            }
        rows.append(row)
    rows.append({"step": 100, "epoch": 10.0, "eval/z/knn/all": 0.5})
    return rows


def _lines(runs: charts.Runs) -> list[np.ndarray]:
    """Return the vertices [n, 2] of the lines in the only panel of some runs."""
    (panel,) = charts.panels(runs)
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-0', charts.svg(panel, runs))
    vertices = [np.asarray(re.findall(r"[ML] ([\d.]+) ([\d.]+)", path), float) for path in paths]
    return [found for found in vertices if len(found)]


def _losses(epochs: list[float], values: list[float]) -> list[dict[str, float]]:
    return [{"epoch": e, "train/loss": v} for e, v in zip(epochs, values, strict=True)]


def test_panels_follow_the_metrics() -> None:
    assert [panel.title for panel in charts.panels({"": _rows()})] == [
        "Loss",
        "Cosine to the targets",
        "Images that moved",
        "Effective rank",
        "Learning rate",
        "Accuracy during training",
    ]
    assert len(charts.panels({"": _losses([1.0], [1.0])})) == 1
    assert charts.panels({"": _losses([1.0], [float("nan")])}) == charts.panels({}) == []


def test_missing_values_are_skipped_and_long_series_averaged() -> None:
    rows = _losses([i / 10 for i in range(1602)], [0.0, 2.0] * 801)
    rows[4]["train/loss"] = float("inf")
    rows[7] = {"epoch": 0.7, "train/loss": None, "features/effective_rank": None}
    (long,), (short,) = _lines({"": rows}), _lines({"": rows[:100]})
    assert np.ptp(short[:, 1]) > 100 and np.ptp(long[:, 1]) < 1  # points of the chart's height


def test_the_thick_line_is_the_mean_at_shared_epochs() -> None:
    first = _losses([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    second = _losses([2.0, 3.0, 4.0], [4.0, 5.0, 7.0])
    one, other, mean = _lines({"seed 0": first, "seed 1": second})
    np.testing.assert_allclose(mean, (one[1:] + other[:-1]) / 2, atol=0.01)


@pytest.mark.parametrize("seeds", [1, 3])
def test_svg_is_well_formed_and_themed(seeds: int) -> None:
    runs = {f"seed {seed}": _rows(seed) for seed in range(seeds)}
    seen: set[str] = set()
    for panel in charts.panels(runs, chance=0.3, dim=8)[:3]:
        text = charts.svg(panel, runs)
        root = ElementTree.fromstring(text)
        assert "viewBox" in root.attrib
        assert "var(--series-0, #" in text and "var(--faint)" in text
        assert not re.search(r"(?<!, )#[0-9a-f]{6}", text)  # every colour follows the page
        assert "http" not in text.replace("http://www.w3.org", "")
        ids = {element.attrib["id"] for element in root.iter() if "id" in element.attrib}
        assert ids and not ids & seen  # one page holds all panels
        seen |= ids


def test_the_chance_level_is_drawn_only_when_known() -> None:
    runs = {"": _rows()}
    for chance in (0.3, None):
        cosine = charts.panels(runs, chance=chance)[1]
        assert (">chance<" in charts.svg(cosine, runs)) == (chance is not None)


def test_many_accuracies_are_cut_to_those_with_all_labels() -> None:
    row = {
        f"eval/{layer}/{probe}/{labels}": 0.5
        for layer in ("z", "conv3")
        for probe in ("knn", "linear_probe")
        for labels in ("all", "10 per class")
    }
    (panel,) = charts.panels({"": [row]})
    assert list(panel.series.values()) == ["z kNN", "z linear", "conv3 kNN", "conv3 linear"]
