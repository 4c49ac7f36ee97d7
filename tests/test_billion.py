"""The benchmark of a billion images, run on ten million."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT

RECORDS = 10_000_000


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python where the package, the benchmarks and the tests can be imported."""
    folders = (ROOT, ROOT / "benchmarks", ROOT / "tests")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_ten_million_images_train_in_little_memory(tmp_path: Path) -> None:
    output = tmp_path / "billion.json"
    arguments = ("--records", str(RECORDS), "--steps", "6", "--scratch", tmp_path)
    done = run(ROOT / "benchmarks" / "billion.py", *arguments, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(output.read_text())["rows"]
    assert row["faults"] == []
    assert row["images_touched"] > 1000 and row["images_moved"] > 100
    share = 4 * row["permutation_length"] / row["devices"]
    for memory in row["program_bytes_a_device"].values():
        # The permutation is donated, and beside it there is nothing that grows with the data set.
        assert share <= memory["donated"] < share + 10**6
        assert memory["temporary"] < 10**6
    assert row["check"]["bytes"] < RECORDS / 8 + 4 * 10**6
    assert row["peak_bytes"]["ran"] < 10**9
    assert 3 * RECORDS < row["checkpoint"]["bytes"] < 5 * RECORDS
    assert list(tmp_path.iterdir()) == [output]


BROKEN = """
import sys
from pathlib import Path
import billion  # before jax, whose devices it simulates
import jax.numpy as jnp
from nat_jax import targets, train_step
from nat_jax.training import host_matching

def faults():
    host_matching.compile_step.cache_clear()
    print(*billion.measure(400_000, 4, Path(sys.argv[1]))["faults"], sep="|", end="||")

make_targets = targets.make_targets
targets.make_targets = lambda *a, storage: make_targets(*a, storage="table")
faults()
targets.make_targets = make_targets

write_down = train_step.write_down
train_step.write_down = lambda state, index, rows: write_down(state, index, rows.at[1].set(rows[0]))
faults()
train_step.write_down = write_down

class Forgetful(billion.Checkpoints):
    def restore(self, *a, **k):
        state, meta = super().restore(*a, **k)
        rows = jnp.roll(state.assignment, 1)
        return billion.dataclasses.replace(state, assignment=rows), meta

billion.Checkpoints = Forgetful
billion.MOST_BYTES = 10**8
faults()
"""


@pytest.mark.slow
def test_what_it_looks_for_would_be_found(tmp_path: Path) -> None:
    done = run("-c", BROKEN, tmp_path)
    table, twice, forgetful = (each.split("|") for each in done.stdout.split("||")[:3])
    assert f"plain: an array of {400_000 * 16:,} elements" in table, done.stderr
    assert twice[0] == "the images that were touched own other rows than before"
    assert twice[1].startswith("not a permutation: row")
    assert forgetful[0] == "a checkpoint brought back another permutation"
    assert forgetful[1].endswith(" GB")


MANY = """
import resource, runpy, sys
from faulty_records import Faulty
from nat_jax.input import sources
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # should it go on, it shall not go far
count = int(sys.argv.pop(1))
sources.SOURCES["arrays"] = lambda argument, split: Faulty(count if split == "train" else 100)
runpy.run_module("nat_jax.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (2**31, "expected at most 2147483647, as their numbers are int32"),
        (2**31 - 1, "expected at most 2,147,389,440 records for a permutation that is sharded"),
    ],
)
def test_more_images_than_int32_numbers_are_refused(
    records: int, message: str, tmp_path: Path
) -> None:
    config = ROOT / "configs" / "smoke.py"
    source = ("--config.data.source=arrays:many", "--config.data.image_size=8")
    done = run("-c", MANY, str(records), f"--config={config}", *source, f"--workdir={tmp_path}/run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
