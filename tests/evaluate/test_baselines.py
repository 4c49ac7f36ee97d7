"""Baselines without a network: each beats a control on real digits, repeats itself, is exact."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from nat_jax.evaluate.baselines import BASELINES, diffrac, smt
from nat_jax.evaluate.baselines.codebooks import k_means, neural_gas, self_organising_map
from nat_jax.evaluate.baselines.sift import dense_sift
from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes import PROBES
from nat_jax.report.rows import NO_NETWORK

SIZES = {"patches": 40, "som": 40, "gas": 40, "smt": 128, "diffrac": 20, "sift": 4}
TRAIN = 384


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits as colour images of 16 pixels, 384 to learn on and 128 by other writers; labels."""
    chosen = np.r_[:TRAIN, 1669:1797]
    data = load_digits()
    large = np.kron(data.images[chosen], np.ones((1, 2, 2)))[..., None] * np.full(3, 15.9)
    return large.astype(np.uint8), data.target[chosen].astype(np.int32)


@pytest.fixture(scope="module")
def learned(digits: tuple[np.ndarray, np.ndarray]) -> dict[str, Callable]:
    return {word: learn(word, digits[0]) for word in BASELINES}


def learn(word: str, images: np.ndarray) -> Callable:
    batches = [images[:128], images[128:200], images[200:TRAIN]]
    return BASELINES[word].learn(batches, SIZES[word], stride=1, seed=0)


def score(features: np.ndarray, labels: np.ndarray) -> float:
    """Return kNN's accuracy with ten labels of each class, about."""
    few, test = slice(0, 100), slice(TRAIN, None)
    sets = (FeatureSet(features[part], labels[part]) for part in (few, test))
    return PROBES["knn"](*sets, num_classes=10, seed=0, k=1)


@pytest.mark.parametrize("word", BASELINES)
def test_neighbouring_pixels_are_used(word, learned, digits):
    images, labels = digits
    found = np.asarray(learned[word](images))
    assert found.shape[0] == len(images) and found.dtype == np.float32
    assert np.isfinite(found).all()
    # The control: pixels change places, in all images alike. Raw pixels would lose nothing.
    order = np.random.default_rng(0).permutation(16 * 16)
    mixed = images.reshape(-1, 256, 3)[:, order].reshape(images.shape)
    print(word, score(found, labels), score(np.asarray(learn(word, mixed)(mixed)), labels))
    assert (
        word in ("x",)
        or score(found, labels) > score(np.asarray(learn(word, mixed)(mixed)), labels) + 0.1
    )


@pytest.mark.parametrize("word", BASELINES)
def test_learning_and_describing_repeat_themselves(word, learned, digits):
    again = np.asarray(learn(word, digits[0])(digits[0][:8]))
    np.testing.assert_array_equal(again, learned[word](digits[0][:8]))
    flat = np.full((1, 16, 16, 3), 128, np.uint8)
    assert np.isfinite(learned[word](flat)).all()


def test_every_baseline_has_a_name():
    assert list(NO_NETWORK) == ["pixels", *BASELINES]


@pytest.mark.parametrize("word", BASELINES)
def test_what_cannot_be_learned_is_one_message(word, digits):
    with pytest.raises(ValueError, match=f"{word}|patches"):
        BASELINES[word].learn([digits[0][:1]], 10_000, stride=1, seed=0)
    with pytest.raises(ValueError, match="at least [68] pixels a side, got shape"):
        BASELINES[word].learn([digits[0][:, :5, :5]], 10, stride=1, seed=0)


POINTS = np.random.default_rng(0).normal(size=(300, 3)).astype(np.float32)


def nearest_first(units: np.ndarray) -> np.ndarray:
    return np.argsort(np.square(POINTS[:, None] - units).sum(axis=2), axis=1)


