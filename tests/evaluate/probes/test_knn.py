"""kNN against scikit-learn's exact answer; votes, ties, chunks and memory."""

import importlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes.knn import knn, knn_sweep, nearest

module = importlib.import_module("nat_jax.evaluate.probes.knn")


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
    whole = nearest(queries, database, 200)  # more than a chunk has
    monkeypatch.setattr(module, "_QUERY_CHUNK", 128)
    monkeypatch.setattr(module, "_DATABASE_CHUNK", 128)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 2 * 128 * 6 * 4)
    chunked = nearest(queries, database, 200)
    np.testing.assert_allclose(chunked[0], whole[0], atol=1e-6)
    np.testing.assert_array_equal(chunked[1], whole[1])
    np.testing.assert_array_equal(whole[1][:, 1], whole[1][:, 0] + 500)  # ties: smaller row first


def test_a_sweep_equals_single_answers_and_scikit_learn(
    digits: tuple[FeatureSet, FeatureSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = digits
    ks, temperatures = (20, 1, 5), (0.07, None, 0.5)
    searches = []
    search = module._search

    def counted(queries: np.ndarray, database: np.ndarray, k: int) -> tuple:
        searches.append(k)
        return search(queries, database, k)

    monkeypatch.setattr(module, "_search", counted)
    monkeypatch.setattr(module, "_QUERY_CHUNK", 100)
    swept = knn_sweep(train, test, num_classes=10, ks=ks, temperatures=temperatures)
    assert searches == [20]
    for k in ks:
        for temperature in temperatures:
            single = knn(train, test, num_classes=10, k=k, temperature=temperature)
            assert swept[k, temperature] == single
            weights = "uniform"
            if temperature is not None:
                weights = lambda distance, t=temperature: np.exp(-distance / t)  # noqa: E731
            votes = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
            expected = votes.fit(train.features, train.labels).score(test.features, test.labels)
            assert single == pytest.approx(expected, abs=1e-9)
    assert len(set(swept.values())) > 3


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


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[np.memmap]:
    """400 MB of features in a file."""
    path = tmp_path_factory.mktemp("mapped") / "features.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (100_000, 1000))
    rng = np.random.default_rng(0)
    for start in range(0, len(array), 10_000):
        array[start : start + 10_000] = rng.random((10_000, 1000), np.float32) - 0.5
    array.flush()
    yield np.load(path, mmap_mode="r")
    path.unlink()


def _own_memory() -> int:
    """Return the bytes of this process that are not pages of files."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def _growth(work: Callable[[], object]) -> int:
    """Return by how many bytes the process's own memory rose, at most, while it worked."""
    before, most, done = _own_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            most[0] = max(most[0], _own_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return most[0] - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_mapped_features_are_not_copied(mapped: np.memmap, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", 32 << 20)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 16 << 20)
    # From both sides: queries are as many as there may be, neighbours too.
    few = np.asarray(mapped[::500])
    nearest(few, few, 5)
    for queries, database in ((few, mapped), (mapped, few)):
        assert _growth(lambda q=queries, d=database: nearest(q, d, 5)) < 200 << 20
    assert _growth(lambda: np.array(mapped).sum()) > 300 << 20  # what a copy would look like
    _, index = nearest(few, mapped, 1)
    np.testing.assert_array_equal(index[:, 0], np.arange(0, 100_000, 500))


def test_rejects() -> None:
    train = FeatureSet(np.eye(3, dtype=np.float32), np.int32([0, 1, 1]))
    with pytest.raises(ValueError, match="1 to 3.*got 20"):
        knn(train, train, num_classes=2)
    with pytest.raises(ValueError, match="got 0"):
        knn(train, train, num_classes=2, k=0)
    with pytest.raises(ValueError, match="temperature.*got 0"):
        knn(train, train, num_classes=2, k=1, temperature=0)
    with pytest.raises(ValueError, match="1 to 3.*got 0"):
        knn_sweep(train, train, num_classes=2, ks=(0, 2))
    with pytest.raises(ValueError, match="at least one k"):
        knn_sweep(train, train, num_classes=2, ks=())
    with pytest.raises(ValueError, match="one dimension, got 2 and 3"):
        nearest(np.ones((1, 2), np.float32), train.features, 1)
    with pytest.raises(ValueError, match="query features.*got 1"):
        nearest(np.float32([[np.nan, 0, 0]]), train.features, 1)
