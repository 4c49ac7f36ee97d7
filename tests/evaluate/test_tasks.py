"""The tasks that judge: one result each, the same twice, and every mistake in one message."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from sample_files import write_tree
from small_run import changed

from nat_jax import config, evaluate
from nat_jax.errors import InputError
from nat_jax.evaluate import draw_filters, protocols, tasks
from nat_jax.evaluate.tasks import judge_task
from nat_jax.export.loading import untrained_network
from nat_jax.input.sources import open_source
from nat_jax.models.frontend import FRONTENDS


def settings(task: str, network: str = "untrained", **changes):
    """Return a task on digits, with a tiny network and few records to learn on."""
    c = config.default()
    c.task, c.network, c.steps = task, network, 5
    c.data.image_size, c.data.pad = 8, 1
    c.model.dim, c.model.options.widths, c.model.options.pools = 4, (3,), 1
    c.eval.max_train, c.eval.mlp_width, c.eval.mlp_epochs = 200, 8, 2
    c.eval.knn_ks, c.eval.knn_k, c.eval.probes = (1, 5), 5, ("knn",)
    return changed(c, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Save a bundle that counts as trained: the first weights, moved."""
    bundle = untrained_network(settings("knn"), 0)

    def moved(x):
        return np.asarray(x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), np.float32)

    params = jax.tree.map(moved, bundle.params)
    folder = tmp_path_factory.mktemp("trained") / "bundle"
    dataclasses.replace(bundle, params=params, run={"seed": 0, "step": 7}).save(folder)
    return str(folder)


def judged(workdir, *arguments, **changes):
    return json.loads(judge_task(settings(*arguments, **changes), workdir).read_text())


def values(result, **wanted):
    rows = result["table"]
    return [r["mean"] for r in rows if all(r[key] == value for key, value in wanted.items())]


def test_a_result_has_all_that_it_depends_on_and_the_untrained_beside(trained, tmp_path):
    result = judged(tmp_path, "knn", trained)
    assert list(result)[:6] == ["task", "metric", "value", "untrained", "protocol", "run"]
    assert result["metric"] == "top-1 accuracy, k=5 on z, weighted votes"
    assert [result["value"]] == values(
        result, network="nat", layer="z", probe="k=5", labels="weighted votes"
    )
    assert [result["untrained"]] == values(
        result, network="untrained", layer="z", probe="k=5", labels="weighted votes"
    )
    assert result["protocol"]["k"] == [1, 5] and result["protocol"]["train"]["records"] == 200
    assert result["run"]["networks"][0]["nat"]["step"] == 7
    # pixels, two networks with two layers each; two k; two kinds of votes
    assert len(result["table"]) == (1 + 2 * 2) * 2 * 2
    assert values(result, network="raw pixels", probe="k=1", labels="plain votes")[0] > 0.8


