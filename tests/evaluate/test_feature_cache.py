"""Features on disk: found by all that they depend on, whole or not at all, within a bound."""

import os
import time

import numpy as np
import pytest

from nat_jax.evaluate.feature_cache import FeatureCache


def write(cache, name, count=6, width=3):
    """Write an entry of two batches, and return what it holds."""
    values = np.arange(count * width, dtype=np.float32).reshape(count, width)
    labels, index = np.arange(count, dtype=np.int32) % 2, np.arange(count, dtype=np.int32) * 10
    parts = [slice(0, 4), slice(4, count)]
    rows = (({"z": values[part]}, labels[part]) for part in parts)
    cache.write({"z": {"name": name}}, rows, [index[part] for part in parts])
    return values, labels, index


def test_what_was_written_is_found_by_its_key_alone(tmp_path):
    cache = FeatureCache(tmp_path / "features")
    assert cache.find({"name": "a"}) is None
    values, labels, index = write(cache, "a")
    found = FeatureCache(tmp_path / "features").find({"name": "a"})
    np.testing.assert_array_equal(found.data.features, values)
    np.testing.assert_array_equal(found.data.labels, labels)
    np.testing.assert_array_equal(found.index, index)
    assert isinstance(found.data.features, np.memmap)
    assert cache.find({"name": "b"}) is None


def test_nothing_is_left_of_what_was_stopped(tmp_path):
    cache = FeatureCache(tmp_path)

    def rows():
        yield {"z": np.zeros((2, 3), np.float32)}, np.zeros(2, np.int32)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cache.write({"z": {"name": "a"}}, rows(), [np.zeros(2, np.int32)])
    assert cache.find({"name": "a"}) is None and not list(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_goes_after_a_day(tmp_path):
    for name, age in ((".new.123", 60), (".old.123", 2 * 24 * 3600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features.f32").write_bytes(b"1234")
        os.utime(tmp_path / name, (0, 0))  # the folder is as old as its first file
        os.utime(tmp_path / name / "features.f32", (time.time() - age, time.time() - age))
    assert FeatureCache(tmp_path).has_room(10)
    assert [path.name for path in tmp_path.iterdir()] == [".new.123"]


def test_a_file_that_was_cut_is_computed_again(tmp_path, caplog):
    cache = FeatureCache(tmp_path)
    write(cache, "a")
    (file,) = tmp_path.glob("*/features.f32")
    os.truncate(file, 40)
    with caplog.at_level("WARNING", "nat_jax"):
        assert cache.find({"name": "a"}) is None
    assert "is damaged" in caplog.text and not file.exists()


def test_the_oldest_entries_go_when_there_is_no_room(tmp_path, caplog):
    cache = FeatureCache(tmp_path)
    for age, name in enumerate(("old", "older", "new")):
        write(cache, name, count=1000, width=100)
        (card,) = (c for c in tmp_path.glob("*/entry.json") if f'"{name}"' in c.read_text())
        os.utime(card, (1000 - 100 * (name == "older") + age, 1000 - 100 * (name == "older") + age))
    full = FeatureCache(tmp_path, most_bytes=1_300_000)
    assert full.has_room(400_000)
    assert full.find({"name": "older"}) is None
    assert full.find({"name": "old"}) is not None and full.find({"name": "new"}) is not None
    with caplog.at_level("INFO", "nat_jax"):
        assert not full.has_room(900_000)  # the two are in use
    assert "no room for" in caplog.text and full.find({"name": "old"}) is not None
    assert not FeatureCache(tmp_path, most_bytes=1_300_000).has_room(1_400_000)
