"""What the compiled programs of a step hold on 8 devices; none of them is run."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from one_step import D, make_step
from programs import (
    B,
    N,
    arguments,
    collectives_in_loops,
    compiled,
    largest_collective,
)

from nat_jax import targets
from nat_jax.runtime import sharding
from nat_jax.targets import SphereTable, Targets
from nat_jax.train_step import Step
from nat_jax.training import setup
from nat_jax.training.host_matching import HostStep, compile_step

KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


def virtual(kind: str = "sphere") -> Targets:
    return targets.make_targets(kind, N, D, KEY, storage="virtual")[0]


def program(step: Step, noise: Targets, *, reassign: bool) -> jax.stages.Compiled:
    return compiled(compile_step(step, reassign=reassign), *arguments(step, noise))


def host_programs(step: Step) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
    """Compile the two programs of a step whose problems the host solves."""
    programs = compile_step(step, reassign=True)
    assert isinstance(programs, HostStep)
    state, noise, batch = arguments(step, virtual())
    before = compiled(programs.pre_match, state, noise, batch)
    problem = sharding.abstract(before.out_info, before.output_shardings)
    blocks, b, _ = problem.cost.shape
    packed = jax.ShapeDtypeStruct((step.mesh.size, blocks, b + 3), jnp.int32)
    packed = sharding.abstract(packed, sharding.over_all(step.mesh))
    small = {name: batch[name] for name in ("index", "weight")}
    return before, compiled(programs.post_match, state, noise, small, problem, packed)


def test_two_programs_around_the_host_do_the_work_of_one(mesh):
    """The network is run once, and little more than the convolutions' results lies between."""
    one = make_step(mesh, block=4)
    before, after = host_programs(dataclasses.replace(one, placement="host"))
    alone = program(one, virtual(), reassign=False)
    flops = sum(each.cost_analysis()["flops"] for each in (before, after))
    assert flops < 1.2 * alone.cost_analysis()["flops"]
    of_an_image = 8 * 8 * (2 + 4) + 4 * 4 * 8 + 2 * D + 4 + 1  # front end, maps, z, costs, row
    between = before.memory_analysis().output_size_in_bytes
    assert between < 4 * B // 8 * of_an_image + 2000


def sizes(text: str) -> set[tuple[int, ...]]:
    """Return the shapes of the arrays that a program mentions."""
    found = re.findall(r"\b[a-z]+\d+\[([\d,]*)\]", text)
    return {tuple(map(int, filter(None, dimensions.split(",")))) for dimensions in found}


@pytest.mark.parametrize("storage", ["replicated", "sharded"])
def test_the_permutation_is_changed_in_place_and_stays_where_it_is(mesh, storage):
    """With virtual targets nothing else is as large as the data set."""
    found = program(make_step(mesh, block=4, storage=storage), virtual(), reassign=True)
    own = N if storage == "replicated" else N // 8
    memory = found.memory_analysis()
    assert 4 * own < memory.argument_size_in_bytes < 1.1 * 4 * own
    assert memory.alias_size_in_bytes > 4 * own
    assert memory.temp_size_in_bytes < 4 * own / 2
    text = found.as_text()
    assert largest_collective(text) < N // 100
    assert max(map(math.prod, sizes(text))) == own


def test_a_permutation_that_is_brought_together_would_be_found(mesh):
    split, everywhere = sharding.over_data(mesh), sharding.replicated(mesh)

    @jax.jit
    def gathered(assignment):
        return jax.lax.with_sharding_constraint(assignment, everywhere)[:1]

    found = compiled(gathered, jax.ShapeDtypeStruct((N,), jnp.int32, sharding=split))
    assert largest_collective(found.as_text()) == N


class Gathered(SphereTable):
    """A table that is brought together before rows are looked up."""

    def gather(self, rows: jax.Array) -> jax.Array:
        everywhere = sharding.replicated(sharding.make_mesh())
        return jax.lax.with_sharding_constraint(self.rows, everywhere)[rows]