def test_one_iteration_of_a_map_by_hand():
    first = k_means(POINTS, 7, 0, seed=0)
    place = np.array([(i // 3, i % 3) for i in range(7)])
    near = np.exp(-np.square(place[:, None] - place).sum(axis=2) / (2 * 1.5**2))
    weight = near[nearest_first(first)[:, 0]]
    expected = weight.T @ POINTS / weight.sum(axis=0)[:, None]
    np.testing.assert_allclose(self_organising_map(POINTS, 7, 1, seed=0), expected, rtol=1e-4)


def test_one_iteration_of_neural_gas_by_hand():
    first = k_means(POINTS, 7, 0, seed=0)
    weight = np.exp(-np.argsort(nearest_first(first), axis=1) / 10)
    expected = weight.T @ POINTS / weight.sum(axis=0)[:, None]
    np.testing.assert_allclose(neural_gas(POINTS, 7, 1, seed=0), expected, rtol=1e-4)


def test_units_next_to_each_other_on_the_map_are_alike():
    def roughness(units: np.ndarray) -> float:
        lattice = units.reshape(6, 6, 3)
        steps = np.linalg.norm(np.diff(lattice, axis=0), axis=2).mean()
        return float(steps / np.linalg.norm(units[:, None] - units, axis=2).mean())

    assert roughness(self_organising_map(POINTS, 36, 20, seed=0)) < 0.6
    assert roughness(k_means(POINTS, 36, 20, seed=0)) > 0.9  # the control: no lattice
    assert roughness(neural_gas(POINTS, 36, 20, seed=0)) > 0.9


def test_neural_gas_ends_as_k_means():
    def error(units: np.ndarray) -> float:
        return float(np.square(POINTS[:, None] - units).sum(axis=2).min(axis=1).mean())

    assert error(neural_gas(POINTS, 12, 30, seed=0)) < 1.02 * error(k_means(POINTS, 12, 30, seed=0))
    assert error(neural_gas(POINTS, 12, 1, seed=0)) > 1.5 * error(k_means(POINTS, 12, 30, seed=0))


def test_the_manifold_embeds_patches_of_an_image_close_together(learned, digits):
    manifold = learned["smt"]
    codes = np.asarray(jax.vmap(manifold.coder)(digits[0][:TRAIN]), np.float64)
    assert codes.sum(axis=-1).min() >= 1 and codes.mean() < 0.5

    def within(projection: np.ndarray) -> float:
        embedded = (codes @ projection).reshape(TRAIN, -1, projection.shape[1])
        return float((embedded.var(axis=1).mean(axis=0) / embedded.var(axis=(0, 1))).mean())

    embedded = (codes @ manifold.projection - manifold.offset).reshape(-1, 16)
    # White up to the penalty on codes, which takes a little off.
    np.testing.assert_allclose(np.cov(embedded.T), np.eye(16), atol=0.05)
    np.testing.assert_allclose(embedded.mean(axis=0), 0, atol=1e-3)
    control = np.random.default_rng(0).normal(size=manifold.projection.shape)
    print(within(manifold.projection), within(control))
    assert within(manifold.projection) < 0.8 * within(control)


def test_clusters_have_equal_sizes_and_would_collapse_without(learned, digits, monkeypatch):
    images, labels = digits
    found = learned["diffrac"]
    sizes = np.bincount(found.cluster, minlength=20)
    assert sizes.max() <= 20 and len(found.cluster) == TRAIN  # 384 images in 20 clusters
    print(adjusted_rand_score(labels[:TRAIN], found.cluster), sizes)
    assert adjusted_rand_score(labels[:TRAIN], found.cluster) > 0.2
    predicted = np.asarray(found(images[:TRAIN])).argmax(axis=1)
    assert np.mean(predicted == found.cluster) > 0.5
    monkeypatch.setattr(diffrac, "_of_equal_sizes", lambda scores, order: scores.argmax(axis=1))
    free = np.bincount(learn("diffrac", images).cluster, minlength=20)
    print(free)
    assert free.max() > 1.5 * sizes.max()


def test_sift_keeps_what_light_changes_and_nothing_more():
    image = np.random.default_rng(0).uniform(0, 255, (16, 16)).astype(np.float32)
    found = np.asarray(dense_sift(image, 3, 2))
    assert found.shape == (3, 3, 128)
    np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(dense_sift(0.5 * image + 20, 3, 2), found, atol=1e-5)
    # A quarter turn moves cells and turns directions by two; without the turn nothing fits.
    cells = np.asarray(dense_sift(np.rot90(image), 3, 2)).reshape(3, 3, 4, 4, 8)
    back = np.rot90(np.rot90(cells, -1, axes=(0, 1)), -1, axes=(2, 3))
    first = found.reshape(3, 3, 4, 4, 8)
    np.testing.assert_allclose(np.roll(back, 2, axis=-1), first, atol=1e-4)
    assert np.abs(back - first).max() > 0.1


def test_sift_comes_near_opencv():
    cv2 = pytest.importorskip("cv2", reason="compares with OpenCV's SIFT")
    rng = np.random.default_rng(0)
    image = cv2.GaussianBlur(rng.uniform(0, 255, (64, 64)).astype(np.float32), (0, 0), 2)
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    point = cv2.KeyPoint(31.5, 31.5, 16 * 2 / 3 / 4, 0)
    _, expected = cv2.SIFT.create().compute(image, [point])
    found = np.asarray(dense_sift(image[24:40, 24:40].astype(np.float32), 4, 1)).reshape(128)
    print(found @ expected[0] / np.linalg.norm(expected))


def test_fisher_vectors_by_hand(learned, digits):
    fisher, image = learned["sift"], digits[0][0]
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    parts = [np.asarray(dense_sift(grey, cell, 2)).reshape(-1, 128) for cell in (2, 3, 4)]
    x = (np.concatenate(parts) - fisher.mean) @ fisher.axes
    away = (x[:, None] - fisher.centres) / fisher.deviations
    density = fisher.weights / fisher.deviations.prod(axis=1, dtype=np.float64)
    density = density * np.exp(-np.square(away).sum(axis=2) / 2)
    owner = (density / density.sum(axis=1, keepdims=True))[..., None]
    root = np.sqrt(fisher.weights)[:, None] * len(x)
    blocks = [(owner * away).sum(0) / root, (owner * (away**2 - 1)).sum(0) / root / np.sqrt(2)]
    vector = np.concatenate([block.reshape(-1) for block in blocks])
    vector = np.sign(vector) * np.sqrt(np.abs(vector))
    expected = vector / np.linalg.norm(vector)
    np.testing.assert_allclose(learned["sift"](image[None])[0], expected, atol=1e-4)


def test_the_manifold_needs_atoms(digits):
    with pytest.raises(ValueError, match="atoms: expected at least 128, got 100"):
        smt.learn_sparse_manifold([digits[0]], 100)
