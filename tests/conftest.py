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

import pytest  # noqa: E402

# Files of few long tests, whose processes use both cores: first, so that neither worker is left
# with one of them at the end.
_FIRST = ("test_multi_device.py", "test_training.py", "test_train.py", "test_tasks.py")


def pytest_configure(config: pytest.Config) -> None:
    """Compile with fewer passes over the machine code, unless slow tests are to run too.

    Compiling is most of what the quick tests do, and halves so. What XLA itself optimises stays.
    """
    if config.option.markexpr == "not slow":
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
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
