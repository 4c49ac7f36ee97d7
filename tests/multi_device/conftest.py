"""These tests need 8 devices; ../test_multi_device.py runs them with simulated ones."""

import os

collect_ignore_glob = [] if os.environ.get("NAT_JAX_DEVICES") == "8" else ["test_*.py"]
