import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax.assign import Status, _scipy, scipy


def test_one_thread_is_refused_where_it_would_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_scipy, "_cores", lambda: 1)
    monkeypatch.delenv("NPROC", raising=False)
    cost = jnp.eye(3)
    assert float(scipy(cost).cost) == 0  # nothing calls back outside jit
    with pytest.raises(RuntimeError, match="NPROC=2 .* solver 'auction'"):
        jax.jit(scipy)(cost)
    monkeypatch.setenv("NPROC", "2")
    assert float(jax.jit(scipy)(cost).cost) == 0
    monkeypatch.setenv("NPROC", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert float(jax.jit(lambda x: scipy(x + 1))(cost).cost) == 3


def test_cores_are_those_of_this_process() -> None:
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    assert 1 <= len(allowed) <= _scipy._cores() <= (os.cpu_count() or 1)


def test_forbidden_pairs_beside_the_largest_numbers() -> None:
    cost = np.random.default_rng(0).random((4, 4)) * 1e307
    cost[:, 0] = np.inf
    result = scipy(cost)
    assert int(result.status) in (Status.INFEASIBLE, Status.NONFINITE)
    assert sorted(np.asarray(result.col4row).tolist()) == [0, 1, 2, 3]
