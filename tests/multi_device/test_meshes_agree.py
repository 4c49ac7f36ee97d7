"""From one identical state, one step does the same on any mesh, wherever matching is solved."""

import functools
import runpy
import time

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from one_step import (
    N,
    Outcome,
    assert_agree,
    clear,
    make_batch,
    make_features,
    make_state,
    make_step,
    make_targets,
    one_step,
)
from project import ROOT

from nat_jax import config, train
from nat_jax.input.device_images import DeviceImages
from nat_jax.input.reader import ImageCache
from nat_jax.runtime import sharding
from nat_jax.train_step import keep_features, state_shardings
from nat_jax.training import dataset_matching, metrics
from nat_jax.training.checkpoint import Checkpoints
from nat_jax.training.setup import initial_state, open_sources, set_up


def mesh_of(data: int, model: int = 1):
    return sharding.make_mesh(data, model, devices=jax.devices()[: data * model])


@functools.cache
def outcome(
    shape: tuple[int, int] = (1, 1), targets: str = "table", views=(), bad=(), **settings
) -> Outcome:
    return one_step(make_step(mesh_of(*shape), **settings), targets, views, bad)


def later(*values):
    """Leave a case to the slow tests: each compiles programs of its own."""
    return pytest.param(*values, marks=pytest.mark.slow)


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@pytest.mark.parametrize(("shape", "placement"), [((4, 2), "device"), later((2, 4), "host")])
def test_one_step_agrees_with_one_device(shape, placement):
    """Also where the wide layer is split along the second axis of the mesh."""
    found = outcome(shape, network="wide", placement=placement)
    assert_agree(outcome(network="wide"), found)
    for tree in (found.state.params, found.state.opt_state):
        (kernel,) = (leaf for leaf in jax.tree.leaves(tree) if leaf.shape == (128, 8192))
        assert kernel.sharding.spec == P(None, "model")
        shards = {shard.data.shape for shard in kernel.addressable_shards}
        assert shards == {(128, 8192 // shape[1])}
    step = make_step(mesh_of(*shape), network="wide")
    assert jax.tree.map(lambda leaf: leaf.sharding, found.state) == state_shardings(step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "targets", "solver"), [((8, 1), "table", "auction"), ((4, 1), "virtual", "scipy")]
)
def test_one_step_agrees_with_either_storage_of_targets(shape, targets, solver):
    assert_agree(outcome(solver=solver), outcome(shape, targets, solver=solver))


ALL = dict(views=(2,), bad=(3, 17), bn_groups=16)


@pytest.mark.parametrize("block", [4, later(None)])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_one_step_agrees_in_blocks_of_views_with_bad_records(block, placement):
    """A block for each device, and one for all; batch norm in parts."""
    alone = outcome(block=block, **ALL)
    storage = "sharded" if placement == "host" else "replicated"
    found = outcome((8, 1), block=block, placement=placement, storage=storage, **ALL)
    assert_agree(alone, found, block=block)
    more = {"time/solver_seconds"} if placement == "host" else set()
    assert found.metrics.keys() - alone.metrics.keys() == more
    for name in ("cosine_before", "cosine_after", "worst_status"):
        np.testing.assert_allclose(
            found.metrics[f"assign/{name}"], alone.metrics[f"assign/{name}"], atol=1e-5
        )


@pytest.mark.slow
def test_bfloat16_agrees_within_its_precision():
    """Sums in another order are rounded otherwise, and rows with small margins change."""
    one, other = outcome(dtype="bfloat16"), outcome((8, 1), dtype="bfloat16")
    losses = [x.metrics["train/loss"] for x in (one, other, outcome(solver="scipy"))]
    np.testing.assert_allclose(losses, losses[0], atol=1e-2)
    assert losses[0] != losses[2]


def test_the_agreement_can_fail():
    reference = outcome(block=4, **ALL)
    first, second = clear(reference, block=4)[:2]
    rows = reference.assignment.copy()
    rows[[first, second]] = rows[[second, first]]
    params = jax.tree.map(lambda leaf: leaf + 1e-3, reference.params)
    metrics = reference.metrics | {"train/loss": reference.metrics["train/loss"] + 1e-3}
    for change in ({"assignment": rows}, {"params": params}, {"metrics": metrics}):
        with pytest.raises(AssertionError):
            assert_agree(reference, reference._replace(**change), block=4)


@pytest.mark.slow
def test_other_blocks_do_not_agree():
    reference, changed = outcome(solver="scipy"), outcome((8, 1), block=4)
    assert abs(changed.metrics["train/loss"] - reference.metrics["train/loss"]) > 1e-5
    records = clear(reference)
    assert not np.array_equal(changed.assignment[records], reference.assignment[records])


def test_a_checkpoint_fits_any_mesh(tmp_path):
    """The permutation is padded and sharded, the wide layer split otherwise or not at all."""
    settings = dict(network="wide", storage="sharded")
    step = make_step(mesh_of(4, 2), **settings)
    state = make_state(step)
    saver = Checkpoints(tmp_path)
    saver.save(1, state, {})
    saver.close()
    shapes = jax.eval_shape(lambda: state)
    for shape in ((2, 4), (3, 1)):
        there = make_step(mesh_of(*shape), **settings)
        reader = Checkpoints(tmp_path)
        restored, _ = reader.restore(sharding.abstract(shapes, state_shardings(there)), expect={})
        reader.close()
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == state_shardings(there)
        for left, right in zip(*map(jax.tree.leaves, (state, restored)), strict=True):
            if not jax.dtypes.issubdtype(left.dtype, jax.dtypes.prng_key):
                np.testing.assert_array_equal(left, right)


def test_all_images_are_matched_alike():
    """The features of a batch are kept as NumPy does it, and all images matched as on one device.

    The permutation and the features are replicated, or padded and sharded.
    """
    found = []
    for shape, storage in (((1, 1), "replicated"), ((4, 2), "sharded")):
        kept, batch = make_features(without=range(50)), make_batch(bad=(3,))
        newest = make_features()[::-1][: len(batch["index"])].copy()
        step = make_step(mesh_of(*shape), scope="dataset", storage=storage)
        keep = jax.jit(keep_features, out_shardings=state_shardings(step))
        state = keep(make_state(step, kept), sharding.global_batch(batch, step.mesh), newest)
        good = batch["weight"] > 0
        kept[batch["index"][good]] = newest[good]
        np.testing.assert_array_equal(np.asarray(state.features)[:N], kept)
        matched, _ = dataset_matching.match_all(step, state, make_targets(step), N, seed=0)
        assert jax.tree.map(lambda leaf: leaf.sharding, matched) == state_shardings(step)
        rows = np.asarray(matched.assignment)
        np.testing.assert_array_equal(rows[N:], np.arange(N, len(rows)))
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(rows)))
        found.append(rows[:N])
    assert np.mean(found[0] != np.arange(N)) > 0.5
    np.testing.assert_array_equal(found[0], found[1])


