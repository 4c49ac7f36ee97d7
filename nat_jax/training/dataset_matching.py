"""Matching of all images between epochs, by the newest feature of each (``assign.scope``).

The steps keep the features (``train_step.keep_features``). The state at the end of an epoch is
saved before the matching, which is a function of it: a run that is stopped there matches again.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nat_jax.assign import match_points
from nat_jax.runtime import sharding
from nat_jax.targets import Targets
from nat_jax.train_step import StateWithFeatures, Step

# Metric: seconds that reading, matching and writing took.
SECONDS = "time/match_seconds"

# Numbers that are read from the devices at a time, of features and of targets.
_CHUNK = 2**24


class Matched(NamedTuple):
    """The state with its new assignment, and metrics; those of the result in process 0 only."""

    state: StateWithFeatures
    metrics: dict[str, float]


def match_all(
    step: Step, state: StateWithFeatures, targets: Targets, num_records: int, *, seed: int
) -> Matched:
    """Improve the assignment of all images that have a feature; the others keep their rows.

    All processes must call this. The first one matches, on its own devices. Besides what
    ``match_points`` needs, features and targets of all images are in its memory, 6 D bytes each.

    Args:
        step: mesh, and arguments of ``match_points``.
        state: the current state.
        targets: the target rows.
        num_records: N.
        seed: of ``match_points``.
    """
    start = time.perf_counter()
    rows = np.empty(num_records, np.int32)
    lead = jax.process_index() == 0
    number = num_records if lead else 0
    features = np.empty((number, step.model.dim), np.float16)
    goals = np.empty(features.shape, np.float32)
    size = min(num_records, max(1, _CHUNK // step.model.dim))
    for begin in range(0, num_records, size):
        part = slice(begin, min(begin + size, num_records))
        images = np.minimum(np.arange(begin, begin + size, dtype=np.int32), num_records - 1)
        chunk = _read(step.mesh)(state.assignment, state.features, targets, images)
        count = part.stop - begin
        rows[part] = chunk[0].addressable_data(0)[:count]
        if lead:
            features[part] = chunk[1].addressable_data(0)[:count]
            goals[part] = chunk[2].addressable_data(0)[:count]
    metrics = {"features/effective_rank": float(_effective_rank(step.mesh)(state.features))}
    present = np.flatnonzero(features.any(axis=1))
    if len(present):
        x, y = features[present], goals[present]
        devices = sharding.standalone_devices(jax.local_devices(), jax.process_count())
        match = functools.partial(match_points, x, y, seed=seed, devices=devices)
        before, after = match(budget=0), match(**dict(step.solver_options))
        new = rows[present][np.asarray(after.col4row)]
        metrics |= {
            "assign/cosine_before": 1 - before.cost,
            "assign/cosine_after": 1 - after.cost,
            "assign/moved": float(np.mean(new != rows[present])),
        }
        rows[present] = new
    if jax.process_count() > 1:
        rows = np.asarray(multihost_utils.broadcast_one_to_all(rows))
    padding = np.arange(num_records, len(state.assignment), dtype=np.int32)
    full = np.concatenate([rows, padding])
    assignment = jax.make_array_from_callback(
        full.shape, state.assignment.sharding, lambda place: full[place]
    )
    metrics[SECONDS] = time.perf_counter() - start
    return Matched(dataclasses.replace(state, assignment=assignment), metrics)


@functools.cache
def _read(mesh: Mesh) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """Return a function of (assignment, features, targets, images) to what each image has."""

    def read(
        assignment: jax.Array, features: jax.Array, targets: Targets, images: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = assignment[images]
        return rows, features[images], targets.gather(rows)

    return jax.jit(read, out_shardings=sharding.replicated(mesh))


@functools.cache
def _effective_rank(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    """Return a function of features to their ``train_step.feature_diversity``, of any number."""

    def effective_rank(features: jax.Array) -> jax.Array:
        moment = jnp.einsum("nd,ne->de", features, features, preferred_element_type=jnp.float32)
        return jnp.trace(moment) ** 2 / jnp.sum(jnp.square(moment))

    return jax.jit(effective_rank, out_shardings=sharding.replicated(mesh))
