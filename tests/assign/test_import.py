import pytest
from project import python

HEAVY = ("flax", "grain", "tensorflow_datasets", "tensorflow", "optax", "scipy", "orbax")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*(m for m in {HEAVY} if m in sys.modules))"
    return set(python("-c", code).stdout.split())


@pytest.fixture(scope="module")
def loaded_by_jax() -> set[str]:
    return loaded_after("import jax.numpy")


def test_solving_loads_jax_and_numpy_alone(loaded_by_jax: set[str]) -> None:
    solve = "import nat_jax.assign as a; a.auction([[1.0, 2.0], [3.0, 5.0]]).check()"
    assert loaded_after(solve) <= loaded_by_jax


def test_the_check_notices(loaded_by_jax: set[str]) -> None:
    assert "optax" in loaded_after("import nat_jax.assign, optax") - loaded_by_jax
