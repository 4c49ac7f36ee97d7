"""Whitened k-means patches: whitening, clustering against scikit-learn, features by hand."""

import numpy as np
import pytest
from sklearn.cluster import KMeans

from nat_jax.evaluate.baselines import patches
from nat_jax.evaluate.baselines.codebooks import k_means, nearest_centroid
from nat_jax.evaluate.baselines.patches import PatchDictionary, learn_patches


def _images(count: int, seed: int = 0, side: int = 12) -> np.ndarray:
    """Smooth random images, so that neighbouring pixels correlate as in photographs."""
    noise = np.random.default_rng(seed).normal(size=(count, side + 4, side + 4, 3))
    smooth = sum(noise[:, i : i + side, j : j + side] for i in range(5) for j in range(5))
    return np.clip(128 + 12 * smooth, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def dictionary() -> PatchDictionary:
    return learn_patches([_images(400)], centroids=30, size=4, iterations=10)


def test_patches_are_white(dictionary: PatchDictionary) -> None:
    drawn = patches.sample([_images(400)], 4, seed=0).reshape(3200, -1)
    normal = np.asarray(patches._normalised(drawn))
    np.testing.assert_allclose(normal.mean(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(normal.std(axis=1), 1, atol=0.1)
    before = np.cov(normal.T)
    covariance = np.cov(((normal - dictionary.mean) @ dictionary.whitener).T)
    # Directions of eigenvalue v keep v / (v + 0.1): none above 1, the strong ones close to it.
    values = np.sort(np.linalg.eigvalsh(covariance))
    expected = np.sort(np.linalg.eigvalsh(before))
    np.testing.assert_allclose(values, expected / (expected + 0.1), atol=0.01)
    assert np.linalg.cond(before + 0.1 * np.eye(48)) > 20 and values.max() < 1.01
    # ZCA rather than another whitening: symmetric, hence closest to the patches themselves.
    np.testing.assert_allclose(dictionary.whitener, dictionary.whitener.T, atol=1e-5)


def _inertia(points: np.ndarray, centroids: np.ndarray) -> float:
    return float(np.square(nearest_centroid(points, centroids)[1].astype(np.float64)).sum())


def test_k_means_comes_near_scikit_learn() -> None:
    drawn = patches.sample([_images(400)], 4, seed=0).reshape(3200, -1)
    points = np.asarray(patches._normalised(drawn))
    ours = _inertia(points, k_means(points, 30, 100, seed=0))
    reference = KMeans(30, n_init=3, init="random", random_state=0).fit(points)
    assert ours < 1.02 * reference.inertia_
    start = points[np.sort(np.random.default_rng(0).choice(len(points), 30, replace=False))]
    assert _inertia(points, start) > 1.1 * reference.inertia_


def test_no_centroid_is_wasted() -> None:
    # 90 of 100 points coincide: most of the first centroids are one point many times.
    rng = np.random.default_rng(0)
    points = np.concatenate([np.zeros((90, 2)), 5 + rng.normal(size=(10, 2))]).astype(np.float32)
    centroids = k_means(points, 6, 50, seed=0)
    owner, _ = nearest_centroid(points, centroids)
    assert len(np.unique(owner)) == 6


def test_features_by_hand(dictionary: PatchDictionary) -> None:
    image = _images(1, seed=5, side=9)[0]
    windows = 9 - 4 + 1
    near = np.empty((windows, windows, 30))
    for i in range(windows):
        for j in range(windows):
            patch = image[i : i + 4, j : j + 4].reshape(-1).astype(np.float64)
            patch -= patch.mean()
            patch /= np.sqrt(patch.var(ddof=1) + 10)
            white = (patch - dictionary.mean) @ dictionary.whitener
            distance = np.linalg.norm(white - dictionary.centroids, axis=1)
            near[i, j] = np.maximum(distance.mean() - distance, 0)
    expected = [near[a, b].sum(axis=(0, 1)) for a in HALVES for b in HALVES]
    found = np.asarray(dictionary(image[None]))
    assert found.shape == (1, 120)
    np.testing.assert_allclose(found[0], np.concatenate(expected), rtol=1e-3, atol=1e-3)
    assert np.isfinite(dictionary(np.full((1, 9, 9, 3), 128, np.uint8))).all()  # flat


HALVES = (slice(None, 3), slice(3, None))


def test_batches_and_chunks_do_not_matter(
    dictionary: PatchDictionary, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = _images(7, seed=1)
    together = np.asarray(dictionary(images))
    monkeypatch.setattr(patches, "_WINDOWS", 3 * 81)
    np.testing.assert_allclose(dictionary(images), together, atol=1e-4)
    np.testing.assert_allclose(dictionary(images[4:5]), together[4:5], atol=1e-4)
    split = learn_patches(
        [_images(400)[:150], _images(400)[150:]], centroids=30, size=4, iterations=10
    )
    np.testing.assert_array_equal(split.centroids, dictionary.centroids)
    other = learn_patches([_images(400)], centroids=30, size=4, iterations=10, seed=1)
    assert not np.array_equal(other.centroids, dictionary.centroids)


def test_a_stride_leaves_windows_out(dictionary: PatchDictionary) -> None:
    sparse = PatchDictionary(
        dictionary.mean, dictionary.whitener, dictionary.centroids, size=4, stride=8
    )
    image = _images(1, seed=3)  # 12 pixels: windows at 0 and 8 only, one for each quadrant
    corners = [image[:, i : i + 4, j : j + 4] for i in (0, 8) for j in (0, 8)]
    alone = [np.asarray(dictionary(corner)).reshape(4, 30).sum(axis=0) for corner in corners]
    np.testing.assert_allclose(sparse(image)[0], np.concatenate(alone), rtol=1e-4, atol=1e-4)


def test_rejects(dictionary: PatchDictionary) -> None:
    for option in ("centroids", "size", "stride", "iterations"):
        with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
            learn_patches([_images(2)], **{option: 0})
    with pytest.raises(ValueError, match="at least 3200 patches for 1600 centroids, got 80"):
        learn_patches([_images(10)])
    with pytest.raises(ValueError, match="at least 6 pixels a side, got shape"):
        learn_patches([_images(10, side=5)])
    with pytest.raises(ValueError, match="at least 4 pixels"):
        dictionary(np.zeros((1, 12, 3, 3), np.uint8))