def test_images_on_the_devices_are_split_like_the_batch():
    mesh = mesh_of(4, 2)
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
    assert found.sharding.is_equivalent_to(sharding.batch_shardings(mesh)["image"], found.ndim)
    expected = np.stack([images[index], images[index][:, :, ::-1]], axis=1)
    np.testing.assert_array_equal(np.asarray(found), expected)


FC_WIDTH = 256  # of a layer that free runs split, after 64 values


def run_config(**mesh):
    c = config.default()
    c.epochs = 1.0
    c.batch_size = 64
    c.model.dim = 6
    c.model.options.widths = (4,)
    c.model.options.pools = 1
    c.optim.learning_rate = 0.1
    c.eval.probes, c.eval.layers, c.eval.baselines = ("knn",), ("z",), ()
    c.eval.labels_per_class = (0,)
    c.checkpoint.every_epochs = 1.0
    c.assign.solver = "scipy"
    c.mesh.update(mesh)
    return c


@pytest.mark.slow
def test_a_whole_run_on_eight_devices(tmp_path):
    c = run_config(model=2)
    c.assign.storage = "sharded"
    state = train.train_and_evaluate(c, tmp_path)
    assert int(state.step) == 22
    assert state.assignment.sharding.spec == P("data")
    assert len(state.assignment) == sharding.PERMUTATION_UNIT
    rows = np.asarray(state.assignment)
    np.testing.assert_array_equal(np.sort(rows[:1437]), np.arange(1437))
    np.testing.assert_array_equal(rows[1437:], np.arange(1437, len(rows)))
    assert (tmp_path / "report.html").exists()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    c = run_config()
    c.batch_size = 100
    with pytest.raises(ValueError, match="multiple of the 8 devices.*batch_size=96 or 104"):
        train.train_and_evaluate(c, tmp_path)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (dict(data=3), "data \\* mesh.model to be the number of devices, 8; got mesh.data = 3, "),
        (dict(model=3), "--config.mesh.model to one of: 1, 2, 4, 8"),
        (dict(data=4, model=4), "got mesh.data = 4, mesh.model = 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(tmp_path, mesh, message):
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(run_config(**mesh), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_permutation_that_cannot_be_sharded_is_refused():
    eleven = AbstractMesh((11, 1), ("data", "model"))
    with pytest.raises(ValueError, match="assign.storage: expected .* divides 430,080.* got 11. "):
        sharding.permutation_storage("sharded", 99, eleven)
    assert sharding.permutation_storage("auto", 99, eleven) == ("replicated", 99)


def end_of_a_free_run(shape: tuple[int, int], folder, **changes) -> float:
    """Train configs/smoke.py on a mesh, check its permutation, and return its last losses' mean.

    It re-matches in every epoch, and SciPy solves: there is less to compile.
    """
    c = runpy.run_path(str(ROOT / "configs" / "smoke.py"))["get_config"]()
    c.model.options.fc_width = FC_WIDTH
    c.epochs = 3.0
    c.assign.reassign_every_epochs, c.assign.solver = 1, "scipy"
    c.eval.every_epochs = 0
    c.log.every_steps = 1
    c.update_from_flattened_dict(changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "SPLIT_FROM", 64 * FC_WIDTH)
        run = set_up(
            c, 0, folder, mesh=mesh_of(*shape), sources=open_sources(c), cache=ImageCache()
        )
        saver = Checkpoints(folder / "checkpoints")
        state = train._Loop(run, None, saver, time.perf_counter(), lambda: None).run(
            initial_state(run)
        )
        saver.close()
    (wide,) = (leaf for leaf in jax.tree.leaves(state.params) if leaf.shape == (64, FC_WIDTH))
    assert {each.data.shape for each in wide.addressable_shards} == {(64, FC_WIDTH // shape[1])}
    np.testing.assert_array_equal(np.sort(state.assignment), np.arange(1437))
    assert np.any(state.assignment != np.arange(1437))
    losses = [row["train/loss"] for row in metrics.read_rows(folder)]
    assert len(losses) == 33
    return float(np.mean(losses[-11:]))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> float:
    return end_of_a_free_run((1, 1), tmp_path_factory.mktemp("alone"))


@pytest.mark.slow
def test_free_runs_end_alike_on_every_mesh(alone, tmp_path):
    """Rounding decides between rows that are equally good, and runs drift apart, but not far."""
    for shape, placement in {(8, 1): "device", (4, 2): "host"}.items():
        folder = tmp_path / str(shape)
        end = end_of_a_free_run(shape, folder, **{"assign.placement": placement})
        np.testing.assert_allclose(end, alone, rtol=0.01)


@pytest.mark.slow
def test_free_runs_that_match_otherwise_end_elsewhere(alone, tmp_path):
    """What is compared above moves by more than its tolerance when only the blocks are smaller."""
    other = end_of_a_free_run((8, 1), tmp_path / "other", **{"assign.block": 16})
    assert abs(other / alone - 1) > 0.01
