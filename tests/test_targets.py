import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax import targets

KEY = jax.random.key(3)

sphere_rows = jax.jit(targets.sphere_rows, static_argnums=2)
first_assignment = jax.jit(
    targets.initial_assignment, static_argnums=(0, 1), static_argnames="length"
)


@jax.jit
def gather(found, rows):
    return found.gather(rows)


def test_sphere_rows_have_unit_norm_and_no_direction():
    rows = np.asarray(sphere_rows(KEY, np.arange(4096, dtype=np.int32), 16))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    # For uniform rows the mean is about 1/sqrt(N) and the covariance I/D.
    assert np.linalg.norm(rows.mean(axis=0)) < 0.05
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(16) / 16, atol=0.01)


def test_table_and_virtual_rows_are_equal_to_two_ulp():
    table, used = targets.make_targets("sphere", 1003, 24, KEY, storage="table")
    virtual, also = targets.make_targets("sphere", 1003, 24, KEY, storage="virtual")
    assert (used, also) == ("table", "virtual")
    rows = np.int32([0, 1002, 17, 17])
    np.testing.assert_array_max_ulp(
        np.asarray(gather(table, rows)), np.asarray(gather(virtual, rows)), maxulp=2
    )


def test_rows_depend_on_the_key():
    rows = np.arange(4096, dtype=np.int32)
    one, other = (np.asarray(sphere_rows(key, rows, 16)) for key in (KEY, jax.random.key(4)))
    assert not np.isclose(one, other).all(axis=1).any()


def test_auto_chooses_by_size():
    assert targets.make_targets("sphere", 100, 8, KEY)[1] == "table"
    assert targets.make_targets("sphere", 2**26, 8, KEY)[1] == "virtual"


def test_basis_rows_repeat_with_period_k_and_serve_all_clusters_evenly():
    basis, _ = targets.make_targets("basis", 12, 4, KEY)
    rows = np.asarray(gather(basis, np.arange(12, dtype=np.int32)))
    np.testing.assert_array_equal(rows.sum(axis=0), [3, 3, 3, 3])
    np.testing.assert_array_equal(rows[5], [0, 1, 0, 0])


def test_first_assignment_is_a_permutation():
    for kind, identity in (("sphere", True), ("basis", False)):
        rows = np.asarray(first_assignment(kind, 50, KEY))
        np.testing.assert_array_equal(np.sort(rows), np.arange(50))
        assert np.array_equal(rows, np.arange(50)) == identity
        longer = np.asarray(first_assignment(kind, 50, KEY, length=64))
        np.testing.assert_array_equal(longer, [*rows, *range(50, 64)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="cube"), "targets.kind: expected one of sphere, basis, labels; got 'cube'"),
        (dict(storage="disk"), "targets.storage: expected one of auto, table, virtual"),
    ],
)
def test_unknown_kinds_are_named(change, message):
    arguments = dict(kind="sphere", storage="auto") | change
    with pytest.raises(ValueError, match=message):
        targets.make_targets(arguments["kind"], 4, 4, KEY, storage=arguments["storage"])


def test_auto_is_a_table_up_to_one_gibibyte(monkeypatch):
    monkeypatch.setattr(targets, "_build_table", lambda *arguments: jnp.zeros((1, 1024)))
    assert targets.make_targets("sphere", 2**18, 1024, KEY)[1] == "table"
    assert targets.make_targets("sphere", 2**18 + 1, 1024, KEY)[1] == "virtual"
    for storage in ("table", "virtual"):
        assert targets.make_targets("sphere", 8, 8, KEY, storage=storage)[1] == storage
    assert targets.make_targets("basis", 8, 8, KEY, storage="auto")[1] == "virtual"


@pytest.mark.parametrize("storage", ["table", "virtual", "auto"])
def test_more_records_than_int32_can_number_are_refused(storage):
    message = "at most 2,147,483,647 records, .* int32; got 2,147,483,648. Train on a part"
    for kind in targets.KINDS:
        with pytest.raises(ValueError, match=message):
            targets.make_targets(kind, 2**31, 8, KEY, storage=storage)
        with pytest.raises(ValueError, match=message):
            targets.initial_assignment(kind, 2**31, KEY)
    targets.check_num_records(2**31 - 1)


def test_a_table_is_the_same_however_it_is_cut_up(monkeypatch):
    whole, _ = targets.make_targets("sphere", 103, 8, KEY, storage="table")
    monkeypatch.setattr(targets, "_BUILD_CHUNK", 8 * 10)
    pieces, _ = targets.make_targets("sphere", 103, 8, KEY, storage="table")
    np.testing.assert_array_max_ulp(np.asarray(whole.rows), np.asarray(pieces.rows), maxulp=2)


@pytest.mark.parametrize(
    "dim", [24, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (2, 3, 2048))]
)
def test_rows_are_equal_to_two_ulp_in_every_program(dim):
    rows = np.arange(192, dtype=np.int32)

    def some(count):
        return np.concatenate([sphere_rows(KEY, part, dim) for part in rows.reshape(-1, count)])

    whole = some(192)
    np.testing.assert_allclose(np.linalg.norm(whole.astype(np.float64), axis=1), 1, atol=5e-7)
    one_by_one = jax.jit(
        lambda rows: jax.lax.map(lambda row: targets.sphere_rows(KEY, row, dim), rows)
    )
    eager = targets.sphere_rows(KEY, rows, dim)
    scaled = np.asarray(jax.jit(lambda rows: 2 * targets.sphere_rows(KEY, rows, dim))(rows)) / 2
    for other in (some(1), some(6), one_by_one(rows), eager, scaled):
        np.testing.assert_array_max_ulp(whole, np.asarray(other), maxulp=2)
