import functools

import jax
import numpy as np
import pytest

from nat_jax import config, evaluate, models
from nat_jax.errors import InputError
from nat_jax.evaluate import retrieval
from nat_jax.evaluate.evaluator import Evaluator
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Record
from nat_jax.models.frozen import FrozenModel


class Blocks:
    """Images whose class is their colour; record 3 cannot be decoded."""

    name, num_classes, class_names = "blocks", 3, ("red", "green", "blue")

    def __init__(self, split: str, count: int, broken: int | None = None):
        self.split, self.fingerprint = split, split
        self.labels = np.arange(count) % 3
        self._broken = broken
        rng = np.random.default_rng(len(split))
        self._images = rng.integers(0, 60, (count, 8, 8, 3), np.uint8)
        self._images[np.arange(count), :, :, self.labels] += 150

    def __len__(self) -> int:
        return len(self.labels)

    def record_name(self, index: int) -> str:
        return f"{self.split}{index}"

    def __getitem__(self, index: int) -> Record:
        return {
            "index": index,
            "name": self.record_name(index),
            "label": int(self.labels[index]),
            "image": b"no image" if index == self._broken else self._images[index],
        }


@pytest.fixture(scope="module")
def network() -> FrozenModel:
    model = models.make_model("convnet", dim=4, image_size=8, frontend="rgb", widths=(6,), pools=1)

    return FrozenModel(model, *model.init(jax.random.key(0)))


def evaluator(network, train, test, **changes):
    c = config.default()
    c.eval.knn_k, c.eval.probes, c.eval.labels_per_class = 3, ("knn",), (0, 4)
    c.data.white = changes.pop("white", 0)
    for key, value in changes.items():
        c.eval[key] = value
    return Evaluator(c, train, test, network.model, seed=0, cache=ImageCache())


def rows_of(network, train, test, **changes):
    judged = evaluator(network, train, test, **changes)
    return judged.score(judged.extractor("nat", network))[""]


def test_every_combination_is_a_row(network):
    rows = rows_of(network, Blocks("train", 60), Blocks("test", 12))
    keys = {(row["layer"], row["labels"]) for row in rows}
    assert keys == {("z", "all"), ("z", "4 per class"), ("conv1", "all"), ("conv1", "4 per class")}
    assert next(r["value"] for r in rows if r["layer"] == "conv1") == 1.0


def test_the_value_that_is_white_is_that_of_training_and_part_of_the_protocol(network):
    sets = Blocks("train", 60), Blocks("test", 12)
    for white in (0, 4095):
        judged = evaluator(network, *sets, white=white)
        transforms = (judged.extractor("nat", network).transform, judged.inputs.test_transform)
        assert [t.white for t in (*transforms, judged.inputs.augment)] == [white] * 3
        assert judged.protocol().get("white", 0) == white


def test_scores_depend_on_the_labels(network):
    shuffled = Blocks("train", 60)
    shuffled.labels = np.random.default_rng(0).permutation(shuffled.labels)
    assert all(row["value"] < 0.9 for row in rows_of(network, shuffled, Blocks("test", 12)))


def test_neighbours_are_those_of_the_good_records(network):
    train = Blocks("train", 30, broken=3)
    judged = evaluator(network, train, Blocks("test", 12))
    extractor = judged.extractor("nat", network)
    found = retrieval.find(judged.inputs.data, extractor, "conv1", queries=6, count=4)
    assert found.query_images.shape == (6, 8, 8, 3) and found.images.shape == (6, 4, 8, 8, 3)
    colours = found.images.mean(axis=(2, 3)).argmax(axis=-1)
    own = found.query_images.mean(axis=(1, 2)).argmax(axis=-1)
    # The pictures and the marks are about the same records, though number 3 is left out.
    np.testing.assert_array_equal(colours == own[:, None], found.correct)
    assert found.correct.all()


def test_sources_of_other_classes_are_refused(network):
    other = Blocks("test", 12)
    other.class_names = ("one", "two", "three")
    with pytest.raises(ValueError, match="expected the same classes in blocks and blocks"):
        evaluator(network, Blocks("train", 60), other)


def test_classes_that_cannot_be_learned_are_named_at_once(network):
    train, test = Blocks("train", 60), Blocks("test", 12)
    train.labels = np.arange(60) % 2
    with pytest.raises(InputError, match=r"blocks has .* 1 class\(es\) .* training record: blue"):
        evaluator(network, train, test)
    evaluator(network, train, test, probes=(), labels_per_class=(0,))
    test.labels = train.labels[:12]
    assert evaluator(network, train, test, labels_per_class=(0,)).has_labels
    train.labels = test.labels = np.zeros(60, int)
    with pytest.raises(InputError, match="at least 2 classes in blocks; all are of red"):
        evaluator(network, train, test)


def test_records_without_a_label_are_left_out(network):
    train, test = Blocks("train", 60), Blocks("test", 12)
    expected = rows_of(network, train, test)
    train, test = Blocks("train", 66), Blocks("test", 15)
    train.labels[60:], test.labels[12:] = -1, -1
    judged = evaluator(network, train, test)
    described = judged.protocol()
    assert (described["train"]["records"], described["test"]["records"]) == (60, 12)
    assert len(judged.score(judged.extractor("nat", network))[""]) == len(expected)


def test_too_few_labels_are_found_at_once(network):
    with pytest.raises(ValueError, match="asks for 21 records of every class of blocks; class red"):
        evaluator(network, Blocks("train", 60), Blocks("test", 12), labels_per_class=(21,))
    with pytest.raises(ValueError, match="eval.knn_k: expected at most 6.*--config.eval.knn_k=6"):
        evaluator(network, Blocks("train", 60), Blocks("test", 12), labels_per_class=(2,), knn_k=7)


def test_a_trained_network_is_scored_once(network, tmp_path, monkeypatch):
    @functools.wraps(evaluate.PROBES["knn"])
    def mean(train, test, **options):
        return float(test.features.mean())

    monkeypatch.setitem(evaluate.PROBES, "knn", mean)
    judged = evaluator(network, Blocks("train", 60), Blocks("test", 12), layers=("z",))
    moved = jax.tree.map(lambda x: x + np.float32(0.1), network.params)
    other = FrozenModel(network.model, moved, network.batch_stats)

    def rows(trained):
        return judged.score_run(tmp_path, trained, lambda: network, {"seed": 0})

    first = rows(network)
    assert {row["network"] for row in first} == {"raw pixels", "untrained", "nat"}
    assert (tmp_path / "pictures" / "neighbours_conv1.png").exists()
    second = rows(other)
    monkeypatch.delattr(Evaluator, "score")  # scoring again would need it
    assert rows(network) == first and rows(other) == second
    assert first[:-2] == second[:-2] and first[-1] != second[-1]
