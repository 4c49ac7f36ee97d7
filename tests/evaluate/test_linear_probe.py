"""The linear probe against scikit-learn's logistic regression."""

import importlib

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from nat_jax.evaluate.features import FeatureSet, padded_rows
from nat_jax.evaluate.linear_probe import linear_probe

module = importlib.import_module("nat_jax.evaluate.linear_probe")


@pytest.fixture(scope="module")
def digits() -> tuple[FeatureSet, FeatureSet]:
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
    return FeatureSet(x[:1437], y[:1437]), FeatureSet(x[1437:], y[1437:])


def _reference(train: FeatureSet, l2: float) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(train.features.astype(np.float64))
    model = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8)
    return scaler, model.fit(scaler.transform(train.features.astype(np.float64)), train.labels)


@pytest.mark.parametrize("l2", [1e-3, 2e-2])
def test_coefficients_equal_scikit_learn(digits: tuple[FeatureSet, FeatureSet], l2: float) -> None:
    train, _ = digits
    _, model = _reference(train, l2)
    fit = module._fit(
        padded_rows(train.features, 1536),
        padded_rows(train.labels, 1536),
        np.float32(1437),
        np.float32(l2),
        np.int32(1000),
        np.float32(2e-6),
        num_classes=10,
    )
    kernel = np.asarray(fit.params["kernel"]).T
    # The penalty leaves a common shift of the biases free.
    bias = np.asarray(fit.params["bias"]) - np.mean(fit.params["bias"])
    np.testing.assert_allclose(kernel, model.coef_, atol=0.02)
    np.testing.assert_allclose(bias, model.intercept_ - model.intercept_.mean(), atol=0.02)
    _, other = _reference(train, 5 * l2)  # the tolerance tells penalties apart
    assert np.abs(kernel - other.coef_).max() > 0.1


@pytest.mark.parametrize("rows", [100, 1437])
def test_accuracy_equals_scikit_learn(digits: tuple[FeatureSet, FeatureSet], rows: int) -> None:
    train, test = digits
    train = FeatureSet(train.features[:rows], train.labels[:rows])
    scaler, model = _reference(train, 3e-3)
    expected = model.score(scaler.transform(test.features), test.labels)
    # One record more or less: the optima differ by the tolerance.
    ours = linear_probe(train, test, num_classes=10, l2=3e-3)
    assert ours == pytest.approx(expected, abs=1.5 / 360)


def test_needs_enough_iterations(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = digits
    assert linear_probe(train, test, num_classes=10, max_iterations=1) < 0.85
    assert linear_probe(train, test, num_classes=10) > 0.85


def test_scale_shift_and_constants_do_not_matter(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = digits
    base = linear_probe(train, test, num_classes=10)

    def changed(data: FeatureSet) -> FeatureSet:
        rows = np.concatenate(
            [data.features * 1000 + 7, np.full((len(data), 3), 1234.567, np.float32)], axis=1
        )
        return FeatureSet(rows.astype(np.float32), data.labels)

    moved = linear_probe(changed(train), changed(test), num_classes=10)
    assert moved == pytest.approx(base, abs=1.5 / 360)


def test_penalty_shrinks_to_the_majority_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.int32([0] * 30 + [1] * 70)
    features = (labels[:, None] + 0.01 * rng.normal(size=(100, 2))).astype(np.float32)
    data = FeatureSet(features, labels)
    assert linear_probe(data, data, num_classes=2) == 1.0
    assert linear_probe(data, data, num_classes=2, l2=1e3) == 0.7


def test_xor_is_beyond_it() -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (400, 2)).astype(np.float32)
    data = FeatureSet(x, (x[:, 0] * x[:, 1] > 0).astype(np.int32))
    assert linear_probe(data, data, num_classes=2) < 0.7


def test_rejects(digits: tuple[FeatureSet, FeatureSet]) -> None:
    for option in ({"l2": -1.0}, {"max_iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="linear_probe: expected"):
            linear_probe(*digits, num_classes=10, **option)