jax.tree_util.register_dataclass(Gathered, ["rows"], [])


def test_a_table_stays_in_its_shares(mesh):
    rows = jax.ShapeDtypeStruct((N, D), np.float32, sharding=sharding.over_data(mesh))
    step = make_step(mesh, block=4, storage="sharded")
    found = sizes(program(step, SphereTable(rows), reassign=False).as_text())
    assert {s for s in found if math.prod(s) >= N // 8} == {(N // 8,), (N // 8, D)}
    control = sizes(program(step, Gathered(rows), reassign=False).as_text())
    assert (N, D) in control


def test_each_device_computes_its_own_share_of_a_table(mesh):
    split = sharding.over_data(mesh)
    build = jax.jit(lambda key: targets._build_table(key, N, 16, split))
    memory = build.lower(KEY).compile().memory_analysis()
    assert memory.output_size_in_bytes == N // 8 * 16 * 4
    assert memory.temp_size_in_bytes < N * 16 * 4 / 2


@pytest.mark.slow  # run with more optimisations than the others, as ulp depend on them
def test_shares_and_virtual_rows_are_equal_to_two_ulp(mesh):
    split = sharding.over_data(mesh)
    held, _ = targets.make_targets("sphere", 1003, 24, KEY, storage="table", sharding=split)
    assert held.rows.shape == (1008, 24) and held.rows.sharding == split
    computed, _ = targets.make_targets("sphere", 1003, 24, KEY, storage="virtual")
    rows = jax.device_put(np.random.default_rng(0).permutation(1000).astype(np.int32), split)
    one, other = (jax.jit(noise.gather)(rows) for noise in (held, computed))
    np.testing.assert_array_max_ulp(np.asarray(one), np.asarray(other), maxulp=2)
    alone, _ = targets.make_targets("sphere", 1003, 24, KEY, storage="table")
    np.testing.assert_array_max_ulp(np.asarray(one), alone.rows[np.asarray(rows)], maxulp=2)


def first_state_bytes(step: Step, kind: str) -> int:
    """Return the temporary bytes of a device that makes its part of a run's first state."""
    function = setup.first_state(step, kind, N - 1)  # padded by one entry
    return compiled(function, KEY).memory_analysis().temp_size_in_bytes


def test_each_device_makes_its_own_share_of_the_first_permutation(mesh):
    step = make_step(mesh, storage="sharded")
    assert first_state_bytes(step, "sphere") < N // 8 * 4
    # A random one is sorted, complete on each device, and is seen.
    assert first_state_bytes(step, "basis") >= N * 4


def test_devices_along_model_share_the_wide_layer_and_convolve_images_of_their_own():
    meshes = [sharding.make_mesh(*shape) for shape in ((8, 1), (2, 4))]
    pure, shared = [
        program(make_step(each, network="wide"), virtual(), reassign=False) for each in meshes
    ]
    assert largest_collective(pure.as_text()) == 128 * 8192  # the wide layer's gradient
    assert largest_collective(shared.as_text()) == 128 * 8192 // 4
    flops = [each.cost_analysis()["flops"] for each in (pure, shared)]
    assert flops[1] < 1.1 * flops[0]


def test_no_collective_stands_inside_the_solver(mesh):
    """A loop that waits for other devices in every round would be the end of scaling."""
    step = make_step(mesh, block=4, solver="auction")
    assert collectives_in_loops(program(step, virtual(), reassign=True).as_text()) == 0

    def loop(x):
        return jax.lax.while_loop(lambda x: x[0] > 1, lambda x: jax.lax.psum(x, "data") * 0.4, x)

    control = jax.shard_map(
        loop, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    found = compiled(jax.jit(control), jax.ShapeDtypeStruct((8,), jnp.float32))
    assert collectives_in_loops(found.as_text())
