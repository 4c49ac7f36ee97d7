"""L-BFGS against scikit-learn's logistic regression: coefficients, loss and accuracy."""

import importlib

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes.lbfgs import lbfgs_probe

module = importlib.import_module("nat_jax.evaluate.probes.lbfgs")


def _reference(train: FeatureSet, l2: float) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(train.features.astype(np.float64))
    model = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8)
    return scaler, model.fit(scaler.transform(train.features.astype(np.float64)), train.labels)


def test_coefficients_equal_scikit_learn(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, l2 = digits[0], 2e-2
    _, model = _reference(train, l2)
    fit = module.solve(train, 10, l2, max_iterations=1000, tolerance=2e-6)
    kernel = fit.params[:-1].T
    # The penalty leaves a common shift of the biases free.
    bias = fit.params[-1] - np.mean(fit.params[-1])
    np.testing.assert_allclose(kernel, model.coef_, atol=0.02)
    np.testing.assert_allclose(bias, model.intercept_ - model.intercept_.mean(), atol=0.02)
    _, other = _reference(train, 5 * l2)  # the tolerance tells penalties apart
    assert np.abs(kernel - other.coef_).max() > 0.1


def test_defaults_converge(
    digits: tuple[FeatureSet, FeatureSet], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger=module.__name__)
    assert lbfgs_probe(*digits, num_classes=10) > 0.85
    assert not caplog.records
    assert lbfgs_probe(*digits, num_classes=10, max_iterations=1) < 0.85
    assert "stopped after 1 of 1 iterations" in caplog.text


@pytest.mark.parametrize("rows", [100, 1437])
def test_accuracy_equals_scikit_learn(digits: tuple[FeatureSet, FeatureSet], rows: int) -> None:
    train, test = digits
    train = FeatureSet(train.features[:rows], train.labels[:rows])
    scaler, model = _reference(train, 3e-3)
    expected = model.score(scaler.transform(test.features), test.labels)
    # One record more or less: the optima differ by the tolerance.
    ours = lbfgs_probe(train, test, num_classes=10, l2=3e-3)
    assert ours == pytest.approx(expected, abs=1.5 / 360)


def test_scale_shift_and_constants_do_not_matter(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = digits
    base = lbfgs_probe(train, test, num_classes=10)

    def changed(data: FeatureSet) -> FeatureSet:
        assert np.ptp(data.features, axis=0).min() == 0  # a pixel that is always white
        return FeatureSet((data.features * 1000 + 7).astype(np.float32), data.labels)

    moved = lbfgs_probe(changed(train), changed(test), num_classes=10)
    assert moved == pytest.approx(base, abs=1.5 / 360)


def test_penalty_shrinks_to_the_majority_class() -> None:
    rng = np.random.default_rng(0)
    labels = np.int32([0] * 30 + [1] * 70)
    features = (labels[:, None] + 0.01 * rng.normal(size=(100, 64))).astype(np.float32)
    data = FeatureSet(features, labels)  # of the digits' shape, which are compiled already
    assert lbfgs_probe(data, data, num_classes=10) == 1.0
    assert lbfgs_probe(data, data, num_classes=10, l2=1e3) == 0.7


def test_rejects(digits: tuple[FeatureSet, FeatureSet]) -> None:
    for option in ({"l2": -1.0}, {"max_iterations": 0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="by lbfgs: expected"):
            lbfgs_probe(*digits, num_classes=10, **option)
