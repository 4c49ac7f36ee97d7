import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax import targets

KEY = jax.random.key(3)


def test_sphere_rows_have_unit_norm_and_no_direction():
    rows = np.asarray(targets.sphere_rows(KEY, jnp.arange(4096), 16))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    # For uniform rows the mean is about 1/sqrt(N) and the covariance I/D.
    assert np.linalg.norm(rows.mean(axis=0)) < 0.05
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(16) / 16, atol=0.01)


def test_table_and_virtual_rows_are_equal_to_two_ulp():
    table, used = targets.make_targets("sphere", 1003, 24, KEY, storage="table")
    virtual, also = targets.make_targets("sphere", 1003, 24, KEY, storage="virtual")
    assert (used, also) == ("table", "virtual")
    rows = jnp.asarray([0, 1002, 17, 17])
    np.testing.assert_array_max_ulp(
        np.asarray(table.gather(rows)), np.asarray(jax.jit(virtual.gather)(rows)), maxulp=2
    )


def test_rows_depend_on_the_key():
    other = targets.sphere_rows(jax.random.key(4), jnp.arange(8), 16)
    assert not np.allclose(targets.sphere_rows(KEY, jnp.arange(8), 16), other)


def test_auto_chooses_by_size():
    assert targets.make_targets("sphere", 100, 8, KEY)[1] == "table"
    assert targets.make_targets("sphere", 2**26, 8, KEY)[1] == "virtual"


def test_basis_rows_repeat_with_period_k_and_serve_all_clusters_evenly():
    basis, _ = targets.make_targets("basis", 12, 4, KEY)
    rows = np.asarray(basis.gather(jnp.arange(12)))
    np.testing.assert_array_equal(rows.sum(axis=0), [3, 3, 3, 3])
    np.testing.assert_array_equal(rows[5], [0, 1, 0, 0])


def test_first_assignment_is_a_permutation():
    for kind, identity in (("sphere", True), ("basis", False)):
        rows = np.asarray(targets.initial_assignment(kind, 50, KEY))
        np.testing.assert_array_equal(np.sort(rows), np.arange(50))
        assert np.array_equal(rows, np.arange(50)) == identity


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="cube"), "targets.kind: expected one of sphere, basis; got 'cube'"),
        (dict(storage="disk"), "targets.storage: expected one of auto, table, virtual"),
    ],
)
def test_unknown_kinds_are_named(change, message):
    arguments = dict(kind="sphere", storage="auto") | change
    with pytest.raises(ValueError, match=message):
        targets.make_targets(arguments["kind"], 4, 4, KEY, storage=arguments["storage"])
