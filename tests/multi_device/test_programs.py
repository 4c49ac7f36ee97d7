"""What the compiled programs of a step hold on 8 devices; none of them is run."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from one_step import B, D, make_batch, make_step
from programs import COLLECTIVES, collectives_in_loops, largest_collective

from nat_jax import targets
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state, state_shardings
from nat_jax.training.host_matching import HostStep, compile_step

N = 4 * sharding.PERMUTATION_UNIT  # 1.7 million: more than anything else in the step


def compiled(function, *arguments) -> jax.stages.Compiled:
    # The machine code matters to nobody here; loops, collectives and memory stay as they are.
    return function.lower(*arguments).compile({"xla_backend_optimization_level": 0})


def arguments(step: Step, num_records: int = N) -> tuple:
    """Return the state, targets and batch of a step, as shapes with shardings."""
    state = jax.eval_shape(
        lambda: create_state(
            step.model, step.optimizer, jnp.zeros(num_records, jnp.int32), jax.random.key(0)
        )
    )
    noise, _ = targets.make_targets(
        "sphere", num_records, step.model.dim, jax.random.key(7), storage="virtual"
    )
    batch = jax.eval_shape(make_batch)
    return (
        sharding.abstract(state, state_shardings(step)),
        noise,
        sharding.abstract(batch, sharding.of_batch(step.mesh)),
    )


def host_programs(step: Step) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Compile the two programs of a step whose problems the host solves."""
    programs = compile_step(step, reassign=True)
    assert isinstance(programs, HostStep)
    state, noise, batch = arguments(step)
    ahead = compiled(programs.ahead, state, noise, batch)
    posed = sharding.abstract(ahead.out_info, ahead.output_shardings)
    blocks, b, _ = posed.cost.shape
    said = jax.ShapeDtypeStruct((step.mesh.size, blocks, b + 3), jnp.int32)
    said = sharding.abstract(said, sharding.over_all(step.mesh))
    labels = {name: batch[name] for name in ("index", "weight")}
    return ahead, compiled(programs.behind, state, noise, labels, posed, said)


def test_no_collective_stands_inside_the_solver():
    """A while loop that waits for other devices in every round would be the end of scaling."""
    step = make_step(sharding.make_mesh(), block=4)
    text = compiled(compile_step(step, reassign=True), *arguments(step)).as_text()
    assert any(word in text for word in COLLECTIVES)  # the gradients' sum is there to be found
    assert not collectives_in_loops(text)


def test_a_collective_inside_a_loop_would_be_found():
    def body(x):
        return jax.lax.psum(x, "data") * 0.4

    def loop(x):
        return jax.lax.while_loop(lambda x: x[0] > 1, body, x)

    spread = jax.shard_map(
        loop, mesh=sharding.make_mesh(), in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    text = jax.jit(spread).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
    assert collectives_in_loops(text)


def test_two_programs_around_the_host_do_the_work_of_one():
    """The network is run once, and little more than the convolutions' results lies between."""
    one = make_step(sharding.make_mesh(), block=4)
    two = dataclasses.replace(one, placement="host")
    ahead, behind = host_programs(two)
    for program in (ahead, behind):
        assert not collectives_in_loops(program.as_text())  # those that compute target rows
    alone = compiled(compile_step(one, reassign=False), *arguments(one))
    flops = sum(program.cost_analysis()["flops"] for program in (ahead, behind))
    assert flops < 1.2 * alone.cost_analysis()["flops"]
    of_an_image = 8 * 8 * (2 + 4) + 4 * 4 * 8 + 2 * D + 4 + 1  # front end, maps, z, costs, row
    between = ahead.memory_analysis().output_size_in_bytes
    assert between < 4 * B // 8 * of_an_image + 2000


@pytest.mark.parametrize("storage", ["replicated", "sharded"])
def test_the_permutation_is_changed_in_place_and_stays_where_it_is(storage):
    step = make_step(sharding.make_mesh(), storage=storage)
    program = compiled(compile_step(step, reassign=True), *arguments(step))
    own = 4 * (N if storage == "replicated" else N // 8)
    memory = program.memory_analysis()
    assert own < memory.argument_size_in_bytes < 1.1 * own
    assert memory.alias_size_in_bytes > own
    assert memory.temp_size_in_bytes < own / 2
    assert largest_collective(program.as_text()) < N // 100


def test_a_permutation_that_is_brought_together_would_be_found():
    split, everywhere = (f(sharding.make_mesh()) for f in (sharding.over_data, sharding.replicated))

    @jax.jit
    def gathered(assignment):
        return jax.lax.with_sharding_constraint(assignment, everywhere)[:1]

    program = compiled(gathered, jax.ShapeDtypeStruct((N,), jnp.int32, sharding=split))
    assert largest_collective(program.as_text()) == N


def test_devices_along_model_share_the_wide_layer_and_convolve_images_of_their_own():
    steps = [
        make_step(sharding.make_mesh(*shape), network="wide") for shape in ((8, 1), (4, 2), (2, 4))
    ]
    pure, *shared = [compiled(compile_step(s, reassign=False), *arguments(s)) for s in steps]
    assert largest_collective(pure.as_text()) == 128 * 8192  # the wide layer's gradient
    for program, model in zip(shared, (2, 4), strict=True):
        assert largest_collective(program.as_text()) == 128 * 8192 // model
        flops = [p.cost_analysis()["flops"] for p in (pure, program)]
        assert flops[1] < 1.1 * flops[0]
