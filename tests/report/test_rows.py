"""Rows of results: joined over seeds, summed up by one of them, read as version 0.1 wrote them."""

import numpy as np
import pytest

from nat_jax.report import rows
from nat_jax.report.rows import row


def test_seeds_are_joined():
    table = rows.aggregate(
        {
            0: [row("z", "nat", "knn", "all", 0.5), row("z", "untrained", "knn", "all", 0.2)],
            7: [row("z", "nat", "knn", "all", 0.7)],
        }
    )
    assert table[0]["seeds"] == [0, 7] and table[0]["values"] == [0.5, 0.7]
    np.testing.assert_allclose((table[0]["mean"], table[0]["std"]), (0.6, 0.02**0.5))
    assert (table[1]["mean"], table[1]["std"], table[1]["seeds"]) == (0.2, None, [0])


def table(*keys):
    """Return rows whose values are their places."""
    return [row(*key, place) for place, key in enumerate(keys)]


def test_the_headline_is_the_first_choice_that_there_is():
    found = table(
        ("pixels", "raw pixels", "knn", "all"),
        ("z", "untrained", "knn", "all"),
        ("conv4", "nat", "knn", "all"),
        ("z", "nat", "linear_probe", "all"),
        ("z", "nat", "knn", "10 per class"),
        ("z", "nat", "knn", "all"),
    )
    best, before = rows.headline(found)
    assert (best["value"], before["value"]) == (5, 1)
    best, before = rows.headline(found[:5])
    assert (best["value"], before) == (2, None)
    own = found + table(("z", "supervised_square", "own", "all"))
    assert rows.headline(own)[0]["probe"] == "own"
    assert rows.headline(found, [("z", "linear_probe", "all")])[0]["value"] == 3
    assert rows.headline(found, network="untrained")[0]["value"] == 1
    with pytest.raises(ValueError, match="expected rows of a trained network"):
        rows.headline(found[:2])


def test_numbers_of_labels_have_names():
    assert [rows.labels_name(x) for x in (0, 10, 0.01)] == [
        "all",
        "10 per class",
        "1 % of the labels",
    ]


def test_rows_of_version_0_1_are_translated():
    now = row("z", "nat", "knn", "all", 0.5)
    old = {"features": "z", **{key: value for key, value in now.items() if key != "layer"}}
    assert rows.current([old, now]) == [now, now]
