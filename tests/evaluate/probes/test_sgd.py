"""Streams of features: weights, views, labels; features in memory, small and large."""

import re

import jax
import numpy as np
import pytest

from nat_jax.evaluate.features import FeatureBatch, FeatureSet, featured
from nat_jax.evaluate.probes import sgd
from nat_jax.evaluate.probes.linear import Linear
from nat_jax.evaluate.probes.mlp import Mlp
from nat_jax.training import metrics

SCHEDULE = 4, lambda epoch: 0.1 / (1 + epoch)


def linear(features: int) -> Linear:
    return Linear(features, 3, 0.9, 1e-4)


def mlp(features: int) -> Mlp:
    return Mlp(features, 8, 3, 0.5, "torch")


def _points(rows: int, seed: int) -> FeatureSet:
    """Three clusters in the plane."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(rows) % 3).astype(np.int32)
    centres = np.float32([[0, 2], [2, -1], [-2, -1]])
    return FeatureSet(centres[labels] + rng.normal(0, 1, (rows, 2)).astype(np.float32), labels)


def _batch(data: FeatureSet, weight: np.ndarray | None = None, layer: str = "a"):
    weight = np.ones(len(data), np.float32) if weight is None else weight
    return FeatureBatch({layer: data.features}, data.labels, weight)


def _fit(*batches: FeatureBatch, make=linear, classes: int = 3):
    return sgd.fit("probe", make, lambda epoch: batches, *SCHEDULE, num_classes=classes, seed=0)


@pytest.mark.parametrize("make", [linear, mlp])
def test_features_too_large_for_the_device(make, monkeypatch: pytest.MonkeyPatch) -> None:
    train = _points(300, 0)

    def trained() -> sgd.State:
        epochs = sgd.shuffled(train, 64, seed=5)
        ((_, state),) = sgd.fit("probe", make, epochs, *SCHEDULE, num_classes=3, seed=5).values()
        return state

    resident = trained()
    monkeypatch.setattr(sgd, "_RESIDENT_BYTES", 1000)
    monkeypatch.setattr(sgd, "_take", None)  # would gather on the device
    for a, b in zip(_leaves(resident), _leaves(trained()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def _leaves(state: sgd.State) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_the_progress_is_shown_from_time_to_time(seconds: float, monkeypatch, capsys) -> None:
    monkeypatch.setattr(metrics, "SECONDS", seconds)
    sgd.fit("probe", linear, sgd.shuffled(_points(300, 0), 64, 5), *SCHEDULE, num_classes=3, seed=5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (0 if seconds else 4 * 4)
    for line in lines[-1:]:
        assert re.fullmatch(
            r"probe: step 16/16  loss 0\.\d{3} on these features  ETA 0:00:00", line
        )


def test_an_epoch_visits_each_record_once() -> None:
    data = FeatureSet(np.arange(150, dtype=np.float32)[:, None], np.arange(150) % 3)
    orders = []
    for number in (0, 1, 0):
        batches = list(sgd.shuffled(data, 32, seed=0)(number))
        assert [len(batch.labels) for batch in batches] == [32] * 4  # 22 records are left over
        seen = np.concatenate([next(iter(b.features.values()))[:, 0] for b in batches]).astype(int)
        assert len(np.unique(seen)) == 128 and seen.max() < 150
        np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), seen % 3)
        orders.append(seen.tolist())
    assert orders[0] == orders[2] != orders[1]


def test_records_of_weight_0_teach_nothing() -> None:
    train = _points(64, 0)
    counted = np.ones(64, np.float32)
    counted[10:20] = 0
    labels = train.labels.copy()
    labels[10:20] = -1
    changed = FeatureSet(train.features, labels)
    states = [
        _leaves(_fit(_batch(data, weight))["a"][1])
        for data, weight in ((train, counted), (changed, counted), (train, np.ones(64, np.float32)))
    ]
    for a, b in zip(states[0], states[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(states[0], states[2], strict=True))


def test_records_of_weight_0_are_not_judged() -> None:
    trained, test = _fit(_batch(_points(300, 0))), _points(30, 1)
    right = sgd.accuracy(trained, [_batch(test)], num_classes=3)["a"]
    wrong = FeatureSet(test.features, (test.labels + 1) % 3)
    weight = np.zeros(30, np.float32)
    both = [_batch(test), _batch(wrong, weight)]
    assert sgd.accuracy(trained, both, num_classes=3)["a"] == right > 0.7
    judged = sgd.accuracy(trained, [_batch(test), _batch(wrong)], num_classes=3)
    assert judged["a"] < right - 0.2


def test_logits_are_summed_over_views() -> None:
    trained = _fit(_batch(_points(600, 0)))
    rng = np.random.default_rng(2)
    test = _points(200, 1)
    views = test.features[:, None] + rng.normal(0, 2, (200, 10, 2)).astype(np.float32)
    net, state = trained["a"]
    logits = np.stack([net.apply(*state[:2], views[:, v], None)[0] for v in range(10)])
    expected = np.mean(logits.sum(axis=0).argmax(axis=1) == test.labels)

    def judged(features: np.ndarray) -> float:
        batch = FeatureBatch({"a": features}, test.labels, np.ones(200, np.float32))
        return sgd.accuracy(trained, [batch], num_classes=3)["a"]

    assert judged(views) == pytest.approx(expected)
    assert judged(views) > judged(views[:, 0]) + 0.1
    assert judged(views[:, 0]) == judged(views[:, :1])


def test_streams_reject() -> None:
    train = _points(30, 0)
    with pytest.raises(ValueError, match="epoch 0 of the training features holds no batch"):
        _fit()
    with pytest.raises(
        ValueError, match=r"train labels: expected 0\.\.1 for 2 classes, got 10 of 30"
    ):
        _fit(_batch(train), classes=2)
    unlabelled = FeatureSet(train.features, np.full(30, -1, np.int32))
    with pytest.raises(ValueError, match="train labels: .* 30 of 30 have none"):
        _fit(_batch(unlabelled))
    maps = FeatureBatch({"conv": np.zeros((30, 2, 2, 1))}, train.labels, np.ones(30))
    with pytest.raises(ValueError, match="conv: expected training features"):
        _fit(maps)
    broken = FeatureSet(train.features * np.float32(np.nan), train.labels)
    with pytest.raises(ValueError, match="probe on a diverged in epoch 0"):
        _fit(_batch(broken))
    trained = _fit(_batch(train))
    with pytest.raises(ValueError, match="no record of weight 1"):
        sgd.accuracy(trained, [_batch(train, np.zeros(30))], num_classes=3)
    with pytest.raises(ValueError, match="test labels: .* 30 of 30 have none"):
        sgd.accuracy(trained, [_batch(unlabelled)], num_classes=3)
    with pytest.raises(ValueError, match="diverged"):
        sgd.accuracy(trained, [_batch(broken)], num_classes=3)


def test_images_become_features_view_by_view() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 5, 3), np.uint8)

    @jax.jit
    def apply(x: jax.Array) -> dict[str, jax.Array]:
        return {"half": x[:, :2] / 2, "mean": x.mean(axis=(1, 2, 3))[:, None]}

    plain = {"label": np.arange(4), "weight": np.float32([1, 1, 0, 1])}
    views, single = featured(apply, [{**plain, "image": images}, {**plain, "image": images[:, 1]}])
    assert views.features["half"].shape == (4, 3, 30) and views.features["mean"].shape == (4, 3, 1)
    assert single.features["half"].shape == (4, 30)
    np.testing.assert_allclose(views.features["half"][:, 1], single.features["half"])
    np.testing.assert_allclose(views.features["half"][2, 0], images[2, 0, :2].reshape(-1) / 2)
    np.testing.assert_array_equal(views.labels, np.arange(4))
    np.testing.assert_array_equal(views.weight, plain["weight"])
