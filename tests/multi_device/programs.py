"""Compiling a train step without running it, and reading what its devices exchange."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from collectives_read import COLLECTIVES, computations, loops

from nat_jax.runtime import sharding
from nat_jax.targets import Targets
from nat_jax.train_step import Step, create_state, state_shardings

B = 32  # images a batch
N = 4 * sharding.PERMUTATION_UNIT  # 1.7 million rows: more than anything else in the step

# The machine code matters to nobody here; loops, collectives and memory stay as they are.
FAST = {"xla_backend_optimization_level": 0}


def compiled(function, *arguments) -> jax.stages.Compiled:
    return function.lower(*arguments).compile(FAST)


def arguments(step: Step, noise: Targets) -> tuple:
    """Return the state, targets and batch of a step, as shapes with shardings."""
    state = jax.eval_shape(
        lambda: create_state(step.model, step.optimizer, jnp.zeros(N, jnp.int32), jax.random.key(0))
    )
    side = step.model.image_size
    batch = {
        "image": jax.ShapeDtypeStruct((B, side, side, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((B,), np.int32),
        "weight": jax.ShapeDtypeStruct((B,), np.float32),
    }
    return (
        sharding.abstract(state, state_shardings(step)),
        noise,
        sharding.abstract(batch, sharding.batch_shardings(step.mesh)),
    )


def collectives(program: str) -> list[str]:
    """Return the lines with a collective."""
    return [
        line
        for operations in computations(program).values()
        for opcode, line in operations
        if COLLECTIVES.match(opcode)
    ]


def collectives_in_loops(program: str) -> int:
    """Return the number of collectives inside the program's loops, of which there must be some."""
    found = loops(program)
    assert found, "the program has no loop"
    return sum(loop["collectives"] for loop in found)


def largest_collective(program: str) -> int:
    """Return the number of elements of the largest array that a collective returns."""
    return max(
        math.prod(map(int, filter(None, dimensions.split(","))))
        for line in collectives(program)
        for dimensions in re.findall(
            r"\w\[([\d,]*)\]",
            line.partition(" = ")[2].partition("(%")[0].partition("channel_id")[0],
        )
    )
