"""Ridge regression against scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes import ridge
from nat_jax.evaluate.probes.ridge import ridge_probe


def _reference(train: FeatureSet, l2: float) -> tuple[StandardScaler, Ridge]:
    scaler = StandardScaler().fit(train.features.astype(np.float64))
    x = scaler.transform(train.features.astype(np.float64))
    return scaler, Ridge(alpha=l2 * len(train)).fit(x, np.eye(10)[train.labels])


@pytest.mark.parametrize("rows", [1437, 40])  # more records than features, and fewer
@pytest.mark.parametrize("l2", [1e-3, 0.3])
def test_equals_scikit_learn(
    digits: tuple[FeatureSet, FeatureSet], rows: int, l2: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "_CHUNK_BYTES", 4 * 64 * 300)
    train, test = digits[0].of(np.arange(rows)), digits[1]
    fit = ridge.solve(train, 10, l2)
    scaler, model = _reference(train, l2)
    np.testing.assert_allclose(fit.kernel, model.coef_.T, atol=2e-5)
    np.testing.assert_allclose(fit.bias, model.intercept_, atol=1e-6)
    _, other = _reference(train, 2 * l2)
    assert np.abs(fit.kernel - other.coef_.T).max() > 5e-4
    outputs = model.predict(scaler.transform(test.features.astype(np.float64)))
    expected = np.mean(outputs.argmax(axis=1) == test.labels)
    assert ridge_probe(train, test, num_classes=10, l2=l2) == pytest.approx(expected)


def test_rejects(digits: tuple[FeatureSet, FeatureSet]) -> None:
    with pytest.raises(ValueError, match="l2 above 0, got 0"):
        ridge_probe(*digits, num_classes=10, l2=0)


def test_a_penalty_lost_in_rounding_is_named() -> None:
    # Copies of one feature: without a penalty their products have no inverse.
    rng = np.random.default_rng(0)
    one = rng.normal(size=(500, 1)).astype(np.float32)
    noise = 1e-9 * rng.normal(size=(500, 40)).astype(np.float32)
    data = FeatureSet((one + noise).astype(np.float32), (one[:, 0] > 0).astype(np.int32))
    assert ridge_probe(data, data, num_classes=2) == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="raise l2"):
        ridge_probe(data, data, num_classes=2, l2=1e-30)
