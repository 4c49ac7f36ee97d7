"""The choice among linear fits; SGD's recipe by hand and against L-BFGS; layers in one stream."""

import jax
import numpy as np
import optax
import pytest

from nat_jax.evaluate.features import FeatureBatch, FeatureSet
from nat_jax.evaluate.probes.lbfgs import lbfgs_probe
from nat_jax.evaluate.probes.linear import (
    FITS,
    Linear,
    fit_options,
    linear_probe,
    linear_probe_stream,
    sgd_probe,
)


@pytest.mark.parametrize("fit", FITS)
def test_every_fit_learns(digits: tuple[FeatureSet, FeatureSet], fit: str) -> None:
    train, test = digits
    assert linear_probe(train, test, num_classes=10, fit=fit) > 0.82
    shuffled = FeatureSet(train.features, np.random.default_rng(0).permutation(train.labels))
    assert linear_probe(shuffled, test, num_classes=10, fit=fit) < 0.3


def test_rejects(digits: tuple[FeatureSet, FeatureSet]) -> None:
    with pytest.raises(ValueError, match="ridge has no option epochs; known: l2"):
        linear_probe(*digits, num_classes=10, fit="ridge", epochs=3)
    assert "train" not in fit_options("sgd")
    for option in ({"epochs": 0}, {"decay_every": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            sgd_probe(*digits, num_classes=10, **option)
    for option in ({"decay": 0.0}, {"decay": 1.1}, {"l2": -1.0}, {"learning_rate": 0.0}):
        with pytest.raises(ValueError, match="by sgd: expected decay in"):
            sgd_probe(*digits, num_classes=10, **option)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        sgd_probe(*digits, num_classes=10, momentum=1.0)


def test_sgd_comes_near_the_optimum(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = digits
    best = lbfgs_probe(train, test, num_classes=10, l2=5e-4)
    long = sgd_probe(train, test, num_classes=10, epochs=280, decay_every=80)
    assert long == pytest.approx(best, abs=0.015)
    assert sgd_probe(train, test, num_classes=10, epochs=1, batch_size=1437) < best - 0.02


def test_step_by_hand() -> None:
    rng = np.random.default_rng(0)
    net = Linear(3, 2, momentum=0.9, l2=0.25)
    params = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
    state = net.optimizer(0.0).init(params)
    kernel, bias, m_kernel, m_bias = params["kernel"], params["bias"], 0.0, 0.0
    for rate in (0.5, 0.5, 0.05):
        grads = {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}
        updates, state = net.optimizer(rate).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        m_kernel = 0.9 * m_kernel + rate * (grads["kernel"] + 0.25 * kernel)
        m_bias = 0.9 * m_bias + 2 * rate * grads["bias"]
        kernel, bias = kernel - m_kernel, bias - m_bias
    np.testing.assert_allclose(params["kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(params["bias"], bias, rtol=1e-5)


def test_batch_norm_of_batches_and_of_all() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(3, 50, 4)) * [1, 10, 1e-4, 0] + [0, 5, 1, 7]).astype(np.float32)
    net = Linear(4, 2, 0.9, 0.0)
    params, stats = net.init(jax.random.key(0))
    params = {"kernel": rng.normal(size=(4, 2)).astype(np.float32), "bias": params["bias"]}
    for batch in x:
        logits, stats = net.apply(params, stats, batch, jax.random.key(0))
        away = batch - batch.mean(axis=0, dtype=np.float64)
        away /= np.sqrt(np.square(away).mean(axis=0) + [0, 0, 0, 1])  # the constant one: nothing
        np.testing.assert_allclose(logits, away @ params["kernel"], atol=1e-3)
    tested, kept = net.apply(params, stats, x[0], None)
    mean = x.mean(axis=(0, 1), dtype=np.float64)
    deviation = np.sqrt(x.var(axis=1, dtype=np.float64).mean(axis=0) + [0, 0, 0, 1])
    np.testing.assert_allclose(tested, (x[0] - mean) / deviation @ params["kernel"], atol=1e-2)
    jax.tree.map(np.testing.assert_array_equal, kept, stats)
    assert float(stats.batches) == 3


def test_all_layers_of_a_stream_at_once(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = digits

    def layers(data: FeatureSet) -> dict[str, np.ndarray]:
        return {"pixels": data.features, "top": data.features[:, :16]}

    def epoch(number: int):
        order = np.random.default_rng((3, number)).permutation(len(train))[: 5 * 256]
        for rows in order.reshape(5, 256):
            yield FeatureBatch(layers(train.of(rows)), train.labels[rows], np.ones(256, np.float32))

    tests = [FeatureBatch(layers(test), test.labels, np.ones(len(test), np.float32))]
    together = linear_probe_stream(epoch, tests, num_classes=10, seed=3, epochs=9)
    for layer in together:
        alone = sgd_probe(
            FeatureSet(layers(train)[layer], train.labels),
            FeatureSet(layers(test)[layer], test.labels),
            num_classes=10,
            seed=3,
            epochs=9,
        )
        assert together[layer] == pytest.approx(alone, abs=1.5 / 360)
    assert together["pixels"] > together["top"] + 0.2
