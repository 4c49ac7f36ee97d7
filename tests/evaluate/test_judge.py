import jax
import numpy as np
import pytest

from nat_jax import config, models
from nat_jax.evaluate import judge
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Record


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
def network() -> judge.Network:
    model = models.make_model("convnet", dim=4, image_size=8, frontend="rgb", widths=(6,), pools=1)

    return judge.Network(model, *model.init(jax.random.key(0)))


def panel(network, train, test, **changes):
    c = config.default()
    c.eval.knn_k, c.eval.probes, c.eval.labels_per_class = 3, ("knn",), (0, 4)
    for key, value in changes.items():
        c.eval[key] = value
    return judge.Judge(c, train, test, network.model, seed=0, cache=ImageCache())


def test_every_combination_is_a_row(network):
    rows = panel(network, Blocks("train", 60), Blocks("test", 12)).network("nat", network)
    keys = {(row["features"], row["labels"]) for row in rows}
    assert keys == {("z", "all"), ("z", "4 per class"), ("conv1", "all"), ("conv1", "4 per class")}
    assert next(r["value"] for r in rows if r["features"] == "conv1") == 1.0


def test_scores_depend_on_the_labels(network):
    shuffled = Blocks("train", 60)
    shuffled.labels = np.random.default_rng(0).permutation(shuffled.labels)
    rows = panel(network, shuffled, Blocks("test", 12)).network("nat", network)
    assert all(row["value"] < 0.9 for row in rows)


def test_neighbours_are_those_of_the_good_records(network):
    train = Blocks("train", 30, broken=3)
    queries, found, correct = panel(network, train, Blocks("test", 12)).neighbours(
        network, "conv1", queries=6, count=4
    )
    assert queries.shape == (6, 8, 8, 3) and found.shape == (6, 4, 8, 8, 3)
    colours = found.mean(axis=(2, 3)).argmax(axis=-1)
    own = queries.mean(axis=(1, 2)).argmax(axis=-1)
    # The pictures and the marks speak of the same records, though number 3 is left out.
    np.testing.assert_array_equal(colours == own[:, None], correct)
    assert correct.all()


def test_probes_can_learn_on_fewer_records(network):
    full = panel(network, Blocks("train", 60), Blocks("test", 12))
    few = panel(network, Blocks("train", 60), Blocks("test", 12), max_train=30)
    assert full.protocol()["train"]["records"] == 60
    assert few.protocol()["train"]["records"] == 30
    assert few.network("nat", network)


def test_sources_of_other_classes_are_refused(network):
    other = Blocks("test", 12)
    other.class_names = ("one", "two", "three")
    with pytest.raises(ValueError, match="expected the same classes in blocks and blocks"):
        panel(network, Blocks("train", 60), other)


def test_too_few_labels_are_found_at_once(network):
    with pytest.raises(ValueError, match="asks for 21 records of every class of blocks; class 0"):
        panel(network, Blocks("train", 60), Blocks("test", 12), labels_per_class=(21,))
    with pytest.raises(ValueError, match="eval.knn_k: expected at most 6.*--config.eval.knn_k=6"):
        panel(network, Blocks("train", 60), Blocks("test", 12), labels_per_class=(2,), knn_k=7)


def test_seeds_are_joined():
    def rows(network, value):
        row = {"features": "z", "network": network, "probe": "knn", "labels": "all"}
        return {**row, "value": value}

    table = judge.aggregate(
        {
            0: [rows("nat", 0.5), rows("untrained", 0.2)],
            7: [rows("nat", 0.7), rows("untrained", 0.4)],
        }
    )
    assert table[0]["seeds"] == [0, 7] and table[0]["values"] == [0.5, 0.7]
    np.testing.assert_allclose((table[0]["mean"], table[0]["std"]), (0.6, 0.02**0.5))
    np.testing.assert_allclose(judge.headline(table), (0.6, 0.3))
    assert judge.aggregate({0: [rows("nat", 0.5)]})[0]["std"] is None
