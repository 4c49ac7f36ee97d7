"""Checks across processes, as far as one process can see them; the rest is in multi_process."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax.runtime import consistency
from nat_jax.runtime.consistency import Disagreement


def stand_for_three(monkeypatch, gather):
    """Replace the collectives by those of three processes, of which this is one."""
    monkeypatch.setattr(consistency.jax, "process_count", lambda: 3)
    utils = types.SimpleNamespace(
        process_allgather=gather,
        broadcast_one_to_all=lambda value: value,
        sync_global_devices=lambda name: None,
    )
    monkeypatch.setattr(consistency, "multihost_utils", utils)


class _Waits(Exception):
    pass


def check(monkeypatch, *values):
    """Let three processes check these values; return the message of each, or None."""
    gathered = []  # what each collective has given all of them so far

    def run(value):
        """Return the message, and what this process sends to the next collective."""
        answers, sent = iter(gathered), []

        def gather(mine):
            if (answer := next(answers, None)) is None:
                sent.append(mine)
                raise _Waits
            return answer

        stand_for_three(monkeypatch, gather)
        try:
            consistency.check_same(value, "Copy it again")
        except Disagreement as error:
            return str(error), sent
        except _Waits:
            pass
        return None, sent

    while True:
        messages, sent = zip(*map(run, values), strict=True)
        if not any(sent):
            return list(messages)
        gathered.append(np.stack([each[0] for each in sent]))


def test_one_process_agrees_with_itself(tmp_path):
    consistency.check_same({"config": object()}, "")  # nothing is even looked at
    consistency.check_shared(tmp_path / "nowhere")
    consistency.check_copies({"x": jnp.zeros(3)}, "step 1")
    consistency.wait_for_all("test")


def test_equal_values_pass_in_any_order_of_keys(monkeypatch):
    one = {"config": {"b": 1, "a": [2]}, "data": "f00"}
    other = {"data": "f00", "config": {"a": (2,), "b": 1}}
    assert check(monkeypatch, one, other, one) == [None] * 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": "f01"}, 'data: process 2 of 3 differs from process 0: "f01" instead of "f00"'),
        ({"config": {"b": 1, "a": 3}}, "a: process 2 of 3 differs from process 0: 3 instead of 2"),
        ({"config": {"b": 1}}, "a: process 2 of 3 differs from process 0: null instead of 2"),
    ],
)
def test_the_first_difference_is_named_in_all_processes(monkeypatch, change, expected):
    one = {"config": {"b": 1, "a": 2}, "data": "f00"}
    found = check(monkeypatch, one, one, json.loads(json.dumps(one)) | change)
    assert found == [f"{expected}. Copy it again"] * 3


def test_a_folder_that_is_not_shared_is_named(monkeypatch, tmp_path):
    stand_for_three(monkeypatch, lambda mine: np.stack([mine] * 3))
    consistency.check_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    stand_for_three(monkeypatch, lambda mine: np.array([True, False, True]))
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
