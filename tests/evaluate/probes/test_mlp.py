"""The paper's MLP probe: what it learns, and its optimiser step by hand."""

import jax
import numpy as np
import optax
import pytest

from nat_jax.evaluate.features import FeatureBatch, FeatureSet
from nat_jax.evaluate.probes import sgd
from nat_jax.evaluate.probes.linear import linear_probe
from nat_jax.evaluate.probes.mlp import Mlp, mlp_probe, mlp_probe_stream

SMALL = {"hidden": 32, "batch_size": 64, "epochs": 40}
NET = Mlp(features=3, hidden=64, classes=2, dropout=0.5, start="torch")


def _xor(rows: int, seed: int) -> FeatureSet:
    x = np.random.default_rng(seed).uniform(-1, 1, (rows, 2)).astype(np.float32)
    return FeatureSet(x, (x[:, 0] * x[:, 1] > 0).astype(np.int32))


def test_learns_what_a_linear_probe_cannot() -> None:
    train, test = _xor(1000, 0), _xor(500, 1)
    assert linear_probe(train, test, num_classes=2, fit="ridge") < 0.7
    assert mlp_probe(train, test, num_classes=2, **SMALL) > 0.9


def test_step_by_hand() -> None:
    rng = np.random.default_rng(0)
    net = Mlp(3, 64, 2, 0.5, "torch", momentum=0.9, weight_decay=0.25)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    state = net.optimizer(0.0).init(params)
    kernel, bias, m_kernel, m_bias = params["kernel"], params["bias"], 0.0, 0.0
    for rate in (0.5, 0.5, 0.1):
        grads = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
        updates, state = net.optimizer(rate).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        m_kernel = 0.9 * m_kernel + 0.1 * grads["kernel"]
        m_bias = 0.9 * m_bias + 0.1 * grads["bias"]
        kernel = kernel * 0.75 - rate * m_kernel
        bias = bias - rate * m_bias
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-5)


def test_the_rate_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    monkeypatch.setattr(
        sgd, "fit", lambda name, make, epoch, *rest, **_: fits.append((make, *rest)) or {}
    )
    monkeypatch.setattr(sgd, "accuracy", lambda *_, **__: {})
    mlp_probe_stream(lambda _: [], [], num_classes=3, hidden=8)
    ((make, epochs, rate),) = fits
    rates = [rate(epoch) for epoch in (0, 19, 20, 21, 22, 99)]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1 / 1.3, 0.1 / 1.6, 0.1 / 24.7])
    assert epochs == 100 and make(5) == Mlp(5, 8, 3, 0.5, "torch", 0.9, 1e-8)


def _named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_network_is_the_one_described() -> None:
    net = Mlp(features=50, hidden=400, classes=7, dropout=0.5, start="torch")
    params, stats, _ = sgd._start(jax.random.key(0), net=net)
    assert sum(leaf.size for leaf in _named(params).values()) == (
        50 * 400 + 400 + 400 * 400 + 400 + 400 * 7 + 7 + 4 * 400
    )
    assert len(jax.tree.leaves(stats)) == 4
    for name, values in _named(params).items():
        if "kernel" in name:
            bound = values.shape[0] ** -0.5
            assert 0.9 * bound < np.abs(values).max() <= bound
            assert abs(values.mean()) < 0.1 * bound
        if "scale" in name:
            assert 0 <= values.min() < 0.05 and 0.95 < values.max() <= 1
    gaussian = Mlp(features=50, hidden=400, classes=7, dropout=0.5, start="gaussian")
    for name, values in _named(sgd._start(jax.random.key(0), net=gaussian).params).items():
        if "kernel" in name:
            assert values.std() == pytest.approx(0.01, rel=0.1)
            assert np.abs(values).max() > 0.025  # a uniform one of that deviation ends at 0.017
        else:
            assert (values == (1 if "scale" in name else 0)).all()


def test_dropout_and_batch_statistics_only_in_training() -> None:
    params, stats, _ = sgd._start(jax.random.key(0), net=NET)
    apply = jax.jit(NET.apply)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    alone, same = apply(params, stats, x[:1], None)
    together, _ = apply(params, stats, x, None)
    np.testing.assert_allclose(alone, np.asarray(together)[:1], atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    trained = [apply(params, stats, x, jax.random.key(seed)) for seed in (0, 0, 1)]
    logits = [np.asarray(of_seed) for of_seed, _ in trained]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 0.01
    # Torch's momentum of 0.1: a tenth of the way from 0 to the mean of the first layer's outputs.
    kernel, bias = (np.asarray(params["fc1"][name][...]) for name in ("kernel", "bias"))
    np.testing.assert_allclose(
        trained[0][1]["bn1"]["mean"][...], 0.1 * (x @ kernel + bias).mean(axis=0), atol=1e-6
    )


def test_a_stream_of_the_same_batches_learns_the_same() -> None:
    train, test = _xor(1000, 0), _xor(500, 1)
    options = {**SMALL, "epochs": 3, "decay_start": 1}
    del options["batch_size"]

    def epoch(number: int):
        rows = np.random.default_rng((7, number)).permutation(1000)[:960].reshape(15, 64)
        for now in rows:
            yield FeatureBatch(
                {"a": train.features[now]}, train.labels[now], np.ones(64, np.float32)
            )

    whole = FeatureBatch({"a": test.features}, test.labels, np.ones(500, np.float32))
    streamed = mlp_probe_stream(epoch, [whole], num_classes=2, seed=7, **options)
    cached = mlp_probe(train, test, num_classes=2, seed=7, batch_size=64, **options)
    assert streamed == {"a": pytest.approx(cached, abs=1.5 / 500)}
    options["learning_rate"] = 1e-5
    assert mlp_probe_stream(epoch, [whole], num_classes=2, seed=7, **options) != streamed


def test_rejects() -> None:
    data = _xor(20, 0)
    for option in ({"hidden": 0}, {"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            mlp_probe(data, data, num_classes=2, **option)
    for option in ({"dropout": 1.0}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            mlp_probe(data, data, num_classes=2, **option)
    with pytest.raises(ValueError, match="unknown init 'he'; known: torch, gaussian"):
        mlp_probe(data, data, num_classes=2, init="he")
    with pytest.raises(ValueError, match="epochs: expected at least 1"):
        mlp_probe_stream(lambda _: [], [], num_classes=2, epochs=0)
    with pytest.raises(TypeError, match="batch_size"):  # it is the stream's
        mlp_probe_stream(lambda _: [], [], num_classes=2, batch_size=64)
    with pytest.raises(ValueError, match="diverged"):
        mlp_probe(_xor(1000, 0), data, num_classes=2, **SMALL, learning_rate=1e30)
