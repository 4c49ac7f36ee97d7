"""From one identical state, one step does the same on any mesh."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import linear_sum_assignment

from nat_jax import config, models, optim, sharding, targets, train
from nat_jax.device_images import DeviceImages
from nat_jax.train_step import Step, compile_step, create_state, forward

N, B, D = 203, 32, 6  # 203 rows do not divide by 8 devices


def mesh_of(data: int, model: int = 1):
    return sharding.make_mesh(data, model, devices=jax.devices()[: data * model])


def step_on(mesh, block=None) -> Step:
    network = models.make_model(
        "convnet", dim=D, image_size=8, frontend="sobel", widths=(4, 8), pools=2
    )
    return Step(network, optim.Optimizer(0.5, momentum=0.9), mesh, block=block)


def one_step(step, storage="table", views=()):
    """Run one re-matching step from the same state on a mesh; return what it gives on the host."""
    noise, _ = targets.make_targets(
        "sphere", N, D, jax.random.key(7), storage=storage, sharding=sharding.over_data(step.mesh)
    )
    everywhere = sharding.replicated(step.mesh)
    state = create_state(
        step.model, step.optimizer, jnp.arange(N, dtype=jnp.int32), jax.random.key(0)
    )
    state = jax.device_put(state, everywhere)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (B, *views, 8, 8, 3), np.uint8),
        "index": rng.permutation(N)[:B].astype(np.int32),
        "weight": np.ones(B, np.float32),
    }
    features = jax.jit(lambda s, x: forward(step.model, s, x).features)(state, batch["image"])
    if views:  # what is matched is the direction of their mean
        features = jnp.mean(features, axis=1)
        features /= jnp.linalg.norm(features, axis=-1, keepdims=True)
    similarity = np.asarray(features) @ np.asarray(noise.gather(jnp.asarray(batch["index"]))).T
    compiled = compile_step(step, reassign=True)
    state, metrics = compiled(state, noise, sharding.global_batch(batch, step.mesh))
    return jax.device_get((state.params, state.assignment, metrics)), batch, similarity


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collectives_in_loops(program: str) -> list[str]:
    """Return the lines with a collective that some while loop's body leads to."""
    parts, name = {}, None
    for line in program.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened[1]
        parts.setdefault(name, []).append(line)
    calls = r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    waiting = re.findall(r"(?:body|condition)=%?([\w.\-]+)", program)
    assert waiting, "the program has no while loop"
    seen, found = set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in parts[name]:
            found += [line] if any(f" {word}" in line for word in COLLECTIVES) else []
            waiting += re.findall(calls, line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                waiting += [branch.strip().lstrip("%") for branch in group.split(",")]
    return found


def margins(similarity: np.ndarray) -> np.ndarray:
    """Return, for each image, what the best matching without its pair loses."""
    i, best = linear_sum_assignment(similarity, maximize=True)
    total = similarity[i, best].sum()
    lost = np.empty(len(i))
    for row in i:
        without = similarity.copy()
        without[row, best[row]] = -1e3
        i2, other = linear_sum_assignment(without, maximize=True)
        lost[row] = total - without[i2, other].sum()
    return lost


@pytest.fixture(scope="module")
def reference():
    return one_step(step_on(mesh_of(1)))


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("storage", ["table", "virtual"])
def test_one_step_agrees_with_one_device(reference, shape, storage):
    (params, assignment, metrics), batch, similarity = reference
    (other_params, other_assignment, other), _, _ = one_step(step_on(mesh_of(*shape)), storage)
    np.testing.assert_allclose(other["train/loss"], metrics["train/loss"], atol=1e-5)
    clear = batch["index"][margins(similarity) > 1e-5]
    assert len(clear) > B // 2
    np.testing.assert_array_equal(other_assignment[clear], assignment[clear])
    np.testing.assert_array_equal(np.sort(other_assignment), np.arange(N))
    for left, right in zip(*map(jax.tree.leaves, (params, other_params)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


def test_two_views_agree_with_one_device():
    (params, assignment, _), batch, similarity = one_step(step_on(mesh_of(1)), views=(2,))
    (other_params, other_assignment, _), _, _ = one_step(step_on(mesh_of(8)), views=(2,))
    clear = batch["index"][margins(similarity) > 1e-5]
    assert len(clear) > B // 2
    np.testing.assert_array_equal(other_assignment[clear], assignment[clear])
    for left, right in zip(*map(jax.tree.leaves, (params, other_params)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-4)


def test_images_on_the_devices_are_split_like_the_batch():
    mesh = mesh_of(8)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    on_device = DeviceImages(images, 0, mesh)
    index = np.random.default_rng(1).permutation(40)[:16].astype(np.int32)
    batch = {
        "index": index,
        "corner": np.zeros((16, 2, 2), np.int32),
        "mirrored": np.tile([False, True], (16, 1)),
        "weight": np.ones(16, np.float32),
    }
    found = on_device(sharding.global_batch(batch, mesh))
    assert found.sharding.is_equivalent_to(sharding.over_data(mesh), found.ndim)
    expected = np.stack([images[index], images[index][:, :, ::-1]], axis=1)
    np.testing.assert_array_equal(np.asarray(found), expected)


@pytest.mark.parametrize("block", [4, 16])
def test_blocks_do_not_depend_on_the_number_of_devices(block):
    (_, alone, _), batch, similarity = one_step(step_on(mesh_of(1), block))
    (_, spread, _), _, _ = one_step(step_on(mesh_of(8), block))
    clear = np.concatenate(
        [
            batch["index"][start : start + block][
                margins(similarity[start : start + block, start : start + block]) > 1e-5
            ]
            for start in range(0, B, block)
        ]
    )
    assert len(clear) > B // 2
    np.testing.assert_array_equal(spread[clear], alone[clear])


def test_the_agreement_can_fail(reference):
    (_, assignment, metrics), _, _ = reference
    changed = dataclasses.replace(step_on(mesh_of(8)), block=4)
    (_, other_assignment, other), _, _ = one_step(changed)
    assert not np.array_equal(other_assignment, assignment)
    assert abs(other["train/loss"] - metrics["train/loss"]) > 1e-5


def test_no_collective_stands_inside_the_solver():
    """A while loop that waits for other devices in every round would be the end of scaling."""
    step = step_on(mesh_of(8), block=4)
    noise, _ = targets.make_targets("sphere", N, D, jax.random.key(7), storage="virtual")
    state = jax.eval_shape(
        lambda: create_state(
            step.model, step.optimizer, jnp.arange(N, dtype=jnp.int32), jax.random.key(0)
        )
    )
    state = sharding.abstract(state, sharding.replicated(step.mesh))
    batch = {
        "image": jax.ShapeDtypeStruct((B, 8, 8, 3), np.uint8),
        "index": jax.ShapeDtypeStruct((B,), np.int32),
        "weight": jax.ShapeDtypeStruct((B,), np.float32),
    }
    batch = sharding.abstract(batch, sharding.over_data(step.mesh))
    text = compile_step(step, reassign=True).lower(state, noise, batch).compile().as_text()
    assert any(word in text for word in COLLECTIVES)  # the gradients' sum is there to be found
    assert not collectives_in_loops(text)


def test_a_collective_inside_a_loop_would_be_found():
    def body(x):
        return jax.lax.psum(x, "data") * 0.4

    def loop(x):
        return jax.lax.while_loop(lambda x: x[0] > 1, body, x)

    spread = jax.shard_map(
        loop, mesh=mesh_of(8), in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    text = jax.jit(spread).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile().as_text()
    assert collectives_in_loops(text)


def test_a_whole_run_on_eight_devices(tmp_path):
    c = config.default()
    c.epochs = 1.0
    c.batch_size = 64
    c.model.dim = 6
    c.model.options.widths = (4,)
    c.model.options.pools = 1
    c.optim.learning_rate = 0.1
    c.eval.probes = ("knn",)
    c.eval.labels_per_class = (0,)
    c.checkpoint.every_epochs = 1.0
    state = train.train_and_evaluate(c, tmp_path)
    assert int(state.step) == 22
    np.testing.assert_array_equal(np.sort(state.assignment), np.arange(1437))
    assert (tmp_path / "report.html").exists()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    c = config.default()
    c.epochs, c.checkpoint.every_epochs, c.batch_size = 1.0, 1.0, 100
    with pytest.raises(ValueError, match="multiple of the 8 devices.*batch_size=96 or 104"):
        train.train_and_evaluate(c, tmp_path)
