"""The benchmark of a billion images, run on ten million."""

import json
import os
import subprocess
import sys
from pathlib import Path

from project import ROOT

RECORDS = 10_000_000


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "billion.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_ten_million_images_train_in_little_memory(tmp_path: Path) -> None:
    output = tmp_path / "billion.json"
    done = run("--records", str(RECORDS), "--steps", "6", "--output", str(output))
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
