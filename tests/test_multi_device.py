"""Runs tests/multi_device in processes with 8 simulated CPU devices."""

import os
import subprocess
import sys

import pytest
from project import ROOT

FOLDER = "tests/multi_device"
LARGEST = f"{FOLDER}/test_meshes_agree.py"


def run(*arguments: str, **settings: str) -> None:
    environment = os.environ | {
        "NAT_JAX_DEVICES": "8",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",  # threads of XLA's CPU client, which may deadlock with fewer than devices
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("files", [(LARGEST,), (FOLDER, f"--ignore={LARGEST}")])
def test_on_eight_simulated_devices(files):
    """In two parts, for two workers: compiling, most of the time, takes one core."""
    run(*files, JAX_DISABLE_MOST_OPTIMIZATIONS="1")  # of the machine code: collectives remain


ULPS = "shares_and_virtual_rows"  # are equal to two ulp with all optimisations only


@pytest.mark.slow
def test_slow_ones_on_eight_simulated_devices():
    run(FOLDER, "-m", "slow", "-k", f"not {ULPS}", JAX_DISABLE_MOST_OPTIMIZATIONS="1")


@pytest.mark.slow
def test_ulps_on_eight_simulated_devices():
    run(f"{FOLDER}/test_programs.py", "-m", "slow", "-k", ULPS)
