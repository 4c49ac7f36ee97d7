"""Runs tests/multi_device in processes of their own, on 8 simulated CPU devices."""

import os
import subprocess
import sys

import pytest
from project import ROOT

FOLDER = "tests/multi_device"
LARGEST = f"{FOLDER}/test_meshes_agree.py"


def run(*arguments: str, **settings: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "NAT_JAX_DEVICES": "8",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",  # threads of XLA's CPU client, which may deadlock with fewer than devices
        **settings,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_passed(*runs: subprocess.Popen[str]) -> None:
    try:
        for process in runs:
            output, _ = process.communicate(timeout=900)
            assert process.returncode == 0, output
    finally:
        for process in runs:
            process.kill()


def test_on_eight_simulated_devices():
    """In two processes side by side: compiling, most of the work, takes one core."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of the machine code: collectives remain
    assert_passed(run(LARGEST, **quick), run(FOLDER, f"--ignore={LARGEST}", **quick))


@pytest.mark.slow
def test_what_takes_longer_on_eight_simulated_devices():
    assert_passed(run(FOLDER, "-m", "slow"))
