"""Curves: which panels appear, what they hold, and that the SVG takes a page's colours."""

import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

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


def _titles(runs: charts.Runs) -> list[str]:
    return [panel.title for panel in charts.panels(runs)]


def test_panels_follow_the_metrics() -> None:
    assert _titles({"": _rows()}) == [
        "Loss",
        "Cosine to the targets",
        "Images that moved",
        "Effective rank",
        "Learning rate",
        "Accuracy during training",
    ]
    assert _titles({"": [{"step": 1, "epoch": 1.0, "train/loss": 1.0}]}) == ["Loss"]
    assert _titles({"": [{"step": 1, "epoch": 1.0, "train/loss": float("nan")}]}) == []
    assert _titles({}) == []


def test_points_skip_what_is_missing_and_thin_what_is_long() -> None:
    rows = [{"step": i, "epoch": i / 10, "a": float(i), "b": None} for i in range(2000)]
    rows[5]["a"] = float("inf")
    x, y = charts._points({"": rows}, "a")[""]
    assert len(x) == charts._MOST_POINTS
    np.testing.assert_allclose(y, 10 * x, rtol=1e-9)  # thinning keeps a straight line straight
    assert charts._points({"": rows}, "b") == {}


def test_mean_of_runs_at_shared_epochs() -> None:
    points = {
        "seed 0": (np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 2.0, 3.0])),
        "seed 1": (np.asarray([2.0, 3.0, 4.0]), np.asarray([4.0, 5.0, 6.0])),
    }
    epochs, values = charts._mean(points)
    assert epochs.tolist() == [2.0, 3.0] and values.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("seeds", [1, 3])
def test_svg_is_well_formed_and_themed(seeds: int) -> None:
    runs = {f"seed {seed}": _rows(seed) for seed in range(seeds)}
    for panel in charts.panels(runs, chance=0.3, dim=8):
        text = charts.svg(panel, runs)
        root = ElementTree.fromstring(text)
        assert "viewBox" in root.attrib
        assert "var(--series-0, #" in text and "var(--faint)" in text
        assert not re.search(r"(?<!, )#[0-9a-f]{6}", text)  # every colour follows the page
        assert "http" not in text.replace("http://www.w3.org", "")
        assert text == charts.svg(panel, runs)  # the same file every time


def test_the_chance_level_is_drawn_only_when_known() -> None:
    runs = {"": _rows()}
    cosine = [p for p in charts.panels(runs, chance=0.3) if p.title.startswith("Cosine")][0]
    assert ">chance<" in charts.svg(cosine, runs)
    cosine = [p for p in charts.panels(runs) if p.title.startswith("Cosine")][0]
    assert ">chance<" not in charts.svg(cosine, runs)


def test_ids_differ_between_panels() -> None:
    runs = {"": _rows()}
    ids = [
        {
            e.attrib["id"]
            for e in ElementTree.fromstring(charts.svg(p, runs)).iter()
            if "id" in e.attrib
        }
        for p in charts.panels(runs)[:3]
    ]
    assert ids[0] and not (ids[0] & ids[1] | ids[1] & ids[2] | ids[0] & ids[2])


def test_many_accuracies_are_cut_to_those_with_all_labels() -> None:
    row = {
        f"eval/{layer}/{probe}/{labels}": 0.5
        for layer in ("z", "conv3")
        for probe in ("knn", "linear_probe")
        for labels in ("all", "10 per class")
    }
    (panel,) = charts.panels({"": [row]})
    assert list(panel.series.values()) == ["z kNN", "z linear", "conv3 kNN", "conv3 linear"]


def test_curves_is_a_picture_of_all_panels() -> None:
    one = Image.open(io.BytesIO(charts.curves(_rows(), chance=0.3, dim=8)))
    three = Image.open(io.BytesIO(charts.curves({"a": _rows(0), "b": _rows(1)})))
    loss = Image.open(io.BytesIO(charts.curves([{"step": 1, "epoch": 1.0, "train/loss": 1.0}])))
    assert one.format == "PNG" and one.size == three.size
    assert one.width == 3 * loss.width and one.height == 2 * loss.height
    assert np.asarray(one.convert("L")).std() > 1  # not blank
    with pytest.raises(ValueError, match="got none"):
        charts.curves([{"step": 1, "epoch": 1.0}])


def test_pyplot_stays_out_of_it() -> None:
    import subprocess
    import sys

    code = (
        "import sys, nat_jax.report as r; assert 'matplotlib' not in sys.modules;"
        "r.curves([{'step': 1, 'epoch': 1.0, 'train/loss': 1.0}]);"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
