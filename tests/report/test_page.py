"""The report page: its contents, its words for missing files, and that it needs no other file."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nat_jax.report import filters, neighbours, write_report
from nat_jax.report.contents import read

CONFIG = {
    "seeds": [0],
    "batch_size": 64,
    "data": {"source": "digits"},
    "model": {"name": "convnet", "dim": 16},
    "targets": {"kind": "sphere"},
    "assign": {"block": None},
}
HEALTH = ["43% of the images took another target", "warning: the features collapse"]
METRICS: list[dict[str, float]] = [
    {"step": step, "epoch": step / 2, "train/loss": 1 / step, "assign/cosine_before": 0.1}
    for step in range(1, 20)
]
METRICS.insert(9, {"step": 9, "epoch": 4.5, "eval/z/knn/all": 0.8})


def _result(seeds: list[int], layer: str = "z", trained: float = 0.9) -> dict[str, Any]:
    means = {("pixels", "raw pixels"): 0.93, (layer, "untrained"): 0.76, (layer, "nat"): trained}
    return {
        "task": "pretrain",
        "metric": "accuracy",
        "value": trained,
        "protocol": {"test": {"records": 360}, "probes": {"knn": {"k": 20}}},
        "run": {"num_records": 1437, "jax": "9.9.9", "devices": "1 x cpu"},
        "table": [
            {
                "layer": layer,
                "network": network,
                "probe": "knn",
                "labels": "all",
                "mean": mean,
                "std": None if len(seeds) == 1 else 0.01,
                "values": [mean + 0.01 * seed for seed in seeds],
                "seeds": seeds,
            }
            for (layer, network), mean in means.items()
        ],
    }


def _put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _write_run(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    _put(folder / "results" / "health.json", HEALTH)
    (folder / "pictures" / "filters.png").write_bytes(filters(np.ones((3, 3, 2, 4))))
    images = np.zeros((2, 4, 8, 8, 3), np.uint8)
    (folder / "pictures" / "neighbours_z.png").write_bytes(neighbours(images[:, 0], images))


class _Checker(HTMLParser):
    """Collects the tags that are left open, and every address."""

    VOID = frozenset({"meta", "img", "path", "rect", "use", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = ("src", "href", "xlink:href", "srcset")
        self.addresses += [value or "" for name, value in attrs if name in named]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def _page(workdir: Path) -> str:
    """Write the report and return it; check that every tag is closed."""
    page = write_report(workdir).read_text()
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return page


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("report") / "my-run"
    _write_run(folder)
    _put(folder / "config.json", CONFIG)
    _put(folder / "results" / "pretrain.json", _result([0]))
    write_report(folder)
    return folder


@pytest.fixture
def workdir(finished: Path, tmp_path: Path) -> Path:
    """A copy without metrics and pictures, whose page is written fast."""
    ignored = shutil.ignore_patterns("metrics.jsonl", "pictures")
    return Path(shutil.copytree(finished, tmp_path / "my-run", ignore=ignored))


def test_the_page_holds_everything(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    for text in (
        "<h1>my-run</h1>",
        "Predicting noise on digits",
        "kNN on z: 76.0 % untrained → 90.0 % NAT (raw pixels 93.0 %).",
        "360 test records",
        "1,437",
        "64 images",
        "43% of the images",
        "<li class=warning>The features collapse</li>",
        "Loss",
        "Accuracy during training",
        ">chance<",
        "Filters of the first layer",
        "Nearest neighbours by cosine in z",
        "model.name",
        "probes.knn.k",
        "9.9.9",
        '<span class="gain up">+14.0</span>',
    ):
        assert text in page, text
    assert page.index("Filters of the first") < page.index("Nearest neighbours by")
    assert str(finished) not in page
    assert list(finished.glob(".report*")) == []
    assert _page(finished) == page  # the same files give the same page


def test_the_page_stands_alone(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    checker = _Checker()
    checker.feed(page)
    addresses = checker.addresses
    assert len([a for a in addresses if a.startswith("data:image/png;base64,")]) == 2
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page) and "@import" not in page
    assert "<script" not in page
    ids = re.findall(r' id="([^"]*)"', page)
    assert ids and len(ids) == len(set(ids))


def test_an_empty_folder_has_a_page(tmp_path: Path) -> None:
    page = _page(tmp_path)
    for text in ("No scores", "no curves", "no filters", "no config.json"):
        assert text in page
    assert "<svg" not in page and "<table" not in page


@pytest.mark.parametrize(
    ("path", "gone"),
    [
        ("results/pretrain.json", "class=results"),
        ("metrics.jsonl", "<svg"),
        ("results/health.json", "class=health"),
        ("pictures/filters.png", "Filters of the first layer"),
        ("config.json", "model.name"),
    ],
)
def test_each_piece_may_be_missing(finished: Path, tmp_path: Path, path: str, gone: str) -> None:
    assert gone in (finished / "report.html").read_text()
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / path).unlink()
    assert gone not in _page(tmp_path / "run")


def test_several_seeds(tmp_path: Path) -> None:
    for seed in (0, 1, 10):
        _write_run(tmp_path / f"seed-{seed}")
    (tmp_path / "seed-notes").mkdir()
    _put(tmp_path / "config.json", {**CONFIG, "seeds": [0, 1, 10]})
    _put(tmp_path / "results" / "pretrain.json", _result([0, 1, 10]))
    page = _page(tmp_path)
    assert "Thin lines: seed 0, seed 1, seed 10; thick: their mean." in page
    assert "over 3 seeds" in page and "±1.0" in page
    assert page.count("Filters of the first layer</h3>") == 3
    assert "<h2>Filters and neighbours (seed 0)</h2>" in page
    assert page.count("<li class=warning>") == 3
    # Accuracy curves start with the untrained network and end with the table.
    rows = read(tmp_path).metrics["seed 1"]
    accuracies = [(r["epoch"], r["eval/z/knn/all"]) for r in rows if "eval/z/knn/all" in r]
    assert accuracies == [(0.0, 0.77), (4.5, 0.8), (9.5, 0.91)]


@pytest.mark.parametrize(("scope", "images"), [("batch", "64"), ("dataset", "1,437")])
def test_how_many_images_are_matched_together(workdir: Path, scope: str, images: str) -> None:
    _put(workdir / "config.json", CONFIG | {"assign": {"scope": scope, "block": None}})
    facts = re.sub(r"<[^>]+>|\s+", " ", _page(workdir))
    assert re.search(rf"matched together\s+{images} images", facts)


def test_text_of_files_is_escaped(workdir: Path) -> None:
    source = "folder:<script>alert(1)</script>"
    _put(workdir / "config.json", {**CONFIG, "data": {"source": source}})
    _put(workdir / "results" / "health.json", ["a < b & c"])
    _put(workdir / "results" / "pretrain.json", _result([0], "<z>", trained=0.7))
    page = _page(workdir)
    assert "<script" not in page and "A &lt; b &amp; c" in page and "<z>" not in page
    assert page.count("<td>&lt;z&gt;</td>") == 1  # a layer is named once, on its first line
    assert '<span class="gain down">−6.0</span>' in page


def test_a_torn_last_line_is_ignored_and_another_is_not(workdir: Path) -> None:
    path, lines = workdir / "metrics.jsonl", [json.dumps(row) for row in METRICS]
    path.write_text("\n".join([*lines, '{"step": 20, "ep']))
    assert len(read(workdir).metrics[""]) == len(METRICS) + 2
    path.write_text("\n".join(['{"step": 20, "ep', *lines]))
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: expected a JSON object"):
        write_report(workdir)
    path.unlink()
    (workdir / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        write_report(workdir)
    with pytest.raises(ValueError, match="no folder"):
        write_report(workdir / "missing")


def test_further_results_and_their_tables_are_shown(workdir: Path) -> None:
    retrieval = {"task": "retrieval", "metric": "recall@1", "value": 0.5}
    row = {"features": "z", "network": "nat", "probe": "k=5", "labels": "plain votes", "mean": 0.6}
    knn = {"task": "knn", "metric": "top-1", "value": 0.6, "untrained": 0.41, "table": [row]}
    _put(workdir / "results" / "retrieval.json", retrieval)
    _put(workdir / "results" / "probes.json", {"rows": []})
    _put(workdir / "results" / "knn.json", knn)
    further = _page(workdir).split("Further results")[1]
    assert "recall@1 0.5" in further and "top-1 0.6 (untrained 0.41)" in further
    assert "k=5" in further and "plain votes" in further and "rows" not in further[:300]


def test_a_result_of_an_earlier_step_is_marked(workdir: Path) -> None:
    _put(workdir / "results" / "pretrain.json", {**_result([0]), "run": {"steps": 6}})
    other = {
        "task": "knn",
        "metric": "kNN",
        "value": 0.5,
        "protocol": {"test": {"source": "folder:new", "split": "test"}},
        "run": {"networks": [{"untrained": {"step": 0}, "nat": {"step": 3}}]},
    }
    _put(workdir / "results" / "knn.json", other)
    assert "on folder:new; of step 3, where the run has done 6" in _page(workdir)
    other["run"] = {"networks": [{"nat": {"step": 6}, "nat: b": {"step": 9, "folder": "b"}}]}
    _put(workdir / "results" / "knn.json", other)
    page = _page(workdir)
    assert "on folder:new" in page and "where the run has done" not in page
