import gc
import pickle

import jax
import numpy as np

from nat_jax.input.reader import _BatchMemory

SHAPE = (64, 2, 32, 32, 3)  # large enough for JAX on a CPU to share it


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nobody_looks_at_it():
    memory = _BatchMemory()
    first = memory.empty(SHAPE)
    assert first.shape == SHAPE and first.dtype == np.uint8 and first.flags.writeable
    place = address(first)
    second = memory.empty(SHAPE)
    assert not np.may_share_memory(first, second)
    del first
    gc.collect()
    assert address(memory.empty(SHAPE)) == place
    assert address(memory.empty((7, 5))) != place


def test_a_view_keeps_its_memory():
    memory = _BatchMemory()
    views = [
        memory.empty(SHAPE)[3:, ..., 1],
        memory.empty(SHAPE).reshape(-1)[::7],
        memory.empty(SHAPE)[:, 0].view(np.int8),
        np.asarray(memoryview(memory.empty(SHAPE))),
    ]
    gc.collect()
    for _ in range(8):
        new = memory.empty(SHAPE)
        assert not any(np.may_share_memory(new, view) for view in views)


def test_arrays_on_devices_keep_their_memory():
    memory = _BatchMemory()
    on_devices = []
    for value in range(12):
        batch = memory.empty(SHAPE)
        batch[:] = value
        on_devices.append(jax.device_put(batch.reshape(-1, 32, 32, 3)))
        del batch
    for value, array in enumerate(on_devices):
        assert (np.asarray(array) == value).all()


def test_another_process_begins_with_none():
    memory = _BatchMemory()
    memory.empty(SHAPE)
    assert pickle.loads(pickle.dumps(memory)).empty(SHAPE).shape == SHAPE
