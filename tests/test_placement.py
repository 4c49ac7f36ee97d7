"""Matching on the host does what matching on the device does, and shapes stay what they are."""

import dataclasses

import jax
import numpy as np
import pytest
from one_step import assert_agree, make_batch, make_state, make_step, make_targets, one_step

from nat_jax import config, metrics, placement, sharding, train
from nat_jax.placement import HostStep, compile_step


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.mark.parametrize(
    ("block", "views", "bad", "solver"),
    [
        (None, (), (), "auction"),
        (8, (2,), (3, 17), "auction"),
        (4, (), tuple(range(5)), "scipy"),
        (1, (), (), "auction"),
    ],
)
def test_the_host_deals_the_same_rows(mesh, block, views, bad, solver):
    settings = dict(block=block, solver=solver)
    device = one_step(make_step(mesh, **settings), views=views, bad=bad)
    host = one_step(make_step(mesh, **settings, placement="host"), views=views, bad=bad)
    assert_agree(device, host, block=block)
    assert host.metrics.pop("time/solver_seconds") > 0
    assert host.metrics.keys() == device.metrics.keys()
    for name, value in device.metrics.items():
        if name != "assign/rounds":
            np.testing.assert_allclose(host.metrics[name], value, atol=1e-4, err_msg=name)


def test_the_rows_come_from_the_host(mesh, monkeypatch):
    """What the solver between the programs returns is what is dealt."""
    step = make_step(mesh, block=8, placement="host")
    real = placement.HostSolver._solve

    def backwards(self, blocks):
        return [np.concatenate([block[7::-1], block[8:]]) for block in real(self, blocks)]

    expected = one_step(step)
    monkeypatch.setattr(placement.HostSolver, "_solve", backwards)
    turned = one_step(step)
    rows = expected.assignment[expected.index].reshape(-1, 8)
    np.testing.assert_array_equal(turned.assignment[turned.index].reshape(-1, 8), rows[:, ::-1])


def test_problems_without_a_number_are_reported_and_still_dealt(mesh):
    step = make_step(mesh, placement="host")
    state = make_state(step)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
    state = dataclasses.replace(state, params=broken)
    run = compile_step(step, reassign=True)
    after, found = run(state, make_targets(step), sharding.global_batch(make_batch(), mesh))
    assert found["assign/worst_status"] > 0 and not np.isfinite(found["train/loss"])
    np.testing.assert_array_equal(np.sort(after.assignment), np.arange(len(after.assignment)))


def test_only_steps_that_match_need_the_host(mesh):
    step = make_step(mesh, placement="host")
    assert isinstance(compile_step(step, reassign=True), HostStep)
    assert not isinstance(compile_step(step, reassign=False), HostStep)
    assert compile_step(dataclasses.replace(step), reassign=True) is compile_step(
        step, reassign=True
    )


def test_auto_is_the_host_beside_tpus_only(monkeypatch):
    assert [placement.resolve("auto", x) for x in ("cpu", "gpu", "tpu")] == [
        "device",
        "device",
        "host",
    ]
    assert placement.resolve("device", "tpu") == "device"

    def none(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    assert placement.resolve("auto", "gpu") == "device"
    with pytest.raises(ValueError, match="has no CPU backend .Unknown.* Set JAX_PLATFORMS=tpu,cpu"):
        placement.resolve("auto", "tpu")


def tiny(solves: str):
    """Return a run of 4 epochs of 5 steps, two cycles of re-matching; the last step is the 20th."""
    c = config.default()
    c.epochs = 4.0
    c.batch_size = 256
    c.model.dim = 6
    c.model.options.widths = (4,)
    c.model.options.pools = 1
    c.optim.learning_rate = 0.1
    c.assign.reassign_every_epochs = 2
    c.assign.placement = solves
    c.assign.block = 64
    c.eval.probes = ("knn",)
    c.eval.labels_per_class = (0,)
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 5
    return c


@pytest.fixture
def compiled():
    """Return a list that gets the seconds of every compilation, from a cache or not."""
    found = []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def losses():
    return {}


@pytest.mark.parametrize("solves", ["device", "host"])
def test_nothing_is_compiled_after_the_first_cycle(
    tmp_path, monkeypatch, caplog, compiled, solves, losses
):
    after_step = []
    real = train._Loop._after

    def after(self, done, *rest):
        state = real(self, done, *rest)
        after_step.append(len(compiled))
        return state

    monkeypatch.setattr(train._Loop, "_after", after)
    with caplog.at_level("INFO", logger="nat_jax"):
        train.train_and_evaluate(tiny(solves), tmp_path)
    assert len(after_step) == 20
    assert 0 < after_step[0] < after_step[5]  # the steps that match, and those that do not
    assert set(after_step[9:]) == {after_step[9]}
    rows = [row for row in metrics.read_rows(tmp_path) if "train/loss" in row]
    assert caplog.text.count("the first step was done") == 1
    assert ["time/first_step_seconds" in row for row in rows] == [True, False, False, False]
    # The host's share is known at once, that of the devices when both kinds of steps were seen.
    shares = ["time/match_share" in row for row in rows]
    assert shares == [solves == "host", False, True, False]
    losses[solves] = [row["train/loss"] for row in rows]
    if len(losses) == 2:
        np.testing.assert_allclose(losses["host"], losses["device"], rtol=0.01)


def test_a_new_shape_would_be_counted(compiled):
    twice = jax.jit(lambda x: 2 * x)
    counts = []
    for size in (3, 3, 4):
        twice(np.zeros(size, np.float32))
        counts.append(len(compiled))
    assert 0 < counts[0] == counts[1] < counts[2]
