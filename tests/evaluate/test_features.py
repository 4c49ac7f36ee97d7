"""Feature extraction, pooling, subsets and the checks that every probe shares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax import evaluate
from nat_jax.evaluate import FeatureSet
from nat_jax.evaluate.features import (
    check_finite,
    extracted,
    few_labels,
    joined,
    raw_pixels,
)
from nat_jax.evaluate.probes.linear import linear_probe
from nat_jax.models import make_model
from nat_jax.models.pooling import PUBLISHED_FEATURES, pool


def _set(rows: int = 60, dim: int = 5, classes: int = 3, seed: int = 0) -> FeatureSet:
    rng = np.random.default_rng(seed)
    labels = (np.arange(rows) % classes).astype(np.int32)
    return FeatureSet(rng.normal(size=(rows, dim)).astype(np.float32), labels)


def _batches(rows: int, size: int) -> list[dict[str, np.ndarray]]:
    """Images whose every pixel is the record's number; the last batch padded with weight 0."""
    batches = []
    for start in range(0, rows, size):
        index = np.arange(start, start + size)
        real = index < rows
        batches.append(
            {
                "image": np.broadcast_to(
                    np.where(real, index, 255).astype(np.uint8)[:, None, None, None],
                    (size, 2, 2, 3),
                ),
                "index": np.where(real, index, -1).astype(np.int32),
                "label": np.where(real, index % 3, 0).astype(np.int32),
                "weight": real.astype(np.float32),
            }
        )
    return batches


def test_extract_flattens_and_drops_padding() -> None:
    @jax.jit
    def apply(images: jax.Array) -> dict[str, jax.Array]:
        x = images.astype(jnp.float32)
        return {"map": x, "z": x[:, 0, 0]}

    batches = _batches(10, 4)
    batches[0]["weight"][1] = 0.0  # a bad record
    sets = joined(columns for _, columns in extracted(apply, batches))
    good = [0, *range(2, 10)]
    assert sets["map"].features.shape == (9, 12)
    assert sets["z"].features.shape == (9, 3)
    np.testing.assert_array_equal(sets["z"].features[:, 0], good)
    np.testing.assert_array_equal(sets["map"].labels, np.array(good) % 3)
    assert sets["z"].features.dtype == np.float32
    with pytest.raises(ValueError, match="no record"):
        joined(columns for _, columns in extracted(apply, []))


@pytest.mark.parametrize("shape", [(2, 7, 5, 3), (1, 1, 1, 40)])
@pytest.mark.parametrize("limit", [1, 40, 1000])
def test_pool_fits_and_keeps_constants(shape: tuple[int, ...], limit: int) -> None:
    pooled = pool(jnp.full(shape, 2.5), limit)
    assert pooled.shape[0] == shape[0] and pooled.shape[3] == shape[3]
    assert np.prod(pooled.shape[1:]) <= max(limit, shape[3])
    np.testing.assert_allclose(pooled, 2.5, rtol=1e-6)
    if np.prod(shape[1:]) <= limit:
        assert pooled.shape == shape


def test_pool_takes_means_of_windows_that_may_overlap() -> None:
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    expected = x.reshape(2, 3, 2, 3, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(pool(jnp.asarray(x), 27), expected, atol=1e-6)
    row = jnp.arange(5.0).reshape(1, 1, 5, 1)  # 5 -> 2 cells: pixels 0..2 and 2..4
    np.testing.assert_allclose(pool(row, 2).ravel(), [1.0, 3.0])


def test_pooled_maps_of_alexnet_have_the_published_sizes() -> None:
    image_size = 224
    model = make_model("alexnet", dim=8, image_size=image_size, frontend="sobel")
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), np.uint8)

    def pooled(images: jax.Array, most: int) -> dict[str, jax.Array]:
        outputs, _ = model.apply(*model.init(jax.random.key(0)), images)
        return {name: pool(x, most) for name, x in outputs.items() if x.ndim == 4}

    def sizes(most: int) -> list[int]:
        shapes = jax.eval_shape(lambda images: pooled(images, most), images)
        return [int(np.prod(shapes[f"conv{i}"].shape[1:])) for i in range(1, 6)]

    assert sizes(PUBLISHED_FEATURES) == [9600, 9216, 9600, 9600, 9216]
    assert sizes(9216) != sizes(PUBLISHED_FEATURES)


def test_large_images_are_pooled_as_feature_maps_are() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    pixels = raw_pixels(images, 48)
    assert pixels.shape == (2, 4, 4, 3)
    blocks = images.reshape(2, 4, 16, 4, 16, 3).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(pixels, blocks, rtol=1e-5)
    np.testing.assert_allclose(
        raw_pixels(images[:, :4, :4], 48), images[:, :4, :4] / 255, rtol=1e-6
    )


NAMES = [f"train/{i % 7}/{i:04}.png" for i in range(600)]
LABELS = (np.arange(600) % 3).astype(np.int32)


def _chosen(rows: np.ndarray) -> set[str]:
    return {NAMES[row] for row in rows}


@pytest.mark.parametrize(("amount", "each"), [(10, 10), (0.01, 2), (0.1, 20), (0.001, 1), (1, 1)])
def test_few_labels_are_balanced(amount: float, each: int) -> None:
    rows = few_labels(LABELS, amount, seed=0, names=NAMES)
    np.testing.assert_array_equal(np.bincount(LABELS[rows]), [each] * 3)
    assert (np.diff(rows) > 0).all()
    shares = np.int32([0] * 500 + [1] * 90 + [2] * 10)
    rows = few_labels(shares, 0.1, seed=0, names=NAMES)
    np.testing.assert_array_equal(np.bincount(shares[rows]), [50, 9, 1])


