"""What processes must share, as far as one process can see it; the rest is in multi_process."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax.runtime import consistency
from nat_jax.runtime.consistency import Disagreement


class Others:
    """Stands for the collectives of three processes, of which this is number 0."""

    def __init__(self, monkeypatch, change):
        self._change = change
        monkeypatch.setattr(consistency.jax, "process_count", lambda: 3)
        utils = types.SimpleNamespace(
            process_allgather=self._gather,
            broadcast_one_to_all=lambda value: value,
            sync_global_devices=lambda name: None,
        )
        monkeypatch.setattr(consistency, "multihost_utils", utils)

    def _gather(self, mine):
        every = np.stack([mine, mine, mine])
        return self._change(every)


def test_one_process_agrees_with_itself(tmp_path):
    consistency.check_same({"config": object()}, "")  # nothing is even looked at
    consistency.check_shared(tmp_path / "nowhere")
    consistency.check_copies({"x": jnp.zeros(3)}, "step 1")
    consistency.wait_for_all("test")


def test_equal_values_pass(monkeypatch):
    Others(monkeypatch, lambda every: every)
    consistency.check_same({"config": {"b": 1, "a": [2]}, "data": "f00"}, "")


def test_the_first_difference_is_named(monkeypatch):
    def change(every):
        every[2, 1] ^= 1
        return every

    Others(monkeypatch, change)
    with pytest.raises(Disagreement) as caught:
        consistency.check_same({"config": {"a": 1}, "data": "f00"}, "Copy it again")
    assert str(caught.value) == (
        'data: process 2 of 3 differs from process 0; here it is "f00". Copy it again'
    )


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (1, "b: process 1 of 3 differs from process 0; here it is 2."),
        (2, "keys of config: process"),
    ],
)
def test_of_a_mapping_the_key_is_named(monkeypatch, where, said):
    calls = []

    def change(every):
        calls.append(every)
        every[1, 0 if len(calls) == 1 else where] ^= 1
        return every

    Others(monkeypatch, change)
    with pytest.raises(Disagreement) as caught:
        consistency.check_same({"config": {"a": 1, "b": 2}, "data": "f00"}, "")
    assert str(caught.value).startswith(said)
    assert [len(every[0]) for every in calls] == [2, 3]


def test_the_order_of_keys_does_not_matter(monkeypatch):
    seen = []
    Others(monkeypatch, lambda every: seen.append(every) or every)
    consistency.check_same({"config": {"b": 1, "a": 2}}, "")
    consistency.check_same({"config": {"a": 2, "b": 1}}, "")
    np.testing.assert_array_equal(*seen)


def test_a_folder_that_is_not_shared_is_named(monkeypatch, tmp_path):
    Others(monkeypatch, lambda every: every)
    consistency.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    Others(monkeypatch, lambda every: np.array([True, False, True]))
    with pytest.raises(Disagreement, match=f"{tmp_path}, which is another folder for process 1"):
        consistency.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (np.arange(100, dtype=np.int32), "swap"),
        (np.linspace(0, 1, 64, dtype=np.float32), "swap"),
        (np.zeros(10, np.float16), "flip"),
        (np.zeros(10, np.int8), "flip"),
        (np.zeros(10, bool), "flip"),
        (np.float32(0), "flip"),
    ],
)
def test_a_checksum_sees_one_bit_and_the_order(before, after):
    changed = np.array(before)
    if after == "swap":
        changed[[3, 40]] = changed[[40, 3]]
    elif changed.dtype == bool:
        changed[7] = True
    else:
        changed.reshape(-1).view(np.uint8)[-1] ^= 1
    one, same, other = (
        int(jax.jit(consistency._checksum)(jnp.asarray(x)))
        for x in (before, before.copy(), changed)
    )
    assert one == same != other
