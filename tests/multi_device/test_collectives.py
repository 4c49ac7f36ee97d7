"""What a step's devices send each other is what is known, and anything new is seen."""

import dataclasses
from collections.abc import Callable

import collectives_read as reading
import jax
import jax.numpy as jnp
import pytest
from collectives import Problem, compile_all, problem
from collectives_read import read
from one_step import D, make_step
from programs import FAST, B, N

from nat_jax import targets
from nat_jax.runtime import sharding
from nat_jax.train_step import state_shardings, train_step

OTHERS = (reading.FEATURES, reading.INTEGERS, reading.WEIGHTS, reading.SOLUTION)


def given(**settings) -> Problem:
    step = make_step(sharding.make_mesh(), **settings)
    noise, _ = targets.make_targets("sphere", N, D, jax.random.key(7), storage="virtual")
    return problem(step, noise, records=N, batch=B)


def exchanged(problem: Problem, *, reassign: bool) -> tuple[list[str], dict[str, int]]:
    """Compile a step; return its faults, and how many arrays of each sort it exchanges."""
    compiled = compile_all(problem, reassign=reassign, options=FAST)
    programs = [each.program.as_text() for each in compiled]
    found = [each for program in programs for each in read(program, problem.sizes)]
    faults = problem.sizes.faults(
        found,
        reassign=reassign,
        sharded=problem.step.storage == "sharded",
        halves=len(programs) > 1,
    )
    parts = [part.carries for each in found for part in each.parts]
    assert sum(map(reading.in_loops, programs)) == 0
    return faults, {name: parts.count(name) for name in OTHERS if name in parts}


@pytest.mark.parametrize(
    ("settings", "reassign", "expected"),
    [
        # One block over eight devices: features and targets come together, and all assign the rows.
        (dict(), False, {}),
        (dict(), True, {reading.FEATURES: 2, reading.INTEGERS: 2, reading.WEIGHTS: 1}),
        # A block on each device: the permutation, which all have, gets all rows.
        (dict(block=4), False, {}),
        (dict(block=4), True, {reading.INTEGERS: 2}),
        # Where each has a share of the permutation, it is asked for rows as well.
        (dict(block=4, storage="sharded"), False, {reading.INTEGERS: 2}),
        (dict(block=4, storage="sharded"), True, {reading.INTEGERS: 4}),
        (dict(block=4, placement="host"), True, {reading.INTEGERS: 2, reading.SOLUTION: 1}),
    ],
)
def test_a_step_exchanges_what_is_known(settings: dict, reassign: bool, expected: dict) -> None:
    faults, others = exchanged(given(**settings), reassign=reassign)
    assert faults == []
    assert others == expected


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["replicated", "sharded"])
def test_a_step_that_keeps_features_exchanges_those_of_the_batch(storage: str) -> None:
    whole = given(scope="dataset", storage=storage)
    (compiled,) = compile_all(whole, reassign=False, options=FAST)
    found = read(compiled.program.as_text(), whole.sizes)
    carried = [part.carries for each in found for part in each.parts]
    assert {reading.RECORDS, reading.UNKNOWN}.isdisjoint(carried), found
    assert 1 <= carried.count(reading.FEATURES) <= 3, found


def gathers_images(step, state, new, metrics, batch):
    images = jax.lax.with_sharding_constraint(batch["image"], sharding.replicated(step.mesh))
    return new, metrics | {"brightest": jnp.sort(images.reshape(-1))[-9]}


def gathers_the_permutation(step, state, new, metrics, batch):
    return new, metrics | {"median": jnp.sort(state.assignment)[N // 2]}


def asks_for_rows(step, state, new, metrics, batch):
    rows = jax.lax.with_sharding_constraint(batch["index"] + 1, sharding.replicated(step.mesh))
    return new, metrics | {"first": rows[jnp.argsort(rows)[3]]}


def sums_gradients_twice(step, state, new, metrics, batch):
    def again(params):
        outputs, _ = step.model.apply(params, state.batch_stats, batch["image"], train=False)
        return jnp.sum(outputs["z"] ** 3)

    gradient = jax.grad(again)(state.params)
    return dataclasses.replace(new, params=jax.tree.map(jnp.add, new.params, gradient)), metrics


def watches_channels(step, state, new, metrics, batch):
    outputs, _ = step.model.apply(state.params, state.batch_stats, batch["image"], train=False)
    return new, metrics | {"dead": jnp.max(outputs["conv2"], axis=(0, 1, 2))}


@pytest.mark.parametrize(
    ("storage", "changes"),
    [
        (
            "replicated",
            {
                gathers_images: "unknown: all-gather of u8",
                asks_for_rows: "B indices or rows: 1, not 0 at the most",
                sums_gradients_twice: "elements too many",
                watches_channels: "sums over each channel",
            },
        ),
        ("sharded", {gathers_the_permutation: "N-sized"}),
    ],
)
def test_anything_more_is_seen(storage: str, changes: dict[Callable, str]) -> None:
    given_step = given(block=4, storage=storage)
    at = state_shardings(given_step.step)

    def with_more(state, noise, batch):
        new, metrics = train_step(given_step.step, state, noise, batch, reassign=False)
        for change in changes:
            new, metrics = change(given_step.step, state, new, metrics, batch)
        return new, metrics

    out = (at, sharding.replicated(given_step.step.mesh))
    lowered = jax.jit(with_more, out_shardings=out).lower(
        given_step.state, given_step.noise, given_step.batch
    )
    found = read(lowered.compile(FAST).as_text(), given_step.sizes)
    faults = given_step.sizes.faults(found, reassign=False, sharded=storage == "sharded")
    for complaint in changes.values():
        assert any(complaint in fault for fault in faults), faults


def test_a_gradient_that_is_not_summed_is_seen() -> None:
    whole = given(block=4)
    (compiled,) = compile_all(whole, reassign=False, options=FAST)
    found = read(compiled.program.as_text(), whole.sizes)
    less = [
        dataclasses.replace(
            each, parts=tuple(p for p in each.parts if p.carries != reading.GRADIENT)
        )
        for each in found
    ]
    assert any("never summed" in fault for fault in whole.sizes.faults(less, reassign=False))
