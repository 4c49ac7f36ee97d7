"""Matching of all images: better than in batches, and what has no feature keeps its row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import B, D, N, make_batch, make_features, make_step, make_targets
from scipy.optimize import linear_sum_assignment

from nat_jax.runtime import sharding
from nat_jax.train_step import StateWithFeatures, keep_features
from nat_jax.training import dataset_matching

WITHOUT = (5, 17)


def with_features(features):
    """Return a state without a network."""
    rows = jnp.arange(N, dtype=jnp.int32)
    key = jax.random.key(0)
    return StateWithFeatures({}, {}, (), jnp.int32(0), key, rows, jnp.asarray(features))


def match(features, **options):
    step = make_step(
        sharding.make_mesh(1, 1), scope="dataset", solver_options=tuple(options.items())
    )
    state = with_features(features)
    return dataset_matching.match_all(step, state, make_targets(step), N, seed=0)


def test_the_matching_is_that_of_all_images(monkeypatch):
    features = make_features(WITHOUT)
    state, metrics = match(features)
    rows = np.asarray(state.assignment)
    np.testing.assert_array_equal(np.sort(rows), np.arange(N))
    np.testing.assert_array_equal(rows[list(WITHOUT)], WITHOUT)

    exact = features.astype(np.float64)
    length = np.linalg.norm(exact, axis=1, keepdims=True)
    noise = make_targets(make_step(sharding.make_mesh(1, 1))).gather(np.arange(N))
    cosine = exact / np.maximum(length, 1e-9) @ np.asarray(noise, np.float64).T
    some = np.delete(np.arange(N), WITHOUT)
    best = linear_sum_assignment(cosine[np.ix_(some, some)], maximize=True)
    optimum = cosine[np.ix_(some, some)][best].mean()
    blocks = [linear_sum_assignment(cosine[np.ix_(b, b)], maximize=True) for b in parts(some)]
    in_blocks = np.concatenate(
        [cosine[np.ix_(b, b)][pairs] for b, pairs in zip(parts(some), blocks, strict=True)]
    ).mean()
    assert metrics["assign/cosine_before"] == pytest.approx(cosine[some, some].mean(), abs=1e-5)
    assert metrics["assign/cosine_after"] == pytest.approx(optimum, abs=1e-5)
    assert metrics["assign/cosine_after"] == pytest.approx(
        cosine[some, rows[some]].mean(), abs=1e-5
    )
    assert metrics["assign/cosine_after"] > in_blocks + 0.02
    assert metrics["assign/moved"] == pytest.approx(np.mean(rows[some] != some))
    moment = exact.T @ exact
    rank = np.trace(moment) ** 2 / np.square(moment).sum()
    assert metrics["features/effective_rank"] == pytest.approx(rank, rel=1e-3)

    monkeypatch.setattr(dataset_matching, "_CHUNK", 30 * D)  # read in parts
    np.testing.assert_array_equal(match(features)[0].assignment, rows)


def parts(images):
    return np.array_split(images, len(images) // B)


def test_no_pass_or_no_features_move_nothing():
    for features, options in ((make_features(), dict(budget=0)), (make_features(range(N)), {})):
        state, metrics = match(features, **options)
        np.testing.assert_array_equal(state.assignment, np.arange(N))
        assert metrics.get("assign/moved", 0) == 0


def test_the_newest_feature_of_each_image_is_kept():
    """Of two views their mean direction; of a record of weight 0 the older one."""
    old, batch = make_features(WITHOUT), make_batch(bad=(1,))
    views = np.stack([make_features()[:B], make_features()[B : 2 * B]], axis=1).astype(np.float32)
    on_device = jax.tree.map(jnp.asarray, batch)
    kept = keep_features(with_features(old), on_device, jnp.asarray(views)).features
    assert kept.dtype == np.float16
    mean = views.mean(axis=1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    expected, good = old.copy(), batch["weight"] > 0
    expected[batch["index"][good]] = mean[good]
    np.testing.assert_allclose(np.asarray(kept, np.float32), expected, atol=1e-3)
    assert not np.allclose(expected[batch["index"][1]], mean[1], atol=1e-2)
