"""The proof that an assignment is a permutation: exact, by bits, over shards and processes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port, run_program

from nat_jax.training import assignment_state


def is_permutation(rows: np.ndarray) -> bool:
    return bool(np.array_equal(np.sort(rows), np.arange(rows.size)))


@pytest.mark.parametrize("size", range(6))
def test_every_short_array_is_judged_rightly(size: int) -> None:
    for values in itertools.product(range(-1, size + 1), repeat=size):
        rows = np.array(values, np.int32)
        assert (assignment_state.flaw(rows) is None) == is_permutation(rows), values


@pytest.mark.parametrize("size", [7, 8, 9, 16, 1000])
def test_random_arrays_are_judged_rightly(size: int) -> None:
    rng = np.random.default_rng(size)
    for change in range(200):
        rows = rng.permutation(size).astype(np.int32)
        assert assignment_state.flaw(jnp.asarray(rows)) is None
        if change % 2:  # bits that add up to what others would have added
            rows[rng.integers(0, size, 3)] = rng.integers(0, size)
        else:
            rows[rng.integers(0, size)] ^= 1 << rng.integers(0, 31)
        assert (assignment_state.flaw(rows) is None) == is_permutation(rows)


def test_bits_that_add_up_do_not_hide_a_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times 128 is 128 modulo 256, so the byte of rows 0..7 is full all the same."""
    rows = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10, 11, 12, 13], np.int32)
    message = "row 7 belongs to images 7 and 8 and 9 (rows are 0..15)"
    assert assignment_state.flaw(rows) == message
    monkeypatch.setattr(assignment_state, "_RANGE", 8)  # the range that is not full has only gaps
    assert assignment_state.flaw(rows) == message


def test_the_first_few_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assignment_state, "_BLOCK", 7)
    rows = np.arange(100, dtype=np.int32)
    rows[[3, 50, 60, 70]] = -5, 100, 2**31 - 1, 200
    assert assignment_state.flaw(rows) == (
        "image 3 has row -5; image 50 has row 100; image 60 has row 2147483647 (rows are 0..99)"
    )
    rows = np.arange(100, dtype=np.int32)
    rows[[1, 2, 30, 99]] = 90
    assert (
        assignment_state.flaw(rows)
        == "row 90 belongs to images 1 and 2 and 30 and others (rows are 0..99)"
    )
    rows = np.arange(100, dtype=np.int32)
    rows[50:] = rows[:50]
    assert assignment_state.flaw(rows) == (
        "row 0 belongs to images 0 and 50; row 1 belongs to images 1 and 51; "
        "row 2 belongs to images 2 and 52 (rows are 0..99)"
    )


def test_what_is_no_list_of_rows_is_named() -> None:
    assert "one dimension; got int32(2, 3)" in str(
        assignment_state.flaw(np.zeros((2, 3), np.int32))
    )
    assert "integers" in str(assignment_state.flaw(np.arange(3.0)))


def test_the_checksum_depends_on_every_entry_and_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(0).permutation(5000).astype(np.int32)
    expected = assignment_state.checksum(rows)
    assert assignment_state.checksum(jnp.asarray(rows)) == expected
    swapped = rows.copy()
    swapped[[17, 4000]] = swapped[[4000, 17]]
    assert assignment_state.checksum(swapped) != expected
    assert assignment_state.checksum(rows[::-1]) != expected
    found = {expected}
    for place, bit in itertools.product((0, 2500, 4999), range(32)):
        changed = rows.copy()
        changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
        found.add(assignment_state.checksum(changed))
    assert len(found) == 1 + 3 * 32
    monkeypatch.setattr(assignment_state, "_BLOCK", 64)
    assert assignment_state.checksum(rows) == expected


MEMORY = """
import sys
import numpy as np
from nat_jax.training import assignment_state

def peak():  # unlike getrusage's, this peak does not begin with that of the parent
    status = open("/proc/self/status").read()
    return int(status.partition("VmHWM:")[2].split()[0])

N = 50_000_000
rows = np.arange(N, dtype=np.int32)
rows[:1000] = rows[:1000][::-1]
if sys.argv[1] == "broken":
    rows[-1] = 7
assignment_state.flaw(rows[:1000])  # load what it needs
before = peak()
if sys.argv[1] == "sorted":
    np.sort(rows)
else:
    print(assignment_state.flaw(rows))
    assignment_state.checksum(rows)
print((peak() - before) * 1024 / N)
"""


@pytest.mark.parametrize(
    ("case", "least", "most"),
    [
        ("right", 1 / 8, 1),
        ("broken", 1 / 8, 1),
        ("sorted", 3.5, 10),
    ],
)
def test_it_needs_one_bit_an_image(case: str, least: float, most: float) -> None:
    """And a block's temporary arrays; sorting, the control, needs the 4 bytes of a copy."""
    output, _ = run_program(MEMORY, case).communicate(timeout=120)
    *said, per_image = output.splitlines()
    assert least * 0.9 <= float(per_image) <= most, output
    if said:
        assert said == [
            "None"
            if case == "right"
            else "row 7 belongs to images 992 and 49999999 (rows are 0..49999999)"
        ]


PROCESSES = """
import sys
import jax
port, rank = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nat_jax.training import assignment_state

assignment_state._CHUNK = 16  # bytes, so that several travel
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
            spread = jax.make_array_from_callback(
                rows.shape, NamedSharding(mesh, spec), lambda index: rows[index])
            print(name, assignment_state.flaw(spread) == assignment_state.flaw(rows),
                  assignment_state.checksum(spread) == assignment_state.checksum(rows),
                  assignment_state.flaw(spread), sep="|")
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
    rows = np.random.default_rng(0).permutation(1008)
    for output in outputs:
        lines = [line.split("|") for line in output.splitlines() if "|" in line]
        assert len(lines) == 3 * 4 * 5
        assert all(line[1:3] == ["True", "True"] for line in lines), output
        said = {line[0]: line[3] for line in lines}
        assert said == {
            "good": "None",
            "within": f"row {rows[5]} belongs to images 5 and 6 (rows are 0..1007)",
            "across": f"row {rows[5]} belongs to images 5 and 1000 (rows are 0..1007)",
            "far": f"row {rows[5]} belongs to images 5 and 520 (rows are 0..1007)",
            "out of range": "image 900 has row 1008 (rows are 0..1007)",
        }
