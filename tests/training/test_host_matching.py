"""Matching on the host does what matching on the device does."""

import dataclasses

import jax
import numpy as np
import pytest
from one_step import assert_agree, make_batch, make_state, make_step, make_targets, one_step

from nat_jax.runtime import sharding
from nat_jax.training import host_matching
from nat_jax.training.host_matching import HostStep, compile_step

# Settings that most tests share, so that they share compiled programs too.
BLOCK, VIEWS = 4, (2,)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh()


@pytest.fixture(scope="module")
def host(mesh):
    return make_step(mesh, block=BLOCK, placement="host")


@pytest.mark.parametrize(
    ("block", "views", "bad", "solver"),
    [
        (BLOCK, VIEWS, (0, 1, 2, 3, 17), "scipy"),
        pytest.param(None, (), (), "auction", marks=pytest.mark.slow),
        pytest.param(8, (2,), (3, 17), "auction", marks=pytest.mark.slow),
        pytest.param(1, (), (), "auction", marks=pytest.mark.slow),
    ],
)
def test_the_host_assigns_the_same_rows(mesh, block, views, bad, solver):
    settings = dict(block=block, solver=solver)
    device = one_step(make_step(mesh, **settings), views=views, bad=bad)
    host = one_step(make_step(mesh, **settings, placement="host"), views=views, bad=bad)
    assert_agree(device, host, block=block)
    assert host.metrics.pop("time/solver_seconds") > 0
    assert host.metrics.keys() == device.metrics.keys()
    for name, value in device.metrics.items():
        if name != "assign/rounds":
            np.testing.assert_allclose(host.metrics[name], value, atol=1e-4, err_msg=name)


def test_the_rows_come_from_the_host(host, monkeypatch):
    """The solver between the programs decides."""
    real = host_matching.HostSolver._solve

    def backwards(self, blocks):
        return [np.concatenate([b[BLOCK - 1 :: -1], b[BLOCK:]]) for b in real(self, blocks)]

    expected = one_step(host, views=VIEWS)
    monkeypatch.setattr(host_matching.HostSolver, "_solve", backwards)
    turned = one_step(host, views=VIEWS)
    rows = expected.assignment[expected.index].reshape(-1, BLOCK)
    np.testing.assert_array_equal(turned.assignment[turned.index].reshape(-1, BLOCK), rows[:, ::-1])


def test_costs_that_are_not_numbers_are_reported_and_rows_stay_a_permutation(host):
    state = make_state(host)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, state.params)
    state = dataclasses.replace(state, params=broken)
    run = compile_step(host, reassign=True)
    batch = sharding.global_batch(make_batch(VIEWS), host.mesh)
    after, found = run(state, make_targets(host), batch)
    assert found["assign/worst_status"] > 0 and not np.isfinite(found["train/loss"])
    np.testing.assert_array_equal(np.sort(after.assignment), np.arange(len(after.assignment)))


def test_only_steps_that_reassign_need_the_host(host):
    assert isinstance(compile_step(host, reassign=True), HostStep)
    assert not isinstance(compile_step(host, reassign=False), HostStep)
    equal = dataclasses.replace(host)
    assert compile_step(equal, reassign=True) is compile_step(host, reassign=True)


def test_auto_is_the_host_beside_accelerators(monkeypatch):
    assert [host_matching.resolve("auto", x) for x in ("cpu", "gpu", "tpu")] == [
        "device",
        "host",
        "host",
    ]
    assert host_matching.resolve("host", "cpu") == "host"
    assert host_matching.resolve("device", "tpu") == "device"

    def none(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    assert host_matching.resolve("auto", "gpu") == "device"
    assert host_matching.resolve("auto", "cpu") == "device"
    with pytest.raises(ValueError, match="has no CPU backend .Unknown.* Set JAX_PLATFORMS=tpu,cpu"):
        host_matching.resolve("host", "tpu")
