"""A batch of problems spread over devices: each solves its part, and the results do not change."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import differences, stack
from programs import collectives, collectives_in_loops, compiled

from nat_jax import assign
from nat_jax.assign import Assignment, _auction, _points

N = 7
BATCH = P("batch")


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("batch",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def costs() -> np.ndarray:
    """One problem of every kind, the bad ones among them; the first few twice, to divide by 8."""
    _, costs = stack(N, N)
    return np.concatenate([costs, costs[: -len(costs) % 8]])


@pytest.fixture(scope="module")
def spread(costs: np.ndarray) -> jax.Array:
    return jax.device_put(costs, NamedSharding(mesh(), BATCH))


def on_each(solve):
    """Let each device solve its part of the batch."""
    # The results of `cond` and of callbacks are not known to vary over the mesh.
    return jax.shard_map(solve, mesh=mesh(), in_specs=BATCH, out_specs=BATCH, check_vma=False)


def all_differences(once: Assignment, again: Assignment) -> list:
    return differences(jax.device_get(once), jax.device_get(again))


@pytest.fixture(scope="module")
def alone(costs: np.ndarray) -> Assignment:
    """The results of one device."""
    return compiled(jax.jit(assign.auction), costs)(costs)


def test_jit_of_a_spread_batch(alone: Assignment, spread: jax.Array) -> None:
    program = compiled(jax.jit(assign.auction), spread)
    assert all_differences(alone, program(spread)) == []
    # On the CPU problems are solved in turn, by every device: the batch is gathered, beforehand.
    text = program.as_text()
    assert collectives(text)
    assert collectives_in_loops(text) == 0


def test_each_device_solves_its_part(alone: Assignment, spread: jax.Array) -> None:
    program = compiled(jax.jit(on_each(assign.auction)), spread)
    result = program(spread)
    assert all_differences(alone, result) == []
    assert result.col4row.sharding.spec == BATCH
    text = program.as_text()
    assert "while(" in text
    assert not collectives(text)


def side_by_side(costs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solve as on accelerators, where one loop goes on until the slowest problem ends."""
    solve = partial(_auction._solve_one, maximize=False, exchanged=False, kernel=False)
    solved = jax.vmap(solve, (0, None, None))(costs, jnp.float32(0), jnp.int32(1000))
    return solved.col4row, solved.rounds


def test_side_by_side_no_device_waits_for_another(alone: Assignment, spread: jax.Array) -> None:
    program = compiled(jax.jit(on_each(side_by_side)), spread)
    col4row, rounds = program(spread)
    np.testing.assert_array_equal(col4row, alone.col4row)
    np.testing.assert_array_equal(rounds, alone.rounds)
    assert len(set(np.asarray(rounds).tolist())) > 1
    assert collectives_in_loops(program.as_text()) == 0


def test_without_shard_map_every_round_would_wait(spread: jax.Array) -> None:
    """One loop for all devices asks in its condition whether any has work left."""
    assert collectives_in_loops(compiled(jax.jit(side_by_side), spread).as_text())


def test_a_difference_would_be_noticed(alone: Assignment, costs: np.ndarray) -> None:
    other = compiled(jax.jit(assign.auction), costs)(np.roll(costs, 1, axis=0))
    assert all_differences(alone, other)


def test_points_are_matched_alike_on_any_number_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_points, "_WIDE", 20)
    monkeypatch.setattr(_points, "_BLOCK", N)
    x, y = np.random.default_rng(0).normal(size=(2, 61, 3))
    one, all_of_them, other = (
        assign.match_points(x, y, devices=jax.devices()[:number], seed=seed)
        for number, seed in ((1, 0), (8, 0), (8, 1))
    )
    np.testing.assert_array_equal(one.col4row, all_of_them.col4row)
    np.testing.assert_array_equal(one.prices, all_of_them.prices)
    assert not np.array_equal(one.col4row, other.col4row)
