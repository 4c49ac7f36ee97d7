"""The report page: what it shows, what it says when something is missing, that it stands alone."""

import json
import re
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


def _metrics() -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(1, 20):
        rows.append(
            {
                "step": step,
                "epoch": step / 2,
                "train/loss": 1 / step,
                "assign/cosine_before": 0.1,
                "assign/cosine_after": 0.4,
            }
        )
    rows.insert(9, {"step": 9, "epoch": 4.5, "eval/z/knn/all": 0.8})
    return rows


def _result(seeds: list[int]) -> dict[str, Any]:
    means = {("pixels", "raw pixels"): 0.93, ("z", "untrained"): 0.76, ("z", "nat"): 0.9}
    return {
        "task": "pretrain",
        "metric": "accuracy",
        "value": 0.9,
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


def _write_run(folder: Path) -> None:
    (folder / "results").mkdir(parents=True)
    (folder / "pictures").mkdir()
    lines = [json.dumps(row) for row in _metrics()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "results" / "health.json").write_text(json.dumps(HEALTH))
    (folder / "pictures" / "filters.png").write_bytes(filters(np.ones((3, 3, 2, 4))))
    images = np.zeros((2, 4, 8, 8, 3), np.uint8)
    (folder / "pictures" / "neighbours_z.png").write_bytes(neighbours(images[:, 0], images))


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    _write_run(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "results" / "pretrain.json").write_text(json.dumps(_result([0])))
    return folder


class _Checker(HTMLParser):
    """Collects the tags that are left open, and every address."""

    VOID = frozenset({"meta", "img", "path", "rect", "use", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def _check(page: str) -> _Checker:
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_holds_everything(workdir: Path) -> None:
    path = write_report(workdir)
    assert path == workdir / "report.html"
    page = path.read_text()
    _check(page)
    for text in (
        "<h1>my-run</h1>",
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
    ):
        assert text in page, text
    assert page.index("Filters of the first") < page.index("Nearest neighbours by")
    assert str(workdir) not in page
    assert list(workdir.glob(".report*")) == []


def test_the_page_stands_alone(workdir: Path) -> None:
    page = write_report(workdir).read_text()
    addresses = _check(page).addresses
    assert len([a for a in addresses if a.startswith("data:image/png;base64,")]) == 2
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/)", page) and "@import" not in page
    assert "<script" not in page


def test_the_same_files_give_the_same_page(workdir: Path) -> None:
    assert write_report(workdir).read_bytes() == write_report(workdir).read_bytes()


def test_nothing_but_a_folder(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text()
    _check(page)
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
def test_each_piece_may_be_missing(workdir: Path, path: str, gone: str) -> None:
    assert gone in write_report(workdir).read_text()
    (workdir / path).unlink()
    page = write_report(workdir).read_text()
    _check(page)
    assert gone not in page


def test_several_seeds(tmp_path: Path) -> None:
    for seed in (0, 1, 10):
        _write_run(tmp_path / f"seed-{seed}")
    (tmp_path / "seed-notes").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "seeds": [0, 1, 10]}))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "pretrain.json").write_text(json.dumps(_result([0, 1, 10])))
    page = write_report(tmp_path).read_text()
    _check(page)
    assert "Thin lines: seed 0, seed 1, seed 10; thick: their mean." in page
    assert "over 3 seeds" in page and "±1.0" in page
    assert page.count("Filters of the first layer</h3>") == 3
    assert "<h2>Filters and neighbours (seed 0)</h2>" in page
    assert page.count("<li class=warning>") == 3


def test_accuracy_curves_start_untrained_and_end_with_the_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        _write_run(tmp_path / f"seed-{seed}")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "pretrain.json").write_text(json.dumps(_result([0, 1])))
    rows = read(tmp_path).metrics["seed 1"]
    accuracies = [(r["epoch"], r["eval/z/knn/all"]) for r in rows if "eval/z/knn/all" in r]
    assert accuracies == [(0.0, 0.77), (4.5, 0.8), (9.5, 0.91)]