def test_judged_twice_is_the_same_to_the_byte(trained, tmp_path, caplog):
    one, other = (judge_task(settings("knn", trained), tmp_path / name) for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    before = one.read_bytes()
    with caplog.at_level("INFO", "nat_jax"):
        judge_task(settings("knn", trained), tmp_path / "a")
        assert "read back" in caplog.text
        caplog.clear()
        judge_task(settings("knn", trained, eval__knn_ks=(2,)), tmp_path / "a")
        assert "replaces the result of another protocol" in caplog.text
    assert one.read_bytes() != before
    judge_task(settings("knn", trained), tmp_path / "a")  # nothing was lost
    assert one.read_bytes() == before


def test_features_are_computed_once_and_kept(trained, tmp_path):
    judge_task(settings("knn", trained), tmp_path)

    def kept():
        files = tmp_path.glob("features_cache/*/features.npy")
        return {file: file.stat().st_mtime_ns for file in files}

    before = kept()
    assert len(before) == (1 + 2 * 2) * 2  # of two splits
    judge_task(settings("linear_probe", trained), tmp_path)
    assert kept() == before
    judge_task(settings("knn", trained, eval__max_train=150), tmp_path)
    assert len(kept()) == 3 * 5  # new ones to learn on


def test_linear_probes_of_all_layers_at_once_learn_from_fresh_crops(trained, tmp_path):
    changes = dict(eval__linear_fit="sgd", eval__max_train=100, eval__baselines=())
    result = judged(tmp_path, "linear_probe", trained, **changes, eval__layers=("all",))
    stream = result["protocol"]["stream"]
    assert "pad=1" in stream["augmentation"]
    assert (stream["batch_size"], stream["test_views"]) == (100, 1)
    assert result["protocol"]["linear_probe"]["fit"] == "sgd"
    assert {r["layer"] for r in result["table"]} == {"conv1", "z"}
    assert result["metric"] == "top-1 accuracy, linear_probe on conv1, all"
    still = judged(tmp_path, "linear_probe", trained, **changes, eval__fresh_crops=False)
    assert "stream" not in still["protocol"]


@pytest.mark.slow
def test_the_authors_mlp_learns_from_fresh_crops_and_is_tested_on_ten(tmp_path):
    changes = dict(
        eval__max_train=60,
        data__image_size=6,
        data__resize=8,
        data__pad=0,
        eval__batch_size=32,
        eval__layers=("last_conv",),
    )
    result = judged(tmp_path, "mlp_probe", data__flip=True, **changes)
    assert result["protocol"]["stream"]["test_views"] == 10
    upright = tasks._set_up(settings("mlp_probe", **changes), tmp_path, tmp_path)[0].records.inputs
    assert upright.test_transform.count == 5 and not upright.test_transform.both_ways
    assert "RandomCrop(size=6, resize=8)" in result["protocol"]["stream"]["augmentation"]
    assert result["protocol"]["mlp_probe"]["init"] == "torch"
    assert 0 <= result["value"] <= 1 and result["value"] == result["untrained"]
    with pytest.raises(ValueError, match="eval.ten_crops: ten crops are cut out of a larger"):
        judge_task(settings("mlp_probe", eval__ten_crops="on"), tmp_path)


@pytest.mark.slow
def test_the_mlp_can_learn_from_one_view_from_gaussian_weights(tmp_path):
    result = judged(tmp_path, "mlp_probe", eval__fresh_crops=False, eval__mlp_init="gaussian")
    assert result["protocol"]["mlp_probe"]["init"] == "gaussian"
    assert result["protocol"]["mlp_probe"]["features"] == "cached: one view of each record"
    assert values(result, network="untrained", layer="conv1") == [result["value"]]


def test_few_labels_are_fixed_splits(tmp_path):
    changes = {"eval__max_train": 0, "eval__few_labels": (0.01, 3), "eval__few_splits": (0, 4)}
    result = judged(tmp_path, "low_shot", **changes)
    assert {r["labels"] for r in result["table"]} == {"1 % of the labels", "3 per class"}
    row = next(r for r in result["table"] if r["labels"] == "3 per class" and r["layer"] == "z")
    assert row["seeds"] == ["seed 0, split 0", "seed 0, split 4"] and row["std"] is not None
    assert len(set(row["values"])) == 2  # other records
    assert result["protocol"]["probes"]["1 % of the labels"]["knn"]["k"] == 5
    few = {r["labels"]: r["mean"] for r in result["table"] if r["network"] == "raw pixels"}
    assert 0.4 < few["1 % of the labels"] < 0.95


def test_baselines_and_others_stand_in_the_same_table(trained, tmp_path):
    supervised = settings("knn", targets__kind="labels", optim__loss="softmax", model__dim=10)
    folder = tmp_path / "ceiling"
    bundle = untrained_network(supervised, 0)
    dataclasses.replace(bundle, run={"seed": 0, "step": 3}).save(folder)
    result = judged(
        tmp_path / "run",
        "knn",
        trained,
        eval__baselines=("pixels", "patches"),
        eval__patch_centroids=20,
        eval__compare=(str(folder), trained),
    )
    assert list(dict.fromkeys(r["network"] for r in result["table"])) == [
        "raw pixels",
        "k-means patches",
        "untrained",
        "nat",
        "supervised_softmax",
        "nat: bundle",
    ]
    assert values(result, network="k-means patches", probe="k=1", labels="plain votes")[0] > 0.5
    assert values(result, network="nat") == values(result, network="nat: bundle")
    with pytest.raises(ValueError, match="eval.compare: expected each folder once; got .*bundle"):
        judged(tmp_path / "run", "knn", trained, eval__compare=(trained,) * 9)
    untrained_network(settings("knn", data__image_size=10), 0).save(tmp_path / "larger")
    with pytest.raises(ValueError, match="eval.compare: expected a network for images of 8 pixels"):
        judged(tmp_path / "run", "knn", trained, eval__compare=(str(tmp_path / "larger"),))
    untrained_network(settings("knn", data__white=4095), 0).save(tmp_path / "darker")
    with pytest.raises(ValueError, match=r"data\.white = 0, as .* takes 8 with 0 and 4095"):
        judged(tmp_path / "run", "knn", trained, eval__compare=(str(tmp_path / "darker"),))


def test_data_that_have_moved_are_found_where_the_command_line_says(tmp_path, caplog):
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    images = rng.integers(0, 256, (300, 8, 8, 3), np.uint8)
    arrays = dict(x_train=images, y_train=labels, x_test=images[:60], y_test=labels[:60])
    old, new, other = (tmp_path / f"{name}.npz" for name in ("old", "new", "other"))
    np.savez(old, **arrays)
    np.savez(other, **{**arrays, "x_train": images[::-1]})
    bundle = untrained_network(settings("knn", data__source=f"arrays:{old}"), 0)
    data = open_source(f"arrays:{old}", "train").fingerprint
    trained = dataclasses.replace(bundle, run={"seed": 0, "step": 7, "data": data})
    trained.save(tmp_path / "bundle")

    def asked(source):
        bundle = str(tmp_path / "bundle")
        return judged(tmp_path / "run", "knn", bundle, data__source=f"arrays:{source}")

    with caplog.at_level("INFO", "nat_jax"):
        asked(other)
    assert f"evaluating on arrays:{old}, as in training; --config.eval.source=..." in caplog.text
    old.rename(new)
    assert asked(new)["protocol"]["train"]["source"] == f"arrays:{new}"
    for source in (other, old, "nowhere"):
        with pytest.raises(InputError, match="old.npz.* say where it lies now with --config.data"):
            asked(source)
    with pytest.raises(InputError, match="trained on that; arrays:.*other.npz has other records"):
        asked(other)


def test_retrieval_names_its_pictures_and_its_result(trained, tmp_path, caplog):
    with caplog.at_level("INFO", "nat_jax"):
        result = judged(tmp_path, "retrieval", trained, eval__queries=2)
    shares = f"in z: {result['value']:.3f} (untrained {result['untrained']:.3f})"
    assert shares in caplog.text
    for name in result["pictures"]:
        assert f"picture: {tmp_path / 'pictures' / name}" in caplog.text


def test_retrieval_needs_no_labels(trained, tmp_path):
    source = f"folder:{write_tree(tmp_path / 'flat', [f'{i:02}.jpg' for i in range(20)])}"
    result = judged(tmp_path / "run", "retrieval", trained, eval__source=source, eval__queries=2)
    assert result["value"] is None
    assert result["pictures"] == [
        "retrieval_z.png",
        "retrieval_conv1.png",
    ]
    for name in result["pictures"]:
        assert Image.open(tmp_path / "run" / "pictures" / name).width > 100
    found = result["layers"]["z"]["found"]
    assert len(found) == 2 and len(found[0]["names"]) == 10
    assert found[0]["cosine"] == sorted(found[0]["cosine"], reverse=True)
    with pytest.raises(ValueError, match=r"task knn: expected labelled records; folder:.* has no"):
        judge_task(settings("knn", trained, eval__source=source), tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("knn", dict(eval__knn_ks=(1, 500)), "eval.knn_ks: expected at most 200"),
        ("knn", dict(eval__knn_ks=(0,)), "eval.knn_ks: expected at least 1"),
        ("knn", dict(eval__layers=("conv7",)), "unknown layer 'conv7'. Known: last_conv"),
        ("knn", dict(network="nowhere"), "nowhere holds neither a run"),
        ("knn", dict(eval__baselines=("hog",)), "eval.baselines: unknown 'hog'"),
        ("linear_probe", dict(eval__linear_fit="svm"), "eval.linear_fit: unknown 'svm'"),
        ("mlp_probe", dict(eval__mlp_init="zero"), "eval.mlp_init: unknown 'zero'"),
        ("mlp_probe", dict(eval__ten_crops="yes"), "eval.ten_crops: unknown 'yes'"),
        ("low_shot", dict(eval__few_labels=(1.5,)), "eval.few_labels: expected shares"),
        ("low_shot", dict(eval__few_labels=(30,)), "ask for fewer labels per class"),
        ("retrieval", dict(eval__queries=0), "eval.queries: expected at least 1"),
    ],
)
def test_a_mistake_is_one_message(tmp_path, task, changes, message):
    with pytest.raises(ValueError, match=message):
        judge_task(settings(task, **changes), tmp_path)
    assert not list(tmp_path.glob("results/*.json"))


