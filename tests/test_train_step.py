import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state, forward, match, train_step, update
from nat_jax.training.host_matching import compile_step

N, B, D = 48, 16, 6


@pytest.fixture(scope="module")
def step() -> Step:
    model = models.make_model(
        "convnet", dim=D, image_size=8, frontend="sobel", widths=(4, 8), pools=2
    )
    return Step(model, optim.Optimizer(0.5, momentum=0.9), sharding.make_mesh())


@pytest.fixture(scope="module")
def noise() -> targets.Targets:
    return targets.make_targets("sphere", N, D, jax.random.key(7))[0]


@pytest.fixture(scope="module")
def state(step):
    create = jax.jit(create_state, static_argnums=(0, 1))
    return create(step.model, step.optimizer, jnp.arange(N, dtype=jnp.int32), jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (B, 8, 8, 3), np.uint8),
        "index": rng.permutation(N)[:B].astype(np.int32),
        "weight": np.ones(B, np.float32),
    }


MATCH = jax.jit(match, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def features_of(model, state, images):
    return forward(model, state, images).features


@functools.partial(jax.jit, static_argnums=(0, 1))
def updated(model, settings, state, images, chosen, weight):
    plain = dataclasses.replace(state, opt_state=optim.make_optimizer(settings).init(state.params))
    return update(settings, plain, forward(model, state, images), chosen, weight)


def matched(step, noise, state, batch, weight=None):
    """Return features, old rows and new rows of one match."""
    features = features_of(step.model, state, batch["image"])
    rows = state.assignment[batch["index"]]
    weight = batch["weight"] if weight is None else weight
    new_rows, metrics = MATCH(step, features, noise.gather(rows), rows, weight)
    return np.asarray(features), np.asarray(rows), np.asarray(new_rows), metrics


def test_match_finds_the_optimal_assignment(step, noise, state, batch):
    z, rows, new_rows, metrics = matched(step, noise, state, batch)
    similarity = z @ np.asarray(noise.gather(rows)).T
    i, j = linear_sum_assignment(similarity, maximize=True)
    best = similarity[i, j].mean()
    reached = np.sum(z * np.asarray(noise.gather(new_rows)), axis=1).mean()
    np.testing.assert_allclose(reached, best, atol=1e-5)
    np.testing.assert_allclose(metrics["assign/cosine_after"], reached, atol=1e-5)
    before = np.diag(similarity).mean()
    np.testing.assert_allclose(metrics["assign/cosine_before"], before, atol=1e-5)
    assert reached > metrics["assign/cosine_before"] + 0.1
    np.testing.assert_allclose(metrics["assign/moved"], np.mean(new_rows != rows))


def test_match_within_blocks_stays_within_blocks(step, noise, state, batch):
    blocked = dataclasses.replace(step, block=4)
    _, rows, new_rows, _ = matched(blocked, noise, state, batch)
    for old, new in zip(rows.reshape(-1, 4), new_rows.reshape(-1, 4), strict=True):
        assert set(old) == set(new)
    _, _, whole, _ = matched(step, noise, state, batch)
    assert any(
        set(old) != set(new)
        for old, new in zip(rows.reshape(-1, 4), whole.reshape(-1, 4), strict=True)
    )


def test_a_bad_record_keeps_its_row(step, noise, state, batch):
    weight = batch["weight"].copy()
    weight[[2, 11]] = 0
    _, rows, new_rows, _ = matched(step, noise, state, batch, weight)
    assert new_rows[2] == rows[2] and new_rows[11] == rows[11]
    assert sorted(new_rows) == sorted(rows)
    _, _, freely, _ = matched(step, noise, state, batch)
    assert freely[2] != rows[2] or freely[11] != rows[11]


def test_gradient_of_the_split_step_equals_that_of_the_whole_loss(step, noise, state, batch):
    rows = state.assignment[batch["index"]]
    chosen = noise.gather(rows)
    settings = optim.Optimizer(1.0)
    new_state, metrics = updated(
        step.model, settings, state, batch["image"], chosen, batch["weight"]
    )

    def loss(params):
        outputs, _ = step.model.apply(params, state.batch_stats, batch["image"], train=True)
        return 0.5 * jnp.mean(jnp.sum((outputs["z"] - chosen) ** 2, axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
    np.testing.assert_allclose(metrics["train/loss"], value, rtol=1e-6)
    for before, after, slope in zip(
        *map(jax.tree.leaves, (state.params, new_state.params, gradient)), strict=True
    ):
        np.testing.assert_allclose(after, before - slope, rtol=1e-4, atol=1e-6)


def test_views_of_an_image_share_a_row_by_their_mean_direction(step, noise, state, batch):
    rng = np.random.default_rng(1)
    images = np.stack([batch["image"], rng.integers(0, 256, batch["image"].shape, np.uint8)], 1)
    features = features_of(step.model, state, images)
    assert features.shape == (B, 2, D)
    np.testing.assert_allclose(jnp.linalg.norm(features, axis=-1), 1, atol=1e-5)
    rows = state.assignment[batch["index"]]
    new_rows, metrics = MATCH(step, features, noise.gather(rows), rows, batch["weight"])
    mean = np.asarray(features).mean(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    similarity = mean @ np.asarray(noise.gather(rows)).T
    i, j = linear_sum_assignment(similarity, maximize=True)
    np.testing.assert_allclose(metrics["assign/cosine_after"], similarity[i, j].mean(), atol=1e-5)
    assert sorted(new_rows) == sorted(rows)
    for view in range(2):  # neither view alone decides
        alone = np.asarray(features)[:, view] @ np.asarray(noise.gather(rows)).T
        k, m = linear_sum_assignment(alone, maximize=True)
        assert alone[k, m].mean() != pytest.approx(similarity[i, j].mean(), abs=1e-4)


def test_every_view_is_pulled_to_the_row(step, noise, state, batch):
    rng = np.random.default_rng(1)
    images = np.stack([batch["image"], rng.integers(0, 256, batch["image"].shape, np.uint8)], 1)
    chosen = noise.gather(state.assignment[batch["index"]])
    settings = optim.Optimizer(1.0)
    new_state, metrics = updated(step.model, settings, state, images, chosen, batch["weight"])

    def loss(params, flat):
        outputs, _ = step.model.apply(params, state.batch_stats, flat, train=True)
        each = jnp.sum((outputs["z"] - jnp.repeat(chosen, 2, axis=0)) ** 2, axis=-1)
        return 0.5 * jnp.mean(each)

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params, images.reshape(-1, 8, 8, 3))
    np.testing.assert_allclose(metrics["train/loss"], value, rtol=1e-6)
    for before, after, slope in zip(
        *map(jax.tree.leaves, (state.params, new_state.params, gradient)), strict=True
    ):
        np.testing.assert_allclose(after, before - slope, rtol=1e-4, atol=1e-6)


def test_two_equal_views_are_as_good_as_one(step, noise, state, batch):
    run = jax.jit(functools.partial(train_step, step, reassign=True))
    twice = {**batch, "image": np.stack([batch["image"]] * 2, axis=1)}
    one, _ = run(state, noise, batch)
    two, _ = run(state, noise, twice)
    np.testing.assert_array_equal(one.assignment, two.assignment)
    for left, right in zip(*map(jax.tree.leaves, (one.params, two.params)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_rows_are_written_back_only_when_re_matching(step, noise, state, batch):
    run = functools.partial(train_step, step)
    same, plain = jax.jit(functools.partial(run, reassign=False))(state, noise, batch)
    moved, metrics = jax.jit(functools.partial(run, reassign=True))(state, noise, batch)
    np.testing.assert_array_equal(same.assignment, state.assignment)
    assert "assign/moved" not in plain and metrics["assign/moved"] > 0
    assert not np.array_equal(moved.assignment, state.assignment)
    np.testing.assert_array_equal(np.sort(moved.assignment), np.arange(N))
    outside = np.setdiff1d(np.arange(N), batch["index"])
    np.testing.assert_array_equal(np.asarray(moved.assignment)[outside], outside)
    assert metrics["train/loss"] < plain["train/loss"]


def test_training_on_one_batch_reaches_its_targets(step, noise, state, batch):
    compiled = compile_step(step, reassign=False)
    losses = []
    state = jax.tree.map(jnp.copy, state)
    for _ in range(60):
        state, metrics = compiled(state, noise, batch)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.1 * losses[0]
    assert int(state.step) == 60


def test_spread_measures_collapse(step, noise, state, batch):
    _, _, _, metrics = matched(step, noise, state, batch)
    assert 1 <= metrics["features/effective_rank"] <= D
    z = jnp.tile(jnp.eye(D)[:1], (B, 1))
    rows = jnp.arange(B, dtype=jnp.int32)
    _, collapsed = MATCH(step, z, noise.gather(rows), rows, jnp.ones(B))
    np.testing.assert_allclose(collapsed["features/effective_rank"], 1, rtol=1e-5)
    np.testing.assert_allclose(collapsed["features/uniformity"], 0, atol=1e-5)
    spread = jnp.concatenate([jnp.eye(D), -jnp.eye(D)])[:B]
    rows = jnp.arange(len(spread), dtype=jnp.int32)
    _, uniform = MATCH(step, spread, noise.gather(rows), rows, jnp.ones(len(spread)))
    np.testing.assert_allclose(uniform["features/effective_rank"], D, rtol=1e-5)


@pytest.mark.slow
def test_the_largest_gradient_is_kept_once(noise, monkeypatch):
    """The norm is taken before the update overwrites it; nothing says so where both just read."""
    network = models.make_model(
        "convnet", dim=D, image_size=16, frontend="rgb", widths=(4, 16), pools=1, fc_width=2048
    )
    step = Step(network, optim.Optimizer(0.1), sharding.make_mesh())
    create = functools.partial(create_state, network, step.optimizer)
    state = jax.eval_shape(lambda: create(jnp.arange(N, dtype=jnp.int32), jax.random.key(0)))
    shapes = {"image": (B, 16, 16, 3), "index": (B,), "weight": (B,)}
    types = {"image": np.uint8, "index": np.int32, "weight": np.float32}
    batch = {k: jax.ShapeDtypeStruct(shapes[k], types[k]) for k in shapes}

    def temporary(name: str) -> float:
        def plain(*arguments):
            return train_step(step, *arguments, reassign=False)

        plain.__name__ = name  # or what is compiled for one would serve the other
        compiled = jax.jit(plain, donate_argnums=0).lower(state, noise, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    (largest,) = [leaf.size for leaf in jax.tree.leaves(state.params) if leaf.size >= 2**20]
    assert temporary("measured") < 1.5 * 4 * largest
    monkeypatch.setattr(optim, "measured", lambda gradient: (gradient, optax.tree.norm(gradient)))
    assert temporary("only_read") > 2 * 4 * largest


def test_equal_settings_compile_once(step):
    assert compile_step(dataclasses.replace(step), reassign=True) is compile_step(
        step, reassign=True
    )
