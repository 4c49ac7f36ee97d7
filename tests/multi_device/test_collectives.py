"""What a step's devices send each other is what is known, and anything new is seen."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from nat_jax import models, optim, targets
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, state_shardings, train_step
from nat_jax.training import setup

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import collectives_read as reading
from collectives import Problem, compile_all, problem
from collectives_read import read

B, D = 64, 16
N = 4 * sharding.PERMUTATION_UNIT
# The machine code matters to nobody here; collectives stay where they are.
FAST = {"xla_backend_optimization_level": 0}
OTHERS = (reading.FEATURES, reading.INTEGERS, reading.WEIGHTS, reading.SOLUTION)


def given(
    *,
    block: int | None = None,
    placement: str = "device",
    storage: str = "replicated",
    solver: str = "scipy",  # the quickest to compile
) -> Problem:
    network = models.make_model(
        "convnet", dim=D, image_size=8, frontend="sobel", widths=(4, 12), pools=2
    )
    step = Step(
        network,
        optim.Optimizer(0.5, momentum=0.9),
        sharding.make_mesh(),
        solver=solver,
        block=block,
        placement=placement,
        storage=storage,
    )
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
        # One block over eight devices: features and targets come together, and all deal the rows.
        (dict(), False, {}),
        (dict(), True, {reading.FEATURES: 2, reading.INTEGERS: 2, reading.WEIGHTS: 1}),
        # A block on each device: the permutation, which all have, takes up all rows.
        (dict(block=8), False, {}),
        (dict(block=8, solver="auction"), True, {reading.INTEGERS: 2}),
        # Where each has a share of the permutation, it is asked for rows as well.
        (dict(block=8, storage="sharded"), False, {reading.INTEGERS: 2}),
        (dict(block=8, storage="sharded"), True, {reading.INTEGERS: 4}),
        (dict(block=8, placement="host"), True, {reading.INTEGERS: 2, reading.SOLUTION: 1}),
    ],
)
def test_a_step_exchanges_what_is_known(settings: dict, reassign: bool, expected: dict) -> None:
    faults, others = exchanged(given(**settings), reassign=reassign)
    assert faults == []
    assert others == expected


def broken(change: Callable) -> Callable:
    """Return a train step that does something besides."""

    def step_and(step, state, noise, batch, *, reassign):
        new, metrics = train_step(step, state, noise, batch, reassign=reassign)
        return change(step, state, new, metrics, batch)

    return step_and


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
    ("change", "storage", "complaint"),
    [
        (gathers_images, "replicated", "unknown: all-gather of u8"),
        (gathers_the_permutation, "sharded", "N-sized"),
        (asks_for_rows, "replicated", "B indices or rows: 1, not 0 at the most"),
        (sums_gradients_twice, "replicated", "elements too many"),
        (watches_channels, "replicated", "sums over each channel"),
    ],
)
def test_anything_more_is_seen(change: Callable, storage: str, complaint: str) -> None:
    whole = given(block=8, storage=storage)
    at = state_shardings(whole.step)
    function = jax.jit(
        functools.partial(broken(change), whole.step, reassign=False),
        out_shardings=(at, sharding.replicated(whole.step.mesh)),
    )
    lowered = function.lower(whole.state, whole.noise, whole.batch)
    found = read(lowered.compile(FAST).as_text(), whole.sizes)
    faults = whole.sizes.faults(found, reassign=False, sharded=storage == "sharded")
    assert any(complaint in fault for fault in faults), faults


def test_a_gradient_that_is_not_summed_is_seen() -> None:
    whole = given(block=8)
    (compiled,) = compile_all(whole, reassign=False, options=FAST)
    found = read(compiled.program.as_text(), whole.sizes)
    less = [
        dataclasses.replace(
            each, parts=tuple(p for p in each.parts if p.carries != reading.GRADIENT)
        )
        for each in found
    ]
    assert any("never summed" in fault for fault in whole.sizes.faults(less, reassign=False))


def first_state_bytes() -> int:
    """Return the temporary bytes of a device that makes its part of a run's first state."""
    step = given(storage="sharded").step
    beginning = SimpleNamespace(
        seed=0,
        step=step,
        sources=SimpleNamespace(train=range(N - 1)),  # padded by one entry
        config=SimpleNamespace(targets=SimpleNamespace(kind="sphere")),
    )
    function = jax.jit(lambda: setup.initial_state(beginning), out_shardings=state_shardings(step))
    return function.lower().compile(FAST).memory_analysis().temp_size_in_bytes


def test_each_device_makes_its_own_share_of_the_first_permutation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert first_state_bytes() < N // 8 * 4

    def joined(kind, number, key, *, length):
        parts = jnp.arange(number, dtype=jnp.int32), jnp.arange(number, length, dtype=jnp.int32)
        return jnp.concatenate(parts)

    monkeypatch.setattr(targets, "initial_assignment", joined)
    assert first_state_bytes() >= N * 4  # a whole one on each device would be seen
