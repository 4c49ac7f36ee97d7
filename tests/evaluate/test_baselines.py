"""Baselines without a network: each beats a control on real digits, repeats itself, is exact."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score

from nat_jax.evaluate.baselines import BASELINES, diffrac
from nat_jax.evaluate.baselines.codebooks import k_means, neural_gas, self_organising_map
from nat_jax.evaluate.baselines.sift import dense_sift
from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes import PROBES
from nat_jax.report.rows import NO_NETWORK

TRAIN, FEW = slice(0, 192), slice(0, 100)
TEST, FLAT = slice(192, 288), 288
LEARN = {
    "patches": dict(stride=2, iterations=10),
    "som": dict(stride=2, iterations=10),
    "gas": dict(stride=2, iterations=10),
    "smt": dict(stride=2),
    "diffrac": dict(stride=2, patches=40),
    "sift": dict(stride=1),
}
SIZES = {"patches": 40, "som": 40, "gas": 40, "smt": 128, "diffrac": 20, "sift": 4}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Digits as colour images of 16 pixels, 192 to learn on, 96 by other writers; a flat image."""
    data, chosen = load_digits(), np.r_[:192, 1701:1797]
    large = np.kron(data.images[chosen], np.ones((1, 2, 2)))[..., None] * np.full(3, 15.9)
    images = np.concatenate([large, np.full((1, 16, 16, 3), 128)]).astype(np.uint8)
    return images, data.target[chosen].astype(np.int32)


def learn(word: str, images: np.ndarray) -> Callable:
    parts = [images[:100], images[100:192]]
    return BASELINES[word].learn(parts, SIZES[word], seed=0, **LEARN[word])


@pytest.fixture(scope="module")
def learned(digits: tuple[np.ndarray, np.ndarray]) -> Callable[[str], Callable]:
    return functools.cache(lambda word: learn(word, digits[0]))


def score(features: np.ndarray, labels: np.ndarray) -> float:
    """Return kNN's accuracy with ten labels of each class, about."""
    sets = (FeatureSet(features[part], labels[part]) for part in (FEW, TEST))
    return PROBES["knn"](*sets, num_classes=10, seed=0, k=1)


@pytest.mark.parametrize("word", BASELINES)
def test_patches_of_real_digits_help_and_repeat(word, learned, digits):
    images, labels = digits
    found = np.asarray(learned(word)(images))
    assert found.shape[0] == len(images) and found.dtype == np.float32
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(learn(word, images)(images), found)
    # The control: the pixels of each image change places, so that its patches mean nothing.
    pixels = images.reshape(-1, 256, 3)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(256), (len(images), 1)), axis=1)
    mixed = np.take_along_axis(pixels, order[..., None], axis=1).reshape(images.shape)
    control = np.asarray(learn(word, mixed)(mixed))
    assert score(found, labels) > 0.8 > score(control, labels) + 0.3


def test_every_baseline_has_a_name():
    assert list(NO_NETWORK) == ["pixels", *BASELINES]


@pytest.mark.parametrize("word", BASELINES)
def test_what_cannot_be_learned_is_one_message(word, digits):
    with pytest.raises(ValueError, match=f"{word}|patches"):
        BASELINES[word].learn([digits[0][:1]], 10_000, stride=1, seed=0)
    with pytest.raises(ValueError, match="at least [68] pixels a side, got shape"):
        BASELINES[word].learn([digits[0][:, :5, :5]], SIZES[word], stride=1, seed=0)


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


def test_the_manifold_embeds_neighbouring_patches_close_together(learned, digits):
    manifold = learned("smt")
    codes = np.asarray(jax.vmap(manifold.coder)(digits[0][TRAIN]), np.float64)
    assert codes.sum(axis=-1).min() >= 1 and codes.mean() < 0.5

    def apart(projection: np.ndarray) -> float:
        """Return the variance between neighbours as a share of that between all patches."""
        embedded = codes @ projection
        step, every = (x.var(axis=(0, 1, 2)) for x in (np.diff(embedded, axis=2), embedded))
        return float((step / 2 / every).mean())

    embedded = (codes @ manifold.projection - manifold.offset).reshape(-1, 32)
    # White up to the penalty on codes, which takes a little off.
    np.testing.assert_allclose(np.cov(embedded.T), np.eye(32), atol=0.05)
    np.testing.assert_allclose(embedded.mean(axis=0), 0, atol=1e-3)
    control = np.random.default_rng(0).normal(size=manifold.projection.shape)
    assert apart(manifold.projection[:, :4]) < 0.8 * apart(control)


def test_clusters_have_equal_sizes_and_would_collapse_without(learned, digits, monkeypatch):
    images, labels = digits
    found = learned("diffrac")
    sizes = np.bincount(found.cluster, minlength=20)
    assert sizes.max() <= 10 and len(found.cluster) == 192
    assert adjusted_rand_score(labels[TRAIN], found.cluster) > 0.2
    predicted = np.asarray(found(images)).argmax(axis=1)
    assert np.mean(predicted[TRAIN] == found.cluster) > 0.5
    monkeypatch.setattr(diffrac, "_of_equal_sizes", lambda scores, order: scores.argmax(axis=1))
    free = np.bincount(learn("diffrac", images).cluster, minlength=20)
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
    noise = np.random.default_rng(0).uniform(0, 255, (64, 64)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    image = cv2.normalize(smooth, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    # A cell is 1.5 sizes of the point; OpenCV smooths first, and counts directions the other way.
    point = cv2.KeyPoint(31.5, 31.5, 4 / 1.5, 0)
    _, expected = cv2.SIFT.create().compute(image, [point])
    expected = expected.reshape(4, 4, 8)[..., -np.arange(8)].reshape(128)
    before = cv2.GaussianBlur(image.astype(np.float32), (0, 0), (1.6**2 - 0.5**2) ** 0.5)
    found = np.asarray(dense_sift(before, 4, 1)) @ (expected / np.linalg.norm(expected))
    assert found[24, 24] > 0.97 > 0.8 > found[22, 24]  # the same place, and two pixels away


def test_fisher_vectors_by_hand(learned, digits):
    fisher, images = learned("sift"), digits[0]
    grey = images[0].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
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
    np.testing.assert_allclose(learned("sift")(images)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("word", "message"),
    [("smt", "not flat, got flat ones alone"), ("diffrac", "images that differ, got equal ones")],
)
def test_images_without_anything_to_learn_are_one_message(word, message, digits):
    flat = np.broadcast_to(digits[0][FLAT], (192, 16, 16, 3))
    with pytest.raises(ValueError, match=message):
        learn(word, flat)
