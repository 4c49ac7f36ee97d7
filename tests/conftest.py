"""What all tests share."""

import os
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[1]

# Before jax starts: it reads these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
    os.environ.setdefault("NPROC", "2")  # host callbacks hang on a single thread
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_REPOSITORY / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("NAT_JAX_CACHE", str(_REPOSITORY / ".pytest_cache" / "nat_jax"))
# Fewer passes over the machine code: compiling is most of what tests do. What XLA itself optimises
# stays. Quick and slow tests have the same flags, so that either find the other's programs.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import pytest  # noqa: E402

# Files that take long: first, so that neither worker is left with one of them at the end.
_FIRST = ("test_multi_device.py", "test_training.py", "test_train.py", "test_tasks.py")
# Of the slow tests too, the longest first.
_SLOW_FIRST = (
    "test_shown_commands.py",
    "test_training.py",
    "test_multi_device.py",
    "test_notebooks.py",
    "test_launch.py",
    "test_pages.py",
    "test_golden.py",
    "test_suite.py",
    "test_train.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "slow":
        place = {name: number for number, name in enumerate(_SLOW_FIRST)}
        items.sort(key=lambda item: place.get(item.path.name, len(place)))
    else:
        items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image data beside the checkout; tests that want it are skipped where it is not."""
    path = _REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no real data in {path}")
    return path


@pytest.fixture(scope="session")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of two seeds, one epoch each; it is not written to."""
    from small_run import tiny

    from nat_jax.train import train_and_evaluate

    workdir = tmp_path_factory.mktemp("two_seeds")
    train_and_evaluate(tiny(epochs=1.0, seeds=(0, 3)), workdir)
    return workdir
