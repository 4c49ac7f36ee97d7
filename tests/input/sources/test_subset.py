"""The first records of each class."""

import pickle

import numpy as np
import pytest

from nat_jax.input.sources import open_source
from nat_jax.input.sources.subset import first_of_class


def test_it_takes_the_first_of_each_class_in_order():
    whole = open_source("digits")
    part = open_source("digits", per_class=3)
    assert len(part) == 30
    np.testing.assert_array_equal(np.bincount(part.labels), np.full(10, 3))
    expected = [i for i in range(200) if (whole.labels[:i] == whole.labels[i]).sum() < 3]
    assert [part.record_name(i) for i in range(30)] == [whole.record_name(i) for i in expected]
    assert [part[i]["index"] for i in range(30)] == list(range(30))
    np.testing.assert_array_equal(part[29]["image"], whole[expected[29]]["image"])
    assert part[29]["label"] == part.labels[29]
    assert pickle.loads(pickle.dumps(part)).fingerprint == part.fingerprint


def test_its_fingerprint_is_its_own_and_the_test_split_stays_whole():
    prints = {open_source("digits", per_class=n).fingerprint for n in (0, 3, 4)}
    assert len(prints) == 3
    assert len(open_source("digits", "test", per_class=3)) == 360


class Hidden:
    """Digits whose labels are known only from their records, as in array_record shards."""

    def __init__(self, *, classes=True):
        self._digits = open_source("digits")
        self.labels, self.num_classes = None, 10 if classes else None

    def __getattr__(self, name):
        return getattr(self._digits, name)

    def __len__(self):
        return len(self._digits)

    def __getitem__(self, index):
        return self._digits[index]


def test_labels_that_are_not_known_are_read():
    np.testing.assert_array_equal(
        first_of_class(Hidden(), 3).labels, open_source("digits", per_class=3).labels
    )


def test_what_cannot_be_taken_is_refused():
    with pytest.raises(ValueError, match=r"data.per_class: expected at most \d+, the records of c"):
        open_source("digits", per_class=1000)
    with pytest.raises(ValueError, match="data.per_class: expected labelled records; digits has"):
        first_of_class(Hidden(classes=False), 3)
