"""One train step from one state, for tests that compare meshes and placements."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.optimize import linear_sum_assignment

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.train_step import (
    StateWithFeatures,
    Step,
    TrainState,
    create_state,
    forward,
    state_shardings,
)
from nat_jax.training.host_matching import compile_step

N, B, D = 203, 32, 6  # 203 rows do not divide by 8 devices

NETWORKS = {
    "small": dict(widths=(4, 8), pools=2),
    "wide": dict(widths=(4, 8), pools=1, fc_width=8192),  # 128 x 8192: just large enough to split
}


class Outcome(NamedTuple):
    """The result of a step.

    Attributes:
        state: on the devices, after the step.
        params, assignment, metrics: on the host; the permutation without its padding.
        index: int32[B], the records of the batch.
        similarity: [B, B], cosines of features and the targets that the images owned; known for a
            step on one device.
    """

    state: TrainState
    params: Any
    assignment: np.ndarray
    metrics: dict[str, float]
    index: np.ndarray
    similarity: np.ndarray | None


def make_step(
    mesh: Mesh,
    *,
    network: str = "small",
    dtype: str = "float32",
    bn_groups: int = 1,
    solver: str = "scipy",  # the quickest to compile
    **settings: Any,
) -> Step:
    model = models.make_model(
        "convnet",
        dim=D,
        image_size=8,
        frontend="sobel",
        dtype=dtype,
        bn_groups=bn_groups,
        **NETWORKS[network],
    )
    return Step(model, optim.Optimizer(0.5, momentum=0.9), mesh, solver=solver, **settings)


def make_targets(step: Step, storage: str = "table") -> targets.Targets:
    where = sharding.over_data(step.mesh)
    return targets.make_targets("sphere", N, D, jax.random.key(7), storage=storage, sharding=where)[
        0
    ]


@functools.cache
def first_state(model: models.Model, optimizer: optim.Optimizer) -> TrainState:
    create = jax.jit(create_state, static_argnums=(0, 1))
    return create(model, optimizer, jnp.zeros(0, jnp.int32), jax.random.key(0))


def make_state(step: Step, features: np.ndarray | None = None) -> TrainState:
    """Return the same state on any mesh, its permutation the identity, with features [N, D]."""
    _, length = sharding.permutation_storage(step.storage, N, step.mesh)
    state = dataclasses.replace(
        first_state(step.model, step.optimizer), assignment=jnp.arange(length, dtype=jnp.int32)
    )
    if features is not None:
        padded = jnp.zeros((length, D), jnp.float16).at[:N].set(features)
        state = StateWithFeatures(**vars(state), features=padded)
    copied = jax.tree.map(jnp.copy, state)  # what is made from it is donated
    return jax.device_put(copied, state_shardings(step))


def make_batch(views: tuple[int, ...] = (), bad: Sequence[int] = ()) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    weight = np.ones(B, np.float32)
    weight[list(bad)] = 0
    return {
        "image": rng.integers(0, 256, (B, *views, 8, 8, 3), np.uint8),
        "index": rng.permutation(N)[:B].astype(np.int32),
        "weight": weight,
    }


def one_step(
    step: Step, storage: str = "table", views: tuple[int, ...] = (), bad: Sequence[int] = ()
) -> Outcome:
    """Run one re-matching step from the same state on any mesh; check that the state is donated."""
    noise, state, batch = make_targets(step, storage), make_state(step), make_batch(views, bad)
    similarity = _similarity(step, noise, state, batch) if step.mesh.size == 1 else None
    run = compile_step(step, reassign=True)
    after, metrics = run(state, noise, sharding.global_batch(batch, step.mesh))
    params, assignment, metrics = jax.device_get((after.params, after.assignment, metrics))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(np.sort(assignment), np.arange(len(assignment)))
    np.testing.assert_array_equal(assignment[N:], np.arange(N, len(assignment)))
    kept = batch["index"][batch["weight"] == 0]
    np.testing.assert_array_equal(assignment[kept], kept)
    return Outcome(after, params, assignment[:N], metrics, batch["index"], similarity)


def _similarity(
    step: Step, noise: targets.Targets, state: TrainState, batch: dict[str, np.ndarray]
) -> np.ndarray:
    features = jax.jit(lambda s, x: forward(step, s, x).features)(state, batch["image"])
    if features.ndim == 3:  # what is matched is the direction of the views' mean
        features = jnp.mean(features, axis=1)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
    similarity = np.array(features @ noise.gather(jnp.asarray(batch["index"])).T)
    good = batch["weight"] > 0
    similarity[~(np.eye(B, dtype=bool) | np.outer(good, good))] = -1e3
    return similarity


def make_features(without: Sequence[int] = ()) -> np.ndarray:
    """Return unit features float16[N, D], of nearby directions, 0 for the images without one."""
    features = np.random.default_rng(1).normal(0.3, size=(N, D))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[list(without)] = 0
    return features.astype(np.float16)


def margins(similarity: np.ndarray) -> np.ndarray:
    """Return, for each image, what the best matching without its pair loses."""
    i, best = linear_sum_assignment(similarity, maximize=True)
    total = similarity[i, best].sum()
    lost = np.empty(len(i))
    for row in i:
        without = similarity.copy()
        without[row, best[row]] = -1e4
        i2, other = linear_sum_assignment(without, maximize=True)
        lost[row] = total - without[i2, other].sum()
    return lost


def clear(outcome: Outcome, block: int | None = None) -> np.ndarray:
    """Return the records whose best row is no matter of rounding: by more than 1e-5."""
    assert outcome.similarity is not None
    size = block or B
    found = []
    for start in range(0, B, size):
        part = slice(start, start + size)
        found.append(outcome.index[part][margins(outcome.similarity[part, part]) > 1e-5])
    records = np.concatenate(found)
    assert len(records) > B // 2
    return records


def assert_agree(
    one: Outcome, other: Outcome, *, block: int | None = None, tolerance: float = 1e-5
) -> None:
    np.testing.assert_allclose(
        other.metrics["train/loss"], one.metrics["train/loss"], atol=tolerance
    )
    records = clear(one, block)
    np.testing.assert_array_equal(other.assignment[records], one.assignment[records])
    for left, right in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True):
        np.testing.assert_allclose(left, right, atol=10 * tolerance)
