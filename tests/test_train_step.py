"""One train step on one device: matching, gradient, and what is written back."""

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
from nat_jax.train_step import (
    Step,
    apply_matching,
    build_costs,
    create_state,
    feature_diversity,
    forward,
    solve_sharded,
    train_step,
    update,
)
from nat_jax.training.host_matching import compile_step

N, B, D = 48, 16, 6


@pytest.fixture(scope="module")
def step() -> Step:
    model = models.make_model(
        "convnet", dim=D, image_size=8, frontend="sobel", widths=(4, 8), pools=2
    )
    optimizer = optim.Optimizer(0.5, momentum=0.9)
    return Step(model, optimizer, sharding.make_mesh(), solver="scipy")  # the quickest to compile


@pytest.fixture(scope="module")
def noise() -> targets.Targets:
    return targets.make_targets("sphere", N, D, jax.random.key(7))[0]


@pytest.fixture(scope="module")
def table(noise) -> np.ndarray:
    return np.asarray(noise.rows)


@pytest.fixture(scope="module")
def state(step):
    create = jax.jit(create_state, static_argnums=(0, 1))
    return create(step.model, step.optimizer, np.arange(N, dtype=np.int32), jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (B, 8, 8, 3), np.uint8),
        "index": rng.permutation(N)[:B].astype(np.int32),
        "weight": np.ones(B, np.float32),
    }


@pytest.fixture(scope="module")
def two_views(batch) -> dict[str, np.ndarray]:
    other = np.random.default_rng(1).integers(0, 256, batch["image"].shape, np.uint8)
    return batch | {"image": np.stack([batch["image"], other], axis=1)}


@functools.partial(jax.jit, static_argnums=0)
def match(step, state, noise, batch):
    """Return features, new rows and metrics."""
    features = forward(step, state, batch["image"]).features
    rows = state.assignment[batch["index"]]
    cost = build_costs(step, features, noise.gather(rows), batch["weight"])
    new_rows, metrics = apply_matching(step, features, rows, cost, solve_sharded(step, cost))
    return features, new_rows, metrics


def matched(step, state, noise, batch):
    """Return features, old rows, which the identity as first assignment gives, and new ones."""
    features, new_rows, metrics = jax.device_get(match(step, state, noise, batch))
    return features, batch["index"], new_rows, metrics


@jax.jit
def copied(state):
    """Return a state that may be donated."""
    return jax.tree.map(jnp.copy, state)


def stepped(step, state, noise, batch, *, reassign):
    return compile_step(step, reassign=reassign)(copied(state), noise, batch)


def test_match_finds_the_optimal_assignment(step, noise, table, state, batch):
    z, rows, new_rows, metrics = matched(step, state, noise, batch)
    similarity = z @ table[rows].T
    i, j = linear_sum_assignment(similarity, maximize=True)
    reached = np.sum(z * table[new_rows], axis=1).mean()
    np.testing.assert_allclose(reached, similarity[i, j].mean(), atol=1e-5)
    np.testing.assert_allclose(metrics["assign/cosine_after"], reached, atol=1e-5)
    before = np.diag(similarity).mean()
    np.testing.assert_allclose(metrics["assign/cosine_before"], before, atol=1e-5)
    assert reached > metrics["assign/cosine_before"] + 0.1
    np.testing.assert_allclose(metrics["assign/moved"], np.mean(new_rows != rows))


def test_match_within_blocks_stays_within_blocks(step, noise, state, batch):
    blocked = dataclasses.replace(step, block=4)
    _, rows, new_rows, _ = matched(blocked, state, noise, batch)
    for old, new in zip(rows.reshape(-1, 4), new_rows.reshape(-1, 4), strict=True):
        assert set(old) == set(new)
    _, _, whole, _ = matched(step, state, noise, batch)
    assert any(
        set(old) != set(new)
        for old, new in zip(rows.reshape(-1, 4), whole.reshape(-1, 4), strict=True)
    )


def test_a_bad_record_keeps_its_row(step, noise, state, batch):
    weight = batch["weight"].copy()
    weight[[2, 11]] = 0
    _, rows, new_rows, _ = matched(step, state, noise, batch | {"weight": weight})
    assert new_rows[2] == rows[2] and new_rows[11] == rows[11]
    assert sorted(new_rows) == sorted(rows)
    _, _, freely, _ = matched(step, state, noise, batch)
    assert freely[2] != rows[2] or freely[11] != rows[11]


def test_views_of_an_image_share_a_row_by_their_mean_direction(
    step, noise, table, state, two_views
):
    features, rows, new_rows, metrics = matched(step, state, noise, two_views)
    assert features.shape == (B, 2, D)
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
    mean = features.mean(1)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    similarity = mean @ table[rows].T
    i, j = linear_sum_assignment(similarity, maximize=True)
    np.testing.assert_allclose(metrics["assign/cosine_after"], similarity[i, j].mean(), atol=1e-5)
    assert sorted(new_rows) == sorted(rows)
    for view in range(2):  # neither view alone decides
        alone = features[:, view] @ table[rows].T
        k, m = linear_sum_assignment(alone, maximize=True)
        assert alone[k, m].mean() != pytest.approx(similarity[i, j].mean(), abs=1e-4)


