"""That malloc keeps what is freed, and who decides."""

import subprocess
import sys

import pytest

from nat_jax.runtime import host_memory

# Fills 80 MB again and again, and prints how many pages the kernel had to provide for that.
_PROGRAM = """
import resource, sys
import numpy as np
from nat_jax.runtime import host_memory
print(host_memory.keep_freed_pages() if sys.argv[1] == "keep" else False)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.full(20_000_000, 1, np.float32)
before = faults()
for _ in range(5):
    np.full(20_000_000, 1, np.float32)
print(faults() - before)
"""


def run(monkeypatch: pytest.MonkeyPatch, argument: str, **variables: str) -> tuple[bool, int]:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", _PROGRAM, argument]
    kept, faults = subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of glibc only")
def test_freed_memory_is_kept(monkeypatch):
    kept, faults = run(monkeypatch, "keep")
    if not kept:
        pytest.skip("not glibc")
    before, usual = run(monkeypatch, "leave")
    assert not before
    assert faults < 10 < usual


def test_settings_of_the_user_win(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert not host_memory.keep_freed_pages()


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", True), ("cuda,cpu", False), ("tpu", False)]
)
def test_only_where_jax_has_nothing_but_a_cpu(monkeypatch, platforms, expected):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert host_memory.only_cpu() == expected