def test_few_labels_follow_the_names_not_the_order() -> None:
    chosen = _chosen(few_labels(LABELS, 0.1, seed=5, names=NAMES))
    order = np.random.default_rng(0).permutation(600)
    moved = few_labels(LABELS[order], 0.1, seed=5, names=[NAMES[i] for i in order])
    assert _chosen(order[moved]) == chosen
    assert _chosen(few_labels(LABELS, 0.1, seed=6, names=NAMES)) != chosen
    # Without names it is the place that counts.
    assert _chosen(order[few_labels(LABELS[order], 0.1, seed=5)]) != _chosen(
        few_labels(LABELS, 0.1, seed=5)
    )


def test_smaller_splits_lie_inside_larger_ones() -> None:
    splits = [_chosen(few_labels(LABELS, x, seed=2, names=NAMES)) for x in (0.01, 10, 0.1, 150)]
    assert splits[0] < splits[1] < splits[2] < splits[3]


def test_few_labels_are_drawn_evenly() -> None:
    counts = np.zeros(600)
    for seed in range(300):
        counts[few_labels(LABELS, 0.1, seed=seed, names=NAMES)] += 1
    # Binomial(300, 0.1): mean 30, deviation 5.2.
    assert counts.min() > 5 and counts.max() < 60
    assert counts[:300].mean() == pytest.approx(30, abs=1)


def test_few_labels_of_this_split_never_change() -> None:
    rows = few_labels(LABELS[:30], 2, seed=0, names=NAMES[:30])
    assert rows.tolist() == [6, 10, 11, 18, 25, 29]


def test_few_labels_rejects() -> None:
    for amount in (0, -1, 1.5, 0.0):
        with pytest.raises(ValueError, match="number per class or a fraction"):
            few_labels(LABELS, amount, seed=0)
    with pytest.raises(ValueError, match="at least 201 records of every class, got 200 of class 0"):
        few_labels(LABELS, 201, seed=0)
    with pytest.raises(ValueError, match="600 different ones, got 599, 599"):
        few_labels(LABELS, 2, seed=0, names=NAMES[1:])
    with pytest.raises(ValueError, match="600 different ones, got 600, 599"):
        few_labels(LABELS, 2, seed=0, names=[*NAMES[1:], NAMES[1]])
    with pytest.raises(ValueError, match="1 of 3 records have none"):
        few_labels(np.int32([0, -1, 1]), 0.1, seed=0)


def test_not_finite_values_are_counted_over_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nat_jax.evaluate.features._CHECK_BYTES", 4 * 5 * 7)
    features = _set(60).features
    check_finite(features, "good")
    for row, column in ((3, 1), (3, 2), (59, 0)):
        features[row, column] = np.nan
    with pytest.raises(ValueError, match="bad features.*got 3 .* in 2 of 60 rows"):
        check_finite(features, "bad")


PROBES = {
    **evaluate.PROBES,
    "linear_probe by sgd": functools.partial(linear_probe, fit="sgd"),
    "linear_probe by ridge": functools.partial(linear_probe, fit="ridge"),
}
SMALL: dict[str, dict[str, int]] = {name: {} for name in PROBES}
SMALL |= {"knn": {"k": 3}, "mlp_probe": {"hidden": 4, "epochs": 1}}


def _changed(labels=None, values: dict | None = None, rows: int = 60) -> FeatureSet:
    good = _set()
    for place, value in (values or {}).items():
        good.features[place] = value
    return FeatureSet(
        good.features[:rows], np.int32(good.labels if labels is None else labels)[:rows]
    )


GOOD, NONE = _set(), np.where(np.arange(60) < 7, -1, _set().labels)
NOT_FINITE = {(3, 1): np.nan, (3, 2): np.inf, (5, 0): -np.inf}
BAD_SETS = {
    "dimension": (GOOD, _set(dim=6), 3, "5 and 6"),
    "label": (GOOD, _changed(GOOD.labels + 1), 3, r"expected 0\.\.2 for 3 classes, got 20 of 60"),
    "unlabelled": (_changed(NONE), GOOD, 3, "train labels: .* 7 of 60 have none"),
    "one class": (_changed(0 * GOOD.labels), GOOD, 3, "only class 0"),
    "num_classes": (GOOD, GOOD, 1, "at least 2, got 1"),
    "empty": (GOOD, _changed(rows=0), 3, "at least one"),
    "nan": (GOOD, _changed(values=NOT_FINITE), 3, "got 3 .* in 2 of 60 rows"),
}


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("kind", BAD_SETS)
def test_every_probe_rejects_bad_sets(name: str, kind: str) -> None:
    train, test, classes, message = BAD_SETS[kind]
    with pytest.raises(ValueError, match=message):
        PROBES[name](train, test, num_classes=classes, seed=0, **SMALL[name])


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_judges_good_sets_the_same_twice(name: str) -> None:
    train, test = _set(), _set(seed=1)
    values = [PROBES[name](train, test, num_classes=3, seed=4, **SMALL[name]) for _ in range(2)]
    assert values[0] == values[1] and 0 <= values[0] <= 1


def test_knn_accepts_values_whose_sums_overflow() -> None:
    huge = FeatureSet(np.full((60, 5), 1e38, np.float32), _set().labels)
    assert 0 <= PROBES["knn"](huge, huge, num_classes=3, seed=0, k=3) <= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureSet(np.zeros((2, 3, 4), "f4"), np.zeros(2, "i4")), r"\[N, F\]"),
        (lambda: FeatureSet(np.zeros((2, 3), "f4"), np.zeros(3, "i4")), "one per row"),
        (lambda: pool(jnp.zeros((2, 3)), 9), r"\[B, h, w, c\]"),
        (lambda: pool(jnp.zeros((2, 3, 3, 1)), 0), "at least 1"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
