"""Features on disk: found by all that they depend on, whole or not at all, within a bound."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from nat_jax.evaluate import feature_cache, probe_data
from nat_jax.evaluate.feature_cache import FeatureCache, available_memory, entry_bytes
from nat_jax.evaluate.probe_data import TEST, TRAIN, ProbeData, Reading, Subject
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import open_source
from nat_jax.input.transforms import eval_transform


def write(cache, name, count=6, width=3, between=lambda: None):
    """Write an entry of two batches; return what it holds, and what the cache gives for it."""
    values = np.arange(count * width, dtype=np.float32).reshape(count, width)
    labels, index = np.arange(count, dtype=np.int32) % 2, np.arange(count, dtype=np.int32) * 10
    parts = [slice(0, 4), slice(4, count)]

    def rows():
        for part in parts:
            yield {"z": values[part]}, labels[part]
            between()

    written = cache.write({"z": {"name": name}}, rows(), [index[part] for part in parts])
    return (values, labels, index), written["z"]


def the_same(entry, expected):
    held = (entry.data.features, entry.data.labels, entry.index)
    return all(np.array_equal(one, other) for one, other in zip(held, expected, strict=True))


def test_what_was_written_is_found_by_its_key_alone(tmp_path):
    cache = FeatureCache(tmp_path / "features")
    assert cache.find({"name": "a"}) is None
    expected, written = write(cache, "a")
    size = sum(file.stat().st_size for file in tmp_path.glob("features/*/*"))
    assert size <= entry_bytes(records=6, width=3)
    found = FeatureCache(tmp_path / "features").find({"name": "a"})
    for entry in (written, found):
        assert the_same(entry, expected) and isinstance(entry.data.features, np.memmap)
    assert cache.find({"name": "b"}) is None


def test_nothing_is_left_of_what_was_stopped(tmp_path):
    cache = FeatureCache(tmp_path)

    def stop():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write(cache, "a", between=stop)
    assert cache.find({"name": "a"}) is None and not list(tmp_path.iterdir())


def test_an_entry_gets_its_name_once_the_disk_has_all_of_it(tmp_path, monkeypatch):
    synced, renamed = set(), []
    fsync, replace = os.fsync, Path.replace

    def noting(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checking(place, target):
        files = {path.name: path.stat().st_ino for path in (place, *place.iterdir())}
        assert len(files) == 5 and set(files.values()) <= synced
        synced.clear()
        renamed.append(target)
        return replace(place, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "replace", checking)
    write(FeatureCache(tmp_path), "a")
    assert len(renamed) == 1 and synced == {tmp_path.stat().st_ino}


def test_what_a_killed_process_was_writing_goes_after_a_day(tmp_path):
    for name, age in ((".new.123", 60), (".old.123", 2 * 24 * 3600)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "features.f32").write_bytes(b"1234")
        os.utime(tmp_path / name, (0, 0))  # the folder is as old as its first file
        os.utime(tmp_path / name / "features.f32", (time.time() - age, time.time() - age))
    FeatureCache(tmp_path).make_room(10)
    assert [path.name for path in tmp_path.iterdir()] == [".new.123"]


def zero_half(file):
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        opened.write(bytes(file.stat().st_size - file.stat().st_size // 2))


def flip_last(file):
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


@pytest.mark.parametrize("again", [False, True], ids=["first use", "used before"])
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("features.f32", zero_half),
        ("features.f32", lambda file: os.truncate(file, 40)),
        ("features.f32", Path.unlink),
        ("labels.npy", lambda file: os.truncate(file, 100)),
        ("labels.npy", lambda file: os.truncate(file, 0)),
        ("index.npy", flip_last),
        ("entry.json", lambda file: os.truncate(file, 30)),
        ("entry.json", lambda file: file.write_text("[]")),
        ("entry.json", lambda file: file.write_text("{}")),
        ("entry.json", lambda file: file.write_bytes(b"\xff\xfe")),
        ("entry.json", lambda file: file.write_text(file.read_text().replace("3", "2"))),
        ("entry.json", Path.unlink),
    ],
)
def test_a_damaged_entry_is_computed_again(tmp_path, caplog, file, damage, again):
    cache = FeatureCache(tmp_path)
    expected, _ = write(cache, "a")
    (place,) = tmp_path.iterdir()
    damage(place / file)
    if not again:
        cache = FeatureCache(tmp_path)
    with caplog.at_level("WARNING", "nat_jax"):
        assert cache.find({"name": "a"}) is None
    (said,) = caplog.messages
    assert "is damaged" in said and "computed again" in said and not list(tmp_path.iterdir())
    write(cache, "a")
    assert the_same(FeatureCache(tmp_path).find({"name": "a"}), expected)


def test_checksums_are_compared_once_in_a_process(tmp_path, monkeypatch):
    write(FeatureCache(tmp_path), "a")
    compared, checksum = [], feature_cache._checksum
    monkeypatch.setattr(
        feature_cache, "_checksum", lambda file: compared.append(file.name) or checksum(file)
    )
    monkeypatch.setattr(feature_cache, "_PIECE", 7)  # of files that are no multiple of it
    cache = FeatureCache(tmp_path)
    for _ in range(3):
        assert cache.find({"name": "a"}) is not None
    assert compared == ["features.f32", "labels.npy", "index.npy"]


def test_the_oldest_entries_go_when_there_is_no_room(tmp_path, caplog):
    cache = FeatureCache(tmp_path)
    for age, name in enumerate(("old", "older", "new")):
        write(cache, name, count=1000, width=100)
        (card,) = (c for c in tmp_path.glob("*/entry.json") if f'"{name}"' in c.read_text())
        os.utime(card, (1000 - 100 * (name == "older") + age, 1000 - 100 * (name == "older") + age))
    full = FeatureCache(tmp_path, 1_300_000, most_memory=1_000_000)
    assert full.plan({"z": 400_000}) == {"z"}
    full.make_room(400_000)
    assert full.find({"name": "older"}) is None
    assert full.find({"name": "old"}) is not None and full.find({"name": "new"}) is not None
    with caplog.at_level("INFO", "nat_jax"):
        assert full.plan({"z": 900_000}) == set()  # the two are in use
    assert "held in memory" in caplog.text and full.find({"name": "old"}) is not None


def test_what_an_earlier_reader_used_may_go(tmp_path):
    cache = FeatureCache(tmp_path, 500_000, most_memory=500_000)
    cache.serve("one network")
    write(cache, "a", count=1000, width=100)
    assert cache.plan({"z": 400_000}) == set()
    cache.serve("one network")
    assert cache.plan({"z": 400_000}) == set()
    cache.serve("the next")
    assert cache.plan({"z": 400_000}) == {"z"}
    cache.make_room(400_000)
    assert not list(tmp_path.iterdir())


def test_what_is_in_use_stays_though_another_process_used_newer_entries(tmp_path):
    cache = FeatureCache(tmp_path, 900_000)
    write(cache, "in use", count=1000, width=100)
    (card,) = tmp_path.glob("*/entry.json")
    os.utime(card, (1000, 1000))
    write(FeatureCache(tmp_path), "newer", count=1000, width=100)
    cache.make_room(400_000)
    assert list(tmp_path.glob("*/entry.json")) == [card]


def test_each_layer_finds_its_own_room_and_too_many_are_one_message(tmp_path):
    cache = FeatureCache(tmp_path / "not there yet", 1000, most_memory=500)
    assert cache.plan({"z": 200, "conv1": 800, "conv2": 300}) == {"conv1", "z"}
    with pytest.raises(
        ValueError, match=r"1.4e-06 GB are asked for.*may be used.*eval\.max_train"
    ) as error:
        cache.plan({"conv1": 800, "conv2": 600})
    assert "eval.max_features" in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_half_of_the_free_disk_and_of_the_available_memory_are_bounds(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(feature_cache, "available_memory", lambda: 400)
    cache = FeatureCache(tmp_path)
    assert cache.plan({"a": 500, "b": 200}) == {"a"}
    with pytest.raises(ValueError, match="may be used"):
        cache.plan({"a": 500, "b": 201})


def test_the_host_states_its_memory(monkeypatch):
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < available_memory() <= everything

    def missing(_):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert available_memory() == everything


def test_of_two_processes_that_write_the_same_the_faster_one_is_kept(tmp_path):
    theirs = []

    def other():
        if not theirs:
            write(FeatureCache(tmp_path), "a")
            theirs.extend(path.stat().st_ino for path in tmp_path.glob("[!.]*/features.f32"))

    expected, written = write(FeatureCache(tmp_path), "a", between=other)
    (place,) = tmp_path.iterdir()
    assert [(place / "features.f32").stat().st_ino] == theirs and the_same(written, expected)


def test_what_is_read_outlives_what_another_process_deletes(tmp_path):
    expected, written = write(FeatureCache(tmp_path), "a")
    FeatureCache(tmp_path, most_bytes=10).make_room(10)
    assert not list(tmp_path.iterdir()) and the_same(written, expected)


def test_folders_may_vanish_while_they_are_looked_at(tmp_path, monkeypatch):
    write(FeatureCache(tmp_path), "a")
    (tmp_path / ".half.123").mkdir()
    (tmp_path / ".stray").touch()
    iterdir, seen = Path.iterdir, []

    def vanishing(path):
        if path != tmp_path:
            seen.append(path.name[:5])
            shutil.rmtree(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", vanishing)
    cache = FeatureCache(tmp_path)
    cache.make_room(10)
    monkeypatch.undo()
    assert {".half", ".stra"} < set(seen) and len(seen) == 3  # and the entry
    assert [path.name for path in tmp_path.iterdir()] == [".stray"]
    assert cache.find({"name": "a"}) is None


def test_what_another_process_is_still_writing_is_no_entry(tmp_path):
    (tmp_path / ".half.123").mkdir()
    for name in ("entry.json", "features.f32"):
        (tmp_path / ".half.123" / name).write_bytes(bytes(2000))
    cache = FeatureCache(tmp_path, most_bytes=1000)
    assert cache.plan({"z": 900}) == {"z"}
    cache.make_room(900)
    assert len(list(tmp_path.glob("*/features.f32"))) == 1


class Judged:
    """Digits under a function of two layers, of 4 * 30 and 4 * 20 bytes a record."""

    def __init__(self, folder, most_bytes=1 << 30, most_memory=None, name="some"):
        train, test = (open_source("digits", split) for split in (TRAIN, TEST))
        self.calls = 0
        self.data = ProbeData(
            train,
            test,
            reading=Reading(32, threads=1, workers=0, prefetch=2, timeout=60.0),
            max_train=100,
            cache=ImageCache(),
            keep=folder and FeatureCache(folder, most_bytes, most_memory),
        )
        transform = eval_transform(image_size=8, resize=0)
        self.subject = Subject(
            name, ("wide", "narrow"), lambda _: self.apply, transform, lambda: {"name": name}
        )

    def apply(self, images):
        self.calls += 1
        flat = np.asarray(images, np.float32).reshape(len(images), -1)
        return {"wide": flat[:, 60:90], "narrow": flat[:, 90:110]}

    def extract(self):
        return [self.data.extract(self.subject, split) for split in (TRAIN, TEST)]


def cards(folder):
    return list(folder.glob("*/entry.json"))


def mapped(entries):
    return [layer for layer in entries if isinstance(entries[layer].data.features, np.memmap)]


def assert_equal(some, others):
    for entries, expected in zip(some, others, strict=True):
        assert list(entries) == list(expected) == ["wide", "narrow"]
        for layer, entry in expected.items():
            assert the_same(entries[layer], (entry.data.features, entry.data.labels, entry.index))


def test_layers_for_which_the_disk_has_no_room_are_held_in_memory(tmp_path):
    whole = Judged(None).extract()
    assert whole[0]["wide"].data.features.any() and not mapped(whole[0])
    memory = entry_bytes(360, 20)
    disk = sum(entry_bytes(*size) for size in ((100, 30), (360, 30), (100, 20)))
    some = Judged(tmp_path, disk, memory).extract()
    assert [mapped(entries) for entries in some] == [["wide", "narrow"], ["wide"]]
    assert_equal(some, whole)
    again = Judged(tmp_path)
    assert_equal(again.extract(), whole)
    assert mapped(again.extract()[0]) == ["wide", "narrow"]


def test_too_much_is_found_out_before_any_work(tmp_path):
    # Those to learn on have room for themselves, but those to be judged on have not beside them.
    judged = Judged(tmp_path, most_bytes=60_000, most_memory=entry_bytes(360, 20))
    with pytest.raises(ValueError, match="are asked for at once"):
        judged.extract()
    assert judged.calls <= 2 and not list(tmp_path.glob("*"))  # one batch is computed ahead


def test_a_subject_takes_the_room_of_the_one_before(tmp_path):
    bound = sum(entry_bytes(records, width) for records in (100, 360) for width in (30, 20))
    judged = Judged(tmp_path, bound, most_memory=0)
    one = judged.extract()
    judged.subject = Judged(None, name="next").subject
    other = judged.extract()
    assert_equal(one, other)
    names = {json.loads(card.read_text())["key"]["subject"]["name"] for card in cards(tmp_path)}
    assert names == {"next"} and len(cards(tmp_path)) == 4


def test_damaged_features_do_not_reach_a_probe(tmp_path, caplog):
    Judged(tmp_path).extract()
    for file in tmp_path.glob("*/features.f32"):
        zero_half(file)
    with caplog.at_level("WARNING", "nat_jax"):
        assert_equal(Judged(tmp_path).extract(), Judged(None).extract())
    assert caplog.text.count("is damaged") == 4


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
    Judged(tmp_path).extract()
    again = Judged(tmp_path)
    again.extract()
    assert again.calls == 0
    monkeypatch.setattr(owner, name, value)
    again.extract()
    assert again.calls > 0
    key = json.loads(cards(tmp_path)[0].read_text())["key"]
    assert len(cards(tmp_path)) == 8 and key["device"] == probe_data.jax.devices()[0].device_kind
