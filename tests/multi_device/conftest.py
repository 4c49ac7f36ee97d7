"""These tests need 8 devices; ../test_multi_device.py runs them with simulated ones."""

import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("NAT_JAX_DEVICES") == "8" else ["test_*.py"]

# The reader of compiled programs, and the problems of the solver's tests.
_REPOSITORY = Path(__file__).resolve().parents[2]
sys.path += [str(_REPOSITORY / "benchmarks"), str(_REPOSITORY / "tests" / "assign")]
