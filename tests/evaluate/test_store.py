"""Features on disk: found by all that they depend on, complete or not at all, damage noticed."""

import dataclasses
import json
import os
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from sample_files import flip_bit

from nat_jax.evaluate import probe_data
from nat_jax.evaluate.probe_data import TEST, TRAIN, FeatureExtractor, ProbeData
from nat_jax.evaluate.store import FeatureStore
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import open_source
from nat_jax.input.transforms import eval_transform


def columns(start, stop):
    """Return rows of two layers, labels and record numbers."""
    rows = np.arange(start, stop, dtype=np.int32)
    wide = np.stack([rows, rows + 0.5, -rows], axis=1).astype(np.float32)
    return {"z": wide, "conv": wide[:, :2] * 2, "label": rows % 2, "index": rows * 10}


def write(folder, name="a", between=lambda: None):
    """Write two layers in two batches, and return them as the store does."""

    def parts():
        yield columns(0, 4)
        between()
        yield columns(4, 6)

    keys = {layer: {"name": name, "layer": layer} for layer in ("z", "conv")}
    return FeatureStore(folder).write(keys, parts())


def find(folder, layer="z", name="a"):
    return FeatureStore(folder).find({"name": name, "layer": layer})


def assert_complete(features, layer="z"):
    expected = columns(0, 6)
    np.testing.assert_array_equal(features.features, expected[layer])
    np.testing.assert_array_equal(features.labels, expected["label"])
    np.testing.assert_array_equal(features.index, expected["index"])


def test_what_was_written_is_found_by_its_key_alone(tmp_path):
    assert find(tmp_path / "features") is None
    written = write(tmp_path / "features")
    for layer in ("z", "conv"):
        for features in (written[layer], find(tmp_path / "features", layer)):
            assert_complete(features, layer)
            assert isinstance(features.features, np.memmap)
    assert find(tmp_path / "features", name="b") is None


def test_nothing_is_left_of_what_was_stopped(tmp_path):
    def stop():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write(tmp_path, between=stop)
    assert find(tmp_path) is None and not list(tmp_path.iterdir())


def test_what_a_killed_process_was_writing_is_deleted_after_a_day(tmp_path):
    for name, age in ((".new.partial", 60), (".old.partial", 2 * 24 * 3600)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    write(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".new.partial"]


def flip_last(file):
    flip_bit(file, -1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("features.npy", flip_last),
        ("features.npy", lambda file: os.truncate(file, 140)),
        ("features.npy", Path.unlink),
        ("index.npy", flip_last),
        ("entry.json", lambda file: os.truncate(file, 30)),
        ("entry.json", lambda file: file.write_text("{}")),
        ("entry.json", lambda file: file.write_text(file.read_text().replace("z", "y"))),
        ("entry.json", Path.unlink),
    ],
)
def test_a_damaged_entry_is_deleted(tmp_path, caplog, file, damage):
    write(tmp_path)
    places = [p.parent for p in tmp_path.glob("*/entry.json") if '"z"' in p.read_text()]
    damage(places[0] / file)
    with caplog.at_level("WARNING", "nat_jax"):
        assert find(tmp_path) is None
    (message,) = caplog.messages
    assert "is damaged" in message and "computed again" in message and not places[0].exists()
    assert_complete(find(tmp_path, "conv"), "conv")


def test_of_two_processes_that_write_the_same_the_faster_one_is_kept(tmp_path):
    def inodes():
        return sorted(path.stat().st_ino for path in tmp_path.glob("[!.]*/features.npy"))

    theirs = []
    written = write(tmp_path, between=lambda: (write(tmp_path), theirs.extend(inodes())))
    assert inodes() == theirs and not list(tmp_path.glob(".*"))
    shutil.rmtree(tmp_path)
    assert_complete(written["z"])  # mapped, though its file is gone


class Extracted:
    """Digits under a function of two layers, of 4 * 30 and 4 * 20 bytes a record."""

    def __init__(self, folder):
        train, test = (open_source("digits", split) for split in (TRAIN, TEST))
        self.calls = 0
        self.data = ProbeData(
            train,
            test,
            batch_size=32,
            reading={"threads": 1, "workers": 0, "prefetch": 2, "timeout": 60.0},
            max_train=100,
            cache=ImageCache(),
            store=folder and FeatureStore(folder),
        )
        transform = eval_transform(image_size=8, resize=0)
        self.extractor = FeatureExtractor(
            "some", ("wide", "narrow"), lambda _: self.apply, transform, lambda: "a fingerprint"
        )

    def apply(self, images):
        self.calls += 1
        flat = np.asarray(images, np.float32).reshape(len(images), -1)
        return {"wide": flat[:, 60:90], "narrow": flat[:, 90:110]}

    def sets(self):
        return self.data.sets(self.extractor)


def assert_equal(some, others):
    for layers, expected in zip(some, others, strict=True):
        assert list(layers) == list(expected) == ["wide", "narrow"]
        for layer, features in expected.items():
            for name in ("features", "labels", "index"):
                np.testing.assert_array_equal(getattr(layers[layer], name), getattr(features, name))


def test_features_are_the_same_in_memory_on_disk_and_read_back(tmp_path):
    in_memory = Extracted(None).sets()
    assert in_memory[0]["wide"].features.any()
    assert_equal(Extracted(tmp_path).sets(), in_memory)
    again = Extracted(tmp_path)
    assert_equal(again.sets(), in_memory)
    assert again.calls == 0
    shutil.rmtree(next(tmp_path.iterdir()))
    assert_equal(again.sets(), in_memory)
    assert 0 < again.calls <= 12


def test_without_a_store_an_extractor_computes_once_and_takes_its_features_along():
    extracted = Extracted(None)
    wide, calls = weakref.ref(extracted.sets()[0]["wide"]), extracted.calls
    assert extracted.data.extract(extracted.extractor, TRAIN, ("wide",))["wide"] is wide()
    assert extracted.calls == calls > 0
    extracted.extractor = dataclasses.replace(extracted.extractor)  # another, as of other weights
    assert wide() is None
    extracted.sets()
    assert extracted.calls == 2 * calls


def test_too_much_is_found_out_with_the_first_batch(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    # Room for the records to learn on alone.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 * 4 * 50 + 2000))
    extracted = Extracted(tmp_path)
    with pytest.raises(ValueError, match=r"features: .*eval\.max_train.*eval\.layers") as error:
        extracted.sets()
    assert "\n" not in str(error.value)
    assert extracted.calls <= 2 and not list(tmp_path.iterdir())  # one batch is computed ahead


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (probe_data, "__version__", "0.0.0"),
        (probe_data.jax, "__version__", "0.0.0"),
        (probe_data.jax, "default_backend", lambda: "abacus"),
        (probe_data.jax, "local_device_count", lambda: 1000),
        (probe_data.platform, "machine", lambda: "abacus"),
    ],
)
def test_features_are_those_of_these_versions_and_this_hardware(
    tmp_path, monkeypatch, owner, name, value
):
    Extracted(tmp_path).sets()
    monkeypatch.setattr(owner, name, value)
    again = Extracted(tmp_path)
    again.sets()
    assert again.calls > 0
    cards = list(tmp_path.glob("*/entry.json"))
    key = json.loads(cards[0].read_text())["key"]
    assert len(cards) == 8 and key["device"] == probe_data.jax.devices()[0].device_kind
