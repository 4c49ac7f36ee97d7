"""Targets over many devices: nothing of N x D elements, and never the whole table anywhere."""

import math
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.targets import SphereTable, Targets
from nat_jax.train_step import Step, create_state, state_shardings
from nat_jax.training.host_matching import compile_step

N, B, D = 4 * sharding.PERMUTATION_UNIT, 64, 16  # 1.7 million: larger than all else in the step
KEY = jax.random.key(7)
SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


def mesh() -> Mesh:
    return sharding.make_mesh()


def sizes(program: str) -> Iterator[tuple[int, ...]]:
    """Yield the shape of every array that a compiled program mentions."""
    for dimensions in SHAPE.findall(program):
        yield tuple(map(int, filter(None, dimensions.split(","))))


def largest(program: str) -> int:
    return max(math.prod(shape) for shape in sizes(program))


def step_program(noise: Targets, *, reassign: bool) -> str:
    """Compile a step on N images whose permutation is sharded over the devices."""
    model = models.make_model(
        "convnet", dim=D, image_size=8, frontend="sobel", widths=(4, 8), pools=2
    )
    step = Step(model, optim.Optimizer(0.5), mesh(), solver="scipy", block=8, storage="sharded")
    state = jax.eval_shape(
        lambda: create_state(model, step.optimizer, jnp.zeros(N, jnp.int32), jax.random.key(0))
    )
    state = sharding.abstract(state, state_shardings(step))
    batch = {
        "image": jax.ShapeDtypeStruct((B, 8, 8, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((B,), np.int32),
        "weight": jax.ShapeDtypeStruct((B,), np.float32),
    }
    batch = sharding.abstract(batch, sharding.of_batch(step.mesh))
    lowered = compile_step(step, reassign=reassign).lower(state, noise, batch)
    return lowered.compile({"xla_backend_optimization_level": 0}).as_text()


def table() -> SphereTable:
    return SphereTable(
        jax.ShapeDtypeStruct((N, D), np.float32, sharding=sharding.over_data(mesh()))
    )


@pytest.mark.parametrize("reassign", [False, True])
@pytest.mark.parametrize("kind", ["sphere", "basis"])
def test_virtual_rows_leave_nothing_as_large_as_the_data_set(kind: str, reassign: bool) -> None:
    noise, _ = targets.make_targets(kind, N, D, KEY, storage="virtual")
    assert largest(step_program(noise, reassign=reassign)) == N // 8  # a share of the permutation


@pytest.mark.parametrize("reassign", [False, True])
def test_a_table_stays_in_its_shares(reassign: bool) -> None:
    program = step_program(table(), reassign=reassign)
    assert largest(program) == N // 8 * D
    large = {shape for shape in sizes(program) if math.prod(shape) >= N // 8}
    assert large == {(N // 8,), (N // 8, D)}


class Gathered(SphereTable):
    """A table that is brought together before rows are looked up."""

    def gather(self, rows: jax.Array) -> jax.Array:
        everywhere = sharding.replicated(mesh())
        return jax.lax.with_sharding_constraint(self.rows, everywhere)[rows]


jax.tree_util.register_dataclass(Gathered, ["rows"], [])


def test_a_table_that_comes_together_would_be_seen() -> None:
    assert largest(step_program(Gathered(table().rows), reassign=False)) == N * D


@pytest.mark.slow  # these run with all optimisations, which the ulp are about
def test_shares_and_virtual_rows_are_equal_to_two_ulp() -> None:
    split = sharding.over_data(mesh())
    held, _ = targets.make_targets("sphere", 1003, 24, KEY, storage="table", sharding=split)
    assert held.rows.shape == (1008, 24) and held.rows.sharding == split
    virtual, _ = targets.make_targets("sphere", 1003, 24, KEY, storage="virtual")
    rows = jax.device_put(np.random.default_rng(0).permutation(1000).astype(np.int32), split)
    one, other = (jax.jit(noise.gather)(rows) for noise in (held, virtual))
    np.testing.assert_array_max_ulp(np.asarray(one), np.asarray(other), maxulp=2)
    alone, _ = targets.make_targets("sphere", 1003, 24, KEY, storage="table")
    np.testing.assert_array_max_ulp(np.asarray(one), alone.rows[np.asarray(rows)], maxulp=2)


def test_each_device_computes_its_own_share_of_a_table() -> None:
    split = sharding.over_data(mesh())
    build = jax.jit(lambda key: targets._build_table(key, N, D, split))
    memory = build.lower(KEY).compile().memory_analysis()
    assert memory.output_size_in_bytes == N // 8 * D * 4
    assert memory.temp_size_in_bytes < N * D * 4 / 2