def test_basis_targets_have_no_chance_level(workdir: Path) -> None:
    config = {**CONFIG, "targets": {"kind": "basis"}}
    (workdir / "config.json").write_text(json.dumps(config))
    assert ">chance<" not in write_report(workdir).read_text()


def test_text_of_files_is_escaped(workdir: Path) -> None:
    config = {**CONFIG, "data": {"source": "folder:<script>alert(1)</script>"}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "results" / "health.json").write_text(json.dumps(["a < b & c"]))
    result = _result([0])
    for row in result["table"]:
        row["layer"] = "<z>"
    (workdir / "results" / "pretrain.json").write_text(json.dumps(result))
    page = write_report(workdir).read_text()
    _check(page)
    assert "<script" not in page and "A &lt; b &amp; c" in page and "<z>" not in page
    assert page.count("<td>&lt;z&gt;</td>") == 1  # a layer is named once, on its first line


def test_gains_and_losses_of_training_are_marked(workdir: Path) -> None:
    gain = '<span class="gain up">+14.0</span>'
    assert gain in write_report(workdir).read_text()
    result = _result([0])
    result["table"][2]["mean"] = 0.7
    (workdir / "results" / "pretrain.json").write_text(json.dumps(result))
    page = write_report(workdir).read_text()
    assert '<span class="gain down">−6.0</span>' in page and gain not in page


def test_a_torn_last_line_is_ignored_and_another_is_not(workdir: Path) -> None:
    path = workdir / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 20, "ep')
    assert len(read(workdir).metrics[""]) == len(_metrics()) + 2
    path.write_text('{"step": 20, "ep\n' + whole)
    with pytest.raises(ValueError, match=r"metrics.jsonl:1: expected a JSON object"):
        write_report(workdir)


def test_further_results_are_listed(workdir: Path) -> None:
    retrieval = {"task": "retrieval", "metric": "recall@1", "value": 0.5}
    (workdir / "results" / "retrieval.json").write_text(json.dumps(retrieval))
    (workdir / "results" / "probes.json").write_text(json.dumps({"rows": []}))
    page = write_report(workdir).read_text()
    assert "recall@1 0.5" in page and "rows" not in page.split("Further results")[1][:200]


def test_tables_of_further_results_are_shown(workdir: Path) -> None:
    row = {"layer": "z", "network": "nat", "probe": "k=5", "labels": "plain votes", "mean": 0.6}
    result = {"task": "knn", "metric": "top-1", "value": 0.6, "untrained": 0.41, "table": [row]}
    (workdir / "results" / "knn.json").write_text(json.dumps(result))
    page = write_report(workdir).read_text()
    assert "top-1 0.6 (untrained 0.41)" in page
    assert "k=5" in page.split("Further results")[1] and "plain votes" in page


def test_rejects(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no folder"):
        write_report(tmp_path / "missing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        write_report(tmp_path)


def test_a_result_of_an_earlier_step_says_so(workdir: Path) -> None:
    own = workdir / "results" / "pretrain.json"
    own.write_text(json.dumps({**_result([0]), "run": {"steps": 6}}))
    other = {
        "task": "knn",
        "metric": "kNN",
        "value": 0.5,
        "protocol": {"test": {"source": "folder:new", "split": "test"}},
        "run": {"networks": [{"untrained": {"step": 0}, "nat": {"step": 3}}]},
    }
    file = workdir / "results" / "knn.json"
    file.write_text(json.dumps(other))
    page = write_report(workdir).read_text()
    assert "on folder:new; of step 3, where the run has done 6" in page
    other["run"] = {"networks": [{"nat": {"step": 6}, "nat: b": {"step": 9, "folder": "b"}}]}
    file.write_text(json.dumps(other))
    page = write_report(workdir).read_text()
    assert "on folder:new" in page and "where the run has done" not in page
