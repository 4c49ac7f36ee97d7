"""kNN against scikit-learn's exact answer; votes, ties and chunks."""

import importlib

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.knn import knn, nearest

module = importlib.import_module("nat_jax.evaluate.knn")


@pytest.fixture(scope="module")
def digits() -> tuple[FeatureSet, FeatureSet]:
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target.astype(np.int32)
    return FeatureSet(x[:1437], y[:1437]), FeatureSet(x[1437:], y[1437:])


def test_nearest_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    database = rng.normal(size=(700, 12)).astype(np.float32)
    queries = rng.normal(size=(150, 12)).astype(np.float32)
    similarity, index = nearest(queries, database, 7)
    reference = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute")
    distance, expected = reference.fit(database.astype(np.float64)).kneighbors(queries)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(similarity, 1 - distance, atol=1e-6)


def test_nearest_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    database = rng.normal(size=(1000, 6)).astype(np.float32)
    database[500:] = database[:500]  # every similarity ties, also across chunks
    queries = rng.normal(size=(300, 6)).astype(np.float32)
    whole = nearest(queries, database, 9)
    monkeypatch.setattr(module, "_QUERY_CHUNK", 128)
    monkeypatch.setattr(module, "_DATABASE_CHUNK", 128)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2 * 128 * 6 * 4)
    chunked = nearest(queries, database, 9)
    np.testing.assert_allclose(chunked[0], whole[0], atol=1e-6)
    np.testing.assert_array_equal(chunked[1], whole[1])
    np.testing.assert_array_equal(whole[1][:, 1], whole[1][:, 0] + 500)  # ties: smaller row first


def test_k_may_exceed_a_chunk_and_equal_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DATABASE_CHUNK", 16)
    database = np.random.default_rng(2).normal(size=(50, 3)).astype(np.float32)
    _, index = nearest(database[:4], database, 50)
    np.testing.assert_array_equal(np.sort(index, axis=1), np.tile(np.arange(50), (4, 1)))


@pytest.mark.parametrize("k", [1, 5, 20])
def test_plain_votes_equal_scikit_learn(digits: tuple[FeatureSet, FeatureSet], k: int) -> None:
    train, test = digits
    ours = knn(train, test, num_classes=10, k=k, temperature=None)
    reference = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    expected = reference.fit(train.features, train.labels).score(test.features, test.labels)
    assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_weighted_votes_equal_scikit_learn(
    digits: tuple[FeatureSet, FeatureSet], temperature: float
) -> None:
    train, test = digits
    ours = knn(train, test, num_classes=10, temperature=temperature)
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / temperature)
    )
    expected = reference.fit(train.features, train.labels).score(test.features, test.labels)
    assert ours == pytest.approx(expected, abs=1e-9)


def test_the_comparison_can_fail(digits: tuple[FeatureSet, FeatureSet]) -> None:
    train, test = digits
    shuffled = FeatureSet(train.features, np.random.default_rng(0).permutation(train.labels))
    assert knn(shuffled, test, num_classes=10) < 0.3 < 0.9 < knn(train, test, num_classes=10)


def test_vote_ties_go_to_the_smaller_label() -> None:
    train = FeatureSet(np.float32([[1, 0], [1, 0]]), np.int32([2, 1]))
    query = np.float32([[1, 0]])
    assert knn(train, FeatureSet(query, np.int32([1])), num_classes=3, k=2) == 1.0
    assert knn(train, FeatureSet(query, np.int32([2])), num_classes=3, k=2) == 0.0


def test_weights_outvote_numbers_only_when_cold() -> None:
    # One neighbour at cosine 1 against two at about 0.7.
    train = FeatureSet(np.float32([[1, 0], [1, 1], [1, -1]]), np.int32([0, 1, 1]))
    test = FeatureSet(np.float32([[1, 0]]), np.int32([0]))
    assert knn(train, test, num_classes=2, k=3, temperature=0.07) == 1.0
    assert knn(train, test, num_classes=2, k=3, temperature=10.0) == 0.0
    assert knn(train, test, num_classes=2, k=3, temperature=None) == 0.0
    assert knn(train, test, num_classes=2, k=3, temperature=1e-4) == 1.0  # no overflow


def test_only_directions_count() -> None:
    rng = np.random.default_rng(3)
    database, queries = rng.normal(size=(2, 40, 5)).astype(np.float32)
    scale = np.float32(10.0) ** rng.integers(-30, 30, (40, 1)).astype(np.float32)
    np.testing.assert_array_equal(
        nearest(queries * scale, database * scale, 3)[1], nearest(queries, database, 3)[1]
    )


def test_rejects() -> None:
    train = FeatureSet(np.eye(3, dtype=np.float32), np.int32([0, 1, 1]))
    with pytest.raises(ValueError, match="1 to 3.*got 20"):
        knn(train, train, num_classes=2)
    with pytest.raises(ValueError, match="got 0"):
        knn(train, train, num_classes=2, k=0)
    with pytest.raises(ValueError, match="temperature.*got 0"):
        knn(train, train, num_classes=2, k=1, temperature=0)
    with pytest.raises(ValueError, match="one dimension, got 2 and 3"):
        nearest(np.ones((1, 2), np.float32), train.features, 1)
    with pytest.raises(ValueError, match="query features.*got 1"):
        nearest(np.float32([[np.nan, 0, 0]]), train.features, 1)
