"""The paper's MLP probe: what it learns, and its optimiser step by hand."""

import importlib

import jax
import numpy as np
import pytest

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.linear_probe import linear_probe
from nat_jax.evaluate.mlp_probe import mlp_probe

module = importlib.import_module("nat_jax.evaluate.mlp_probe")
SMALL = {"hidden": 32, "batch_size": 64, "epochs": 40}


def _xor(rows: int, seed: int) -> FeatureSet:
    x = np.random.default_rng(seed).uniform(-1, 1, (rows, 2)).astype(np.float32)
    return FeatureSet(x, (x[:, 0] * x[:, 1] > 0).astype(np.int32))


def test_learns_what_a_linear_probe_cannot() -> None:
    train, test = _xor(1000, 0), _xor(500, 1)
    assert linear_probe(train, test, num_classes=2) < 0.7
    assert mlp_probe(train, test, num_classes=2, **SMALL) > 0.9


def test_learns_a_separable_problem_of_few_records() -> None:
    rng = np.random.default_rng(0)
    labels = (np.arange(60) % 3).astype(np.int32)
    features = 3 * np.eye(3, dtype=np.float32)[labels] + rng.normal(0, 0.3, (60, 3))
    data = FeatureSet(features.astype(np.float32), labels)
    assert mlp_probe(data, data, num_classes=3, hidden=32) > 0.95
    shuffled = FeatureSet(data.features, rng.permutation(labels))
    assert mlp_probe(shuffled, data, num_classes=3, hidden=32) < 0.7


def test_seed_decides() -> None:
    train, test = _xor(300, 0), _xor(500, 1)
    options = {**SMALL, "epochs": 3}
    runs = [mlp_probe(train, test, num_classes=2, seed=s, **options) for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_step_by_hand() -> None:
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    trace = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    kernel, bias = params["kernel"].copy(), params["bias"].copy()
    m_kernel, m_bias = trace["kernel"].copy(), trace["bias"].copy()
    for _ in range(3):
        grads = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
        params, trace = module._descend(params, trace, grads, 0.5, 0.9, 0.25)
        m_kernel = 0.9 * m_kernel + 0.1 * grads["kernel"]
        m_bias = 0.9 * m_bias + 0.1 * grads["bias"]
        kernel = (kernel - 0.5 * m_kernel) * 0.75
        bias = bias - 0.5 * m_bias
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-5)


def test_epochs_follow_the_schedule_and_visit_each_record_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    epoch = module._epoch

    def recorded(state, features, labels, order, steps, key, rates, **rest):
        calls.append((np.asarray(order)[: int(steps)].copy(), np.asarray(rates)))
        return epoch(state, features, labels, order, steps, key, rates, **rest)

    monkeypatch.setattr(module, "_epoch", recorded)
    data = _xor(150, 0)
    mlp_probe(data, data, num_classes=2, hidden=4, batch_size=32, epochs=6, decay_start=2)
    rates = [float(values[0]) for _, values in calls]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1 / 1.3, 0.1 / 1.6, 0.1 / 1.9])
    for order, values in calls:
        assert order.shape == (4, 32)  # the 22 records left over wait for another epoch
        assert len(np.unique(order)) == 128 and order.max() < 150
        assert values[1:] == pytest.approx([0.9, 1e-8])
    assert not np.array_equal(calls[0][0], calls[1][0])


def test_network_is_the_one_described() -> None:
    net = module._Network(features=50, hidden=400, classes=7, dropout=0.5)
    params, stats = module._initialise(jax.random.key(0), net=net)
    shapes = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    assert sum(leaf.size for leaf in shapes.values()) == (
        50 * 400 + 400 + 400 * 400 + 400 + 400 * 7 + 7 + 4 * 400
    )
    assert len(jax.tree.leaves(stats)) == 4
    for name, leaf in shapes.items():
        values = np.asarray(leaf)
        if "kernel" in name:
            bound = leaf.shape[0] ** -0.5
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert abs(values.mean()) < 0.1 * bound
        if "scale" in name:
            assert 0 <= values.min() < 0.05 and 0.95 < values.max() <= 1


def test_dropout_and_batch_statistics_only_in_training() -> None:
    net = module._Network(features=3, hidden=64, classes=2, dropout=0.5)
    params, stats = module._initialise(jax.random.key(0), net=net)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    alone = module._logits(params, stats, x[:1], net=net)
    together = module._logits(params, stats, x, net=net)[:1]
    np.testing.assert_allclose(alone, together, atol=1e-5)
    mlp = net.build(module.nnx.Rngs(0))
    trained = [np.asarray(mlp(x, jax.random.key(seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(trained[0], trained[1])
    assert np.abs(trained[0] - trained[2]).max() > 0.01
    assert np.abs(np.asarray(mlp(x[:8], None)) - np.asarray(mlp(x, None))[:8]).max() < 1e-5


def test_rejects() -> None:
    data = _xor(20, 0)
    for option in ({"hidden": 0}, {"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            mlp_probe(data, data, num_classes=2, **option)
    for option in ({"dropout": 1.0}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            mlp_probe(data, data, num_classes=2, **option)
    with pytest.raises(ValueError, match="diverged"):
        mlp_probe(data, data, num_classes=2, hidden=4, epochs=30, learning_rate=1e30)