def test_all_known_names_are_known_to_the_config():
    from nat_jax import schema
    from nat_jax.evaluate.probes.linear import FITS
    from nat_jax.evaluate.probes.mlp import INITS

    assert set(schema.KEYS["eval.linear_fit"].known()) == {"auto", *FITS}
    assert schema.KEYS["eval.mlp_init"].known() == INITS
    assert set(protocols.PROTOCOLS) - {"low_shot", "pretrain"} <= set(evaluate.PROBES)


@pytest.mark.parametrize("frontend", ["sobel", "highpass", "rgb"])
def test_composed_filters_do_what_the_two_do_one_after_the_other(frontend):
    network = untrained_network(settings("filters", model__frontend=frontend), 0)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), np.uint8)
    raw, whole = draw_filters.first_kernel(network), draw_filters.composed(network)

    def filtered(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )

    expected = filtered(FRONTENDS[frontend][0](images), raw)
    found = filtered(FRONTENDS["rgb"][0](images), whole)
    inside = (slice(None), slice(4, -4), slice(4, -4))
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-4)
    assert not np.allclose(found[inside], np.roll(expected, 1, axis=1)[inside], atol=1e-2)


def test_a_run_has_the_value_that_its_own_table_has(two_seeds, tmp_path):
    own = json.loads((two_seeds / "results" / "pretrain.json").read_text())
    run = tmp_path / "run"
    shutil.copytree(two_seeds, run)

    def asked(**changes):
        c = settings("knn", "", eval__max_train=0, eval__knn_k=20, **changes)
        return json.loads(judge_task(c, run).read_text())

    result = asked(seeds=(0, 3))
    assert (result["value"], result["untrained"]) == (own["value"], own["untrained"])
    row = next(r for r in result["table"] if r["network"] == "nat" and r["layer"] == "z")
    assert row["seeds"] == [0, 3] and row["std"] is not None
    two = asked(seeds=(0, 3), eval__compare=(str(two_seeds),))
    beside = [r for r in two["table"] if r["network"].startswith("nat: ")]
    assert beside and all(r["seeds"] == [0] and r["std"] is None for r in beside)
    one = asked(seeds=(3,))
    again = next(r for r in one["table"] if r["network"] == "nat" and r["layer"] == "z")
    assert again["values"] == row["values"][1:]
    assert "k=20" in (run / "report.html").read_text()
    with pytest.raises(ValueError, match="seeds: the run in .* has .0, 3.; got .1,."):
        asked(seeds=(1,))


@pytest.mark.parametrize("place", ["run", "new", "new/below"])
def test_results_go_where_they_can_be_written(trained, tmp_path, monkeypatch, place):
    run = tmp_path / "run"
    run.mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != run and real(path, mode))
    with pytest.raises(InputError, match="--workdir: .*run is not writable.*--config.eval.to=DIR"):
        judge_task(settings("filters", trained), run)
    asked = settings("filters", trained, eval__to=str(tmp_path / place))
    if place == "run":
        with pytest.raises(InputError, match="eval.to: .*run is not writable"):
            judge_task(asked, run)
    else:
        assert judge_task(asked, run) == tmp_path / place / "results" / "filters.json"
        assert (tmp_path / place / "pictures" / "filters_composed.png").exists()
    assert not list(run.iterdir())


def test_filters_need_no_data(trained, tmp_path):
    c = settings("filters", trained, eval__source="folder:/nowhere")
    result = json.loads(judge_task(c, tmp_path).read_text())
    assert result["untrained"] == 0 < result["value"]
    picture = Image.open(tmp_path / "pictures" / "filters_composed.png")
    assert picture.height > 300  # raw and composed of two networks
