"""Runs tests/multi_device in a process of its own, on 8 simulated CPU devices."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_simulated_devices():
    environment = os.environ | {
        "NAT_JAX_DEVICES": "8",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "NPROC": "16",  # threads of XLA's CPU client, which may deadlock with fewer than devices
    }
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/multi_device"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
