"""The proof that an assignment is a permutation: exact, by bits, over shards and processes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port, run_program

from nat_jax.training.assignment_state import checksum, permutation_error


def is_permutation(rows: np.ndarray) -> bool:
    return bool(np.array_equal(np.sort(rows), np.arange(rows.size)))


@pytest.mark.parametrize("size", range(6))
def test_every_short_array_is_decided_exactly(size: int) -> None:
    for values in itertools.product(range(-1, size + 1), repeat=size):
        rows = np.array(values, np.int32)
        assert (permutation_error(rows) is None) == is_permutation(rows), values


@pytest.mark.parametrize("size", [7, 8, 9, 16, 1000])
def test_random_arrays_are_decided_exactly(size: int) -> None:
    rng = np.random.default_rng(size)
    for change in range(200):
        rows = rng.permutation(size).astype(np.int32)
        assert permutation_error(rows) is None
        if change % 2:  # bits that add up to what others would have added
            rows[rng.integers(0, size, 3)] = rng.integers(0, size)
        else:
            rows[rng.integers(0, size)] ^= 1 << rng.integers(0, 31)
        assert (permutation_error(rows) is None) == is_permutation(rows)


def test_bits_that_add_up_do_not_hide_a_duplicate() -> None:
    """Three times 128 is 128 modulo 256, so the byte of rows 0..7 is full all the same."""
    rows = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10, 11, 12, 13], np.int32)
    assert "of its rows 0..15 at least 1 are missing" in str(permutation_error(jnp.asarray(rows)))


def test_other_arrays_are_named() -> None:
    assert "one dimension; got int32(2, 3)" in str(permutation_error(np.zeros((2, 3), np.int32)))
    assert "integers" in str(permutation_error(np.arange(3.0)))


def test_the_checksum_depends_on_every_entry_and_its_place() -> None:
    size = 140_000  # more than are read at a time
    rows = np.random.default_rng(0).permutation(size).astype(np.int32)
    expected = checksum(rows)
    assert checksum(jnp.asarray(rows)) == expected
    swapped = rows.copy()
    swapped[[17, size - 5]] = swapped[[size - 5, 17]]
    assert checksum(swapped) != expected
    assert checksum(rows[::-1]) != expected
    found = {expected}
    for place, bit in itertools.product((0, size // 2, size - 1), range(32)):
        changed = rows.copy()
        changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
        found.add(checksum(changed))
    assert len(found) == 1 + 3 * 32


def test_the_checksum_of_features_depends_on_every_entry_and_its_place() -> None:
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float16)
    expected = checksum(features)
    assert checksum(jnp.asarray(features)) == expected
    changed = features.copy()
    changed.view(np.uint16)[4, 2] ^= 1
    others = (changed, features[::-1], features[:, ::-1], features.T)
    assert len({expected, *(checksum(np.ascontiguousarray(each)) for each in others)}) == 5


def test_the_checksum_is_what_checkpoints_hold() -> None:
    assert checksum(np.arange(5, dtype=np.int32)[::-1]) == 14695296419211670275


MEMORY = """
import sys
import numpy as np
from nat_jax.training.assignment_state import checksum, permutation_error

def peak():  # unlike getrusage's, this peak does not begin with that of the parent
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0])

N = 50_000_000
rows = np.arange(N, dtype=np.int32)
rows[:1000] = rows[:1000][::-1]
permutation_error(rows[:1000])  # load what it needs
before = peak()
if sys.argv[1] == "sorted":
    np.sort(rows)
else:
    assert permutation_error(rows) is None
    checksum(rows)
print((peak() - before) * 1024 / N)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("case", "least", "most"), [("proof", 1 / 8, 1), ("sorted", 3.5, 10)])
def test_it_needs_one_bit_an_image(case: str, least: float, most: float) -> None:
    """And a block's temporary arrays; sorting, the control, needs the 4 bytes of a copy."""
    output, _ = run_program(MEMORY, case).communicate(timeout=120)
    assert least * 0.9 <= float(output) <= most, output


PROCESSES = """
import sys
import jax
port, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nat_jax.training import assignment_state
from nat_jax.training.assignment_state import checksum, permutation_error

assignment_state._CHUNK = 16  # bytes, so that several are exchanged
good = np.random.default_rng(0).permutation(1008).astype(np.int32)
cases = {"good": good}
for name, places in {"within": (5, 6), "across": (5, 1000), "far": (5, 520)}.items():
    cases[name] = good.copy()
    cases[name][list(places)] = good[5]
cases["out of range"] = np.where(np.arange(1008) == 900, 1008, good).astype(np.int32)
for shape in ((4, 1), (2, 2), (1, 4)):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    for spec in (P("data"), P(("data", "model")), P(), P("model")):
        for name, rows in cases.items():
            sharded = jax.make_array_from_callback(
                rows.shape, NamedSharding(mesh, spec), lambda index: rows[index])
            print(name, permutation_error(sharded) == permutation_error(rows),
                  checksum(sharded) == checksum(rows), permutation_error(sharded) is None, sep="|")
jax.distributed.shutdown()
"""


def test_processes_prove_it_together() -> None:
    port = str(free_port())
    ranks = [run_program(PROCESSES, port, str(rank), devices=2) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for output in outputs:
        lines = [line.split("|") for line in output.splitlines() if "|" in line]
        assert len(lines) == 3 * 4 * 5
        assert all(line[1:3] == ["True", "True"] for line in lines), output
        assert {line[0] for line in lines if line[3] == "True"} == {"good"}
        assert len({line[0] for line in lines}) == 5