@functools.partial(jax.jit, static_argnums=0)
def updated(step, state, images, chosen, weight):
    """Take a step of plain SGD at learning rate 1."""
    plain = dataclasses.replace(step, optimizer=optim.Optimizer(1.0))
    opt_state = optim.make_optimizer(plain.optimizer).init(state.params)
    state = dataclasses.replace(state, opt_state=opt_state)
    return update(plain, state, forward(plain, state, images), chosen, weight)


@pytest.mark.parametrize("views", [1, 2])
def test_an_update_follows_the_gradient_of_the_loss(step, table, state, batch, two_views, views):
    images = (batch if views == 1 else two_views)["image"]
    chosen = table[batch["index"]]
    new_state, metrics = updated(step, state, images, chosen, batch["weight"])

    def loss(params, flat):
        outputs, _ = step.model.apply(params, state.batch_stats, flat, train=True)
        each = jnp.sum((outputs["z"] - jnp.repeat(chosen, views, axis=0)) ** 2, axis=-1)
        return 0.5 * jnp.mean(each)

    value, gradient = jax.jit(jax.value_and_grad(loss))(state.params, images.reshape(-1, 8, 8, 3))
    gradient = jax.device_get(gradient)
    np.testing.assert_allclose(metrics["train/loss"], value, rtol=1e-6)
    for before, after, slope in zip(
        *map(jax.tree.leaves, (state.params, new_state.params, gradient)), strict=True
    ):
        np.testing.assert_allclose(after, np.asarray(before) - slope, rtol=1e-4, atol=1e-6)


def test_two_equal_views_are_as_good_as_one(step, noise, state, batch):
    twice = {**batch, "image": np.stack([batch["image"]] * 2, axis=1)}
    one, _ = stepped(step, state, noise, batch, reassign=True)
    two, _ = stepped(step, state, noise, twice, reassign=True)
    np.testing.assert_array_equal(one.assignment, two.assignment)
    for left, right in zip(*map(jax.tree.leaves, (one.params, two.params)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)


def test_rows_are_written_back_only_when_reassigning(step, noise, state, batch):
    same, plain = stepped(step, state, noise, batch, reassign=False)
    moved, metrics = stepped(step, state, noise, batch, reassign=True)
    np.testing.assert_array_equal(same.assignment, state.assignment)
    assert "assign/moved" not in plain and float(metrics["assign/moved"]) > 0
    assert not np.array_equal(moved.assignment, state.assignment)
    np.testing.assert_array_equal(np.sort(moved.assignment), np.arange(N))
    outside = np.setdiff1d(np.arange(N), batch["index"])
    np.testing.assert_array_equal(np.asarray(moved.assignment)[outside], outside)
    assert float(metrics["train/loss"]) < float(plain["train/loss"])


def test_training_on_one_batch_reaches_its_targets(step, noise, state, batch):
    compiled = compile_step(step, reassign=False)
    losses = []
    state = copied(state)
    for _ in range(60):
        state, metrics = compiled(state, noise, batch)
        losses.append(float(metrics["train/loss"]))
    assert losses[-1] < 0.1 * losses[0]
    assert int(state.step) == 60


def test_feature_diversity_measures_collapse():
    random = np.random.default_rng(0).normal(size=(2 * D, D)).astype(np.float32)
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    collapsed = np.tile(np.eye(D, dtype=np.float32)[:1], (2 * D, 1))
    even = np.concatenate([np.eye(D), -np.eye(D)]).astype(np.float32)
    found = jax.jit(feature_diversity)(np.stack([random, collapsed, even]))
    ranks, uniformity = found["features/effective_rank"], found["features/uniformity"]
    assert 1 < ranks[0] < D
    np.testing.assert_allclose(ranks[1:], [1, D], rtol=1e-5)
    np.testing.assert_allclose(uniformity[1], 0, atol=1e-5)
    assert uniformity[2] < uniformity[0] < 0
    assert feature_diversity(even[:, None]).keys() == {"features/effective_rank"}  # no pairs


@pytest.mark.slow
def test_the_largest_gradient_is_kept_once(noise, monkeypatch):
    """The norm comes before the update, which overwrites it; two mere readers have no order."""
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

    def only_read(gradient):
        return gradient, optax.tree.norm(gradient)

    monkeypatch.setattr(optim, "gradient_and_norm", only_read)
    assert temporary("only_read") > 2 * 4 * largest


def test_equal_settings_compile_once(step):
    assert compile_step(dataclasses.replace(step), reassign=True) is compile_step(
        step, reassign=True
    )
