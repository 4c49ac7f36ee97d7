"""Meshes of any devices, and batches on them."""

import types

import jax
import numpy as np
import pytest

from nat_jax.runtime import sharding


def test_a_mesh_takes_all_devices():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "model": 1}


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="to be the number of devices, 1; got mesh.data = 3"):
        sharding.make_mesh(3, devices=jax.devices()[:1])


@pytest.mark.parametrize("model", [1, 2, 4])
def test_devices_along_model_belong_to_one_process(monkeypatch, model):
    """However JAX orders the devices of several processes."""
    chips = [types.SimpleNamespace(process_index=i // 2 % 4, id=i) for i in range(16)]
    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", lambda _, devices: devices)
    ordered = sharding._in_order(chips)
    assert [chip.process_index for chip in ordered] == sorted(c.process_index for c in chips)
    rows = np.array(ordered).reshape(-1, model)
    assert all(len({chip.process_index for chip in row}) == 1 for row in rows)


def test_slices_of_a_pod_are_ordered_one_by_one(monkeypatch):
    chips = [types.SimpleNamespace(process_index=0, slice_index=i % 2, id=i) for i in range(6)]
    asked = []

    def wired(shape, devices):
        asked.append((shape, [chip.id for chip in devices]))
        return devices[::-1]

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", wired)
    assert [chip.id for chip in sharding._in_order(chips)] == [4, 2, 0, 5, 3, 1]
    assert asked == [((3,), [0, 2, 4]), ((3,), [1, 3, 5])]


def test_on_a_tpu_pod_a_process_works_alone_on_one_chip():
    chips = [types.SimpleNamespace(platform="tpu") for _ in range(4)]
    assert sharding.standalone_devices(chips, processes=1) == chips
    assert sharding.standalone_devices(chips, processes=2) == chips[:1]
    cpus = [types.SimpleNamespace(platform="cpu") for _ in range(4)]
    assert sharding.standalone_devices(cpus, processes=2) == cpus


def test_a_batch_keeps_its_values_and_its_order():
    mesh = sharding.make_mesh()
    local = {"index": np.arange(8, dtype=np.int32), "image": np.zeros((8, 2, 2, 3), np.uint8)}
    batch = sharding.global_batch(local, mesh)
    np.testing.assert_array_equal(batch["index"], local["index"])
    assert batch["index"].sharding == sharding.over_data(mesh)
