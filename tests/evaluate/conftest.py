"""What tests of the probes share."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nat_jax.evaluate.features import FeatureSet


@pytest.fixture(scope="session")
def digits() -> tuple[FeatureSet, FeatureSet]:
    """Pixels of real handwritten digits: 1,437 to learn on, 360 by other writers to judge."""
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
    return FeatureSet(x[:1437], y[:1437]), FeatureSet(x[1437:], y[1437:])
