"""The index of `folder:`: what is in it, when it is used again, and what it costs."""

import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from project import ROOT
from sample_files import SPLIT_TREE, names, write_tree, zip_tree

from nat_jax.input.sources import (
    Source,
    UnreadableRecord,
    file_index,
    file_listing,
    index_cache,
    open_source,
    zip_archive,
)

# Trees of files whose sizes are the squares of their positions, with what the first release made
# of them. Runs and results of users carry these fingerprints: they must never change.
KNOWN = {
    "splits": (
        ["train/b/1.jpg", "train/b/2.png", "train/b-c/1.jpg", "train/b/2/0.jpg"]
        + ["train/b/10.JPEG", "train/a/é.jpg", "train/a/日本.webp", "val/b/1.jpg"]
        + ["val/new/0.gif", "outside/x/0.jpg", "train/b/notes.txt", "train/.git/0.jpg"],
        "d21670db832b87d2e09ff3b5f9fcb3cbe38d1c4889ecabb020d52e1040d78a99",
        "22b2134b4f8e7a00f91ba36c0e1881c52fda71070ebaea0007d73641dc74df71",
    ),
    "classes": (
        [f"deep/er/{c}/{i}.jpg" for c in ("cat", "ant.x", "ant") for i in range(7)]
        + ["deep/er/ant/x/1.jpg"],
        "114ba98938a60d77d3e583dac4e4826d49e0353e2e8575292bc2df638a436203",
        "75be3b4a0f19416a087aea7e7763c5843b057c5ca84763d3263e8262cb6ccd69",
    ),
    "flat": (
        [f"{i}.ppm" for i in range(23)] + ["readme"],
        "8bb6f64d5490fe31ab2386d9166968f4c004c3d4746dad9ec1412eeb620fc0ae",
        "efaf3bc652a6f94465f1bb9c457692815736b449198574413a9bbdf52a5f0b42",
    ),
}


@pytest.fixture
def cache(monkeypatch) -> Path:
    """Keep indexes of any size at once, and give the folder that they are kept in."""
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setattr(file_listing, "SETTLED_NS", 0)
    monkeypatch.setattr(index_cache, "_recent", {})
    return Path(os.environ["NAT_JAX_CACHE"]) / "file_index"


@pytest.fixture
def listings(monkeypatch) -> list[str]:
    """Give the roots that were listed, one after the other."""
    done: list[str] = []
    listed = index_cache._listed

    def counted(root: str, real: str) -> tuple[file_index.FileIndex, bool]:
        done.append(root)
        return listed(root, real)

    monkeypatch.setattr(index_cache, "_listed", counted)
    return done


@pytest.fixture(params=["folder", "zip"])
def data(request, tree: Path, tmp_path: Path) -> Path:
    return tree if request.param == "folder" else zip_tree(tree, tmp_path / "tree.zip")


def open_anew(root: Path, split: str = "train") -> Source:
    """Open as another process does, which remembers nothing."""
    index_cache._recent.clear()
    return open_source(f"folder:{root}", split)


def paths(source: Source) -> list[str]:
    """Give the names without reading, of files that may be gone."""
    return [source.record_name(i) for i in range(len(source))]


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*"))


def later() -> None:
    """Wait until the file system's clock has moved on."""
    time.sleep(0.02)


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("archived", [False, True])
def test_fingerprints_are_those_of_the_first_release(
    kind: str, archived: bool, tmp_path: Path, cache: Path
):
    files, *wanted = KNOWN[kind]
    root = tmp_path / "data"
    for position, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(position**2))
    if archived:
        root = zip_tree(root, tmp_path / "data.zip")
    for again in range(2):  # as listed, and as kept
        found = [open_anew(root, split).fingerprint for split in ("train", "test")]
        assert found == wanted, again
    with (tmp_path / "data" / files[0]).open("ab") as file:
        file.write(b"\0")
    shutil.rmtree(cache)
    assert open_anew(tmp_path / "data").fingerprint != wanted[0]


def test_the_order_is_that_of_the_paths_as_strings(tmp_path: Path):
    root = write_tree(tmp_path / "data", KNOWN["splits"][0])
    assert names(open_source(f"folder:{root}")) == [
        "train/a/é.jpg",
        "train/a/日本.webp",
        "train/b-c/1.jpg",
        "train/b/1.jpg",
        "train/b/10.JPEG",
        "train/b/2.png",
        "train/b/2/0.jpg",
    ]


def test_any_paths_come_in_the_order_of_plain_sorting(tmp_path: Path):
    rng = np.random.default_rng(0)
    parts = ["a", "a-", "a0", "a.b", "b", "é", "日", "😀", "\uffff", "", "x.jpg"]
    for trial in range(30):
        found = {
            "/".join([*rng.choice(parts, rng.integers(0, 4)), f"{rng.choice(parts[:8])}.jpg"])
            for _ in range(rng.integers(1, 40))
        }
        archive = tmp_path / f"{trial}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name in found:
                file.writestr(name, b"")
        groups = index_cache.list_zip(str(archive)).groups
        packed, group_of = file_index._packed(groups)
        ordered = [packed.name(i) for i in range(len(found))]
        assert ordered == sorted(found)
        for name, group in zip(ordered, group_of, strict=True):
            assert name.rpartition("/")[0] == groups[group].prefix.removesuffix("/")


def test_a_name_that_is_not_utf8_is_a_record_like_any_other(tmp_path: Path, cache: Path):
    root = write_tree(tmp_path / "data", ["a.jpg", "b.jpg", "é.jpg"])
    try:
        os.rename(root / "b.jpg", os.fsencode(root) + b"/\xff.jpg")
    except OSError:
        pytest.skip("this file system has no such names")
    for _ in range(2):
        source = open_anew(root)
        assert names(source)[-1] == "\udcff.jpg" and source[-1]["image"]
        assert len(source.fingerprint) == 64


def test_a_kept_index_is_used_without_listing(data: Path, cache: Path, listings: list[str]):
    first = [open_anew(data, s) for s in ("train", "test")]
    assert len(listings) == 1 and len(kept(cache)) == 1
    second = [open_anew(data, s) for s in ("train", "test")]
    assert len(listings) == 1
    for old, new in zip(first, second, strict=True):
        assert [old[i] for i in range(len(old))] == [new[i] for i in range(len(new))]
        assert (old.class_names, old.num_classes) == (new.class_names, new.num_classes)
        assert old.fingerprint == new.fingerprint
        assert new.labels.dtype == np.int32 and np.array_equal(old.labels, new.labels)
        assert type(new.labels) is np.ndarray
        with pytest.raises(ValueError, match="read-only"):
            new.labels[0] = 1


def test_the_test_split_of_a_small_folder_is_not_listed_again(
    data: Path, monkeypatch, cache: Path, listings: list[str]
):
    monkeypatch.setattr(index_cache, "KEPT_FROM", 10_000)
    train, test = (open_source(f"folder:{data}", s) for s in ("train", "test"))
    assert (len(train), len(test), len(listings)) == (12, 6, 1)
    with pytest.raises(ValueError, match="read-only"):  # as those of a kept index
        train.labels[0] = 1
    assert not cache.parent.exists()
    later()
    os.utime(data)
    open_source(f"folder:{data}")
    assert len(listings) == 2


def test_few_roots_are_remembered(tmp_path: Path, cache: Path, listings: list[str]):
    roots = [write_tree(tmp_path / str(i), ["0.jpg", "1.jpg"]) for i in range(6)]
    for root in roots:
        open_source(f"folder:{root}")
    assert list(index_cache._recent) == [os.path.realpath(r) for r in roots[2:]]


def add(tree: Path) -> None:
    write_tree(tree, ["train/cat/9.jpg"])


def remove(tree: Path) -> None:
    (tree / "train/cat/0.jpg").unlink()


def rename(tree: Path) -> None:
    (tree / "train/cat/0.jpg").rename(tree / "train/cat/9.jpg")


def replace(tree: Path) -> None:
    (tree / "new.jpg").write_bytes(b"of another length")
    (tree / "new.jpg").rename(tree / "train/cat/0.jpg")


def rename_class(tree: Path) -> None:
    (tree / "train/cat").rename(tree / "train/wolf")


def new_split(tree: Path) -> None:
    (tree / "test").rename(tree / "elsewhere")


def hide(tree: Path) -> None:
    (tree / "train/cat").rename(tree / "train/.cat")


def link_elsewhere(tree: Path) -> None:
    (tree.parent / "current").unlink()
    (tree.parent / "current").symlink_to(tree.parent / "v2")


def mend_a_link(tree: Path) -> None:
    write_tree(tree.parent / "promised", ["0.jpg"])


def set_the_time_back(tree: Path) -> None:
    before = (tree / "train/cat").stat()
    add(tree)
    os.utime(tree / "train/cat", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [add, remove, rename, replace, rename_class, new_split, hide]
CHANGES += [link_elsewhere, mend_a_link, set_the_time_back]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tree_is_listed_again(
    change: Callable[[Path], None], tree: Path, tmp_path: Path, cache: Path, listings: list[str]
):
    # The class "linked" leads over a second link outside; "promised" leads nowhere yet.
    for version in ("v1", "v2"):
        write_tree(tmp_path / version, [f"{version}.jpg"])
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    (tree / "train/linked").symlink_to(tmp_path / "current")
    (tree / "train/promised").symlink_to(tmp_path / "promised")
    before = names(open_anew(tree))
    assert names(open_anew(tree)) == before and len(listings) == 1
    later()
    change(tree)
    found = open_anew(tree)
    assert len(listings) == 2
    assert (names(found), found.fingerprint) == without_cache(tree)
    assert len(kept(cache)) == 2
    open_anew(tree)
    assert len(listings) == 2


def without_cache(tree: Path) -> tuple[list[str], str]:
    listing = file_listing.list_folder(str(tree), lambda _: None)
    index = file_index.build_index(listing, str(tree)).splits["train"]
    return [index.files.name(i) for i in range(len(index.files.labels))], index.fingerprint


def test_a_link_that_was_left_out_is_seen_when_it_leads_elsewhere(
    tree: Path, tmp_path: Path, cache: Path, listings: list[str]
):
    (tmp_path / "current").symlink_to(tree / "train")
    (tree / "train/cat/loop").symlink_to(tmp_path / "current")
    assert len(open_anew(tree)) == 12
    write_tree(tmp_path / "other", ["0.jpg"])
    (tmp_path / "current").unlink()
    (tmp_path / "current").symlink_to(tmp_path / "other")
    assert len(open_anew(tree)) == 13


def zip_with_other_names(archive: Path, tree: Path) -> None:
    rename(tree)
    zip_tree(tree, archive)


def same_size_and_time(archive: Path, tree: Path) -> None:
    before = archive.stat()
    zip_with_other_names(archive, tree)
    assert archive.stat().st_size == before.st_size
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [zip_with_other_names, same_size_and_time])
def test_a_zip_replaced_by_another_is_listed_again(
    change: Callable[[Path, Path], None], tree: Path, tmp_path: Path, cache: Path
):
    archive = zip_tree(tree, tmp_path / "tree.zip")
    assert "train/cat/0.jpg" in names(open_anew(archive))
    later()
    change(archive, tree)
    found = names(open_anew(archive))
    assert "train/cat/9.jpg" in found and "train/cat/0.jpg" not in found
    assert len(kept(cache)) == 2


def test_a_stamp_knows_times_and_size_of_a_zip(tree: Path, tmp_path: Path):
    archive = str(zip_tree(tree, tmp_path / "tree.zip"))
    stamp = zip_archive.list_zip(archive).stamp
    modified, changed = stamp.times[""]
    assert stamp.holds(archive)
    assert not stamp._replace(size=stamp.size + 1).holds(archive)
    assert not stamp._replace(times={"": [modified + 1, changed]}).holds(archive)
    assert not stamp._replace(times={"": [modified, changed + 1]}).holds(archive)
    assert not stamp.holds(f"{archive}.gone")


def test_a_folder_that_takes_the_place_of_a_zip_is_listed(tree: Path, tmp_path: Path, cache: Path):
    archive = zip_tree(tree, tmp_path / "data")
    assert len(open_anew(archive)) == 12
    archive.unlink()
    write_tree(archive, ["0.jpg", "1.jpg"])
    assert len(open_anew(archive)) == 1


def test_what_changed_a_moment_ago_is_not_trusted(
    data: Path, monkeypatch, cache: Path, listings: list[str], caplog
):
    monkeypatch.setattr(file_listing, "SETTLED_NS", 2 * 10**9)
    with caplog.at_level(logging.INFO):
        open_source(f"folder:{data}")
    assert "index is not kept" in caplog.text and "changed within the last seconds" in caplog.text
    open_source(f"folder:{data}", "test")
    assert len(listings) == 2 and kept(cache) == []
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 2 * 10**9)
    for split in ("train", "test"):
        open_source(f"folder:{data}", split)
    assert len(listings) == 3 and len(kept(cache)) == 1


def test_a_file_overwritten_in_place_is_noticed_by_its_length(tree: Path, cache: Path):
    open_anew(tree)
    source = open_anew(tree)
    path = tree / "train/cat/0.jpg"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    assert source[4]["image"] == bytes(size)  # no more is promised than the length
    path.write_bytes(b"short")
    with pytest.raises(UnreadableRecord) as caught:
        source[4]
    assert (caught.value.name, caught.value.label) == ("train/cat/0.jpg", 1)
    (folder,) = kept(cache)
    assert f"it has 5 bytes, but {size} in the index of {tree}" in caught.value.reason
    assert f"delete {folder} and start again" in caught.value.reason
    assert len(source[5]["image"]) > 5
    shutil.rmtree(folder)
    assert open_anew(tree)[4]["image"] == b"short"


def test_a_small_folder_gives_files_as_they_are_now(tree: Path):
    source = open_source(f"folder:{tree}")
    (tree / "train/cat/0.jpg").write_bytes(b"short")
    assert source[4]["image"] == b"short"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scribble(path: Path) -> None:
    path.write_bytes(b"\x93NUMPY\x01\x00\xff\xffgarbage {]")


def lengthen(path: Path) -> None:
    if path.suffix == ".json":
        path.write_bytes(path.read_bytes() + b"}")
    else:
        np.save(path, np.concatenate([np.load(path)] * 2))


def retype(path: Path) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": [1]}))
    else:
        np.save(path, np.load(path).view("V1"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


FILES = [f"{s}.{c}.npy" for s in ("train", "test") for c in ("names", "starts", "sizes", "labels")]


@pytest.mark.parametrize("damage", [truncate, empty, scribble, flip, lengthen, retype, Path.unlink])
@pytest.mark.parametrize("name", [*FILES, "train.members.npy", "index.json"])
def test_a_damaged_index_is_made_anew(
    name: str, damage: Callable[[Path], None], tree: Path, tmp_path: Path, cache: Path, caplog
):
    data = zip_tree(tree, tmp_path / "tree.zip") if "members" in name else tree
    wanted = names(open_anew(data))
    (folder,) = kept(cache)
    damage(folder / name)
    source = open_anew(data)
    assert names(source) == wanted and len(source[0]["image"]) > 100
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and f"the index in {folder} cannot be used" in warnings[0]
    assert names(open_anew(data)) == wanted
    assert len(caplog.records) == 1 and kept(cache) == [folder]


def test_an_index_of_another_version_is_made_anew(
    tree: Path, cache: Path, listings: list[str], caplog
):
    open_anew(tree)
    about = kept(cache)[0] / "index.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    assert len(open_anew(tree)) == 12 and len(listings) == 2
    assert "version 99, expected 1" in caplog.text
    assert json.loads(about.read_text())["format"] == 1


def test_without_a_place_to_write_each_start_lists(
    data: Path, tmp_path: Path, monkeypatch, cache: Path, listings: list[str], caplog
):
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("NAT_JAX_CACHE", str(blocked / "cache"))
    with caplog.at_level(logging.INFO):
        train, test = (open_source(f"folder:{data}", s) for s in ("train", "test"))
    assert len(listings) == 1 and len(caplog.records) == 1
    assert "cannot be kept" in caplog.text and "set NAT_JAX_CACHE" in caplog.text
    assert len(open_anew(data)) == 12 and len(listings) == 2
    again = pickle.loads(pickle.dumps(test))
    assert [again[i] for i in range(6)] == [test[i] for i in range(6)]
    assert len(listings) == 2


def test_an_index_that_others_wrote_and_we_may_not_read_is_left_alone(
    tree: Path, monkeypatch, cache: Path
):
    open_anew(tree)
    (folder,) = kept(cache)
    inode = folder.stat().st_ino

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("not yours")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", refuse)
        assert len(open_anew(tree)) == 12
    assert kept(cache) == [folder] and folder.stat().st_ino == inode
    index_cache.load_index(folder)


def test_a_cache_inside_the_data_is_not_used(
    tree: Path, monkeypatch, cache: Path, listings: list[str], caplog
):
    monkeypatch.setenv("NAT_JAX_CACHE", str(tree / "cache"))
    with caplog.at_level(logging.INFO):
        open_anew(tree)
    assert "lies inside the data" in caplog.text and not (tree / "cache").exists()


def test_where_indexes_are_kept(tree: Path, tmp_path: Path, monkeypatch, cache: Path, caplog):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setenv("NAT_JAX_CACHE", "~/ours")
    places = ["ours", "xdg/nat_jax", ".cache/nat_jax"]
    for place, variable in zip(places, ["NAT_JAX_CACHE", "XDG_CACHE_HOME", "HOME"], strict=True):
        open_anew(tree)
        assert len(kept(home / place / "file_index")) == 1
        shutil.rmtree(home / place)
        monkeypatch.setenv(variable, "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of one without a home
    with caplog.at_level(logging.INFO):
        assert len(open_anew(tree)) == 12
    assert "there is no home folder" in caplog.text


OPEN = """
import os, sys, time
from nat_jax.input import sources
from nat_jax.input.sources import file_listing, index_cache
index_cache.KEPT_FROM, file_listing.SETTLED_NS = 1, 0
written = index_cache._write
def slowly(*args):
    written(*args)
    time.sleep(0.2)  # so that all are at it together
index_cache._write = slowly
go = sys.argv[2]
open(f"{go}.{os.getpid()}", "w").close()
while not os.path.exists(go):
    time.sleep(0.001)
source = sources.open_source(f"folder:{sys.argv[1]}")
print(source.fingerprint, source[3]["name"], source._kept)
"""


def test_processes_that_build_at_once_all_end_well(data: Path, tmp_path: Path, cache: Path):
    go = tmp_path / "go"
    command = [sys.executable, "-c", OPEN, str(data), str(go)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("go.*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    (folder,) = kept(cache)
    source = open_anew(data)
    assert said == {f"{source.fingerprint} {source[3]['name']} {folder}\n"}


def test_what_is_no_longer_needed_is_removed(tree: Path, cache: Path):
    old_enough = time.time() - 31 * 24 * 3600
    for number in range(3):
        open_anew(tree)
        later()
        write_tree(tree, [f"train/cat/1{number}.jpg"])
    unused, recent, _ = kept(cache)
    os.utime(unused / "index.json", (old_enough, old_enough))
    left_behind = cache / unused.parent.name / ".part-of a process that was killed"
    left_behind.mkdir()
    os.utime(left_behind, (old_enough, old_enough))
    open_anew(tree)
    assert not unused.exists() and not left_behind.exists()
    assert recent.exists() and len(kept(cache)) == 3
    newest = max(kept(cache), key=index_cache._last_use)
    os.utime(newest / "index.json", (old_enough, old_enough))
    open_anew(tree)  # to open is to use
    assert time.time() - (newest / "index.json").stat().st_mtime < 60


def test_a_kept_source_pickles_to_the_name_of_its_index(
    data: Path, cache: Path, listings: list[str]
):
    source = open_anew(data)
    pickled = pickle.dumps(source)
    assert len(pickled) < 500 + 2 * len(str(data)) + len(str(cache))
    index_cache._recent.clear()
    again = pickle.loads(pickled)
    assert [again[i] for i in range(12)] == [source[i] for i in range(12)]
    assert len(listings) == 1
    shutil.rmtree(cache)
    again = pickle.loads(pickled)  # from what is remembered, or by listing
    index_cache._recent.clear()
    assert names(pickle.loads(pickled)) == names(again) == names(source)
    assert len(listings) >= 2


def test_a_worker_uses_the_index_of_its_parent_or_none(tree: Path, cache: Path):
    source = open_anew(tree)
    pickled = pickle.dumps(source)
    later()
    remove(tree)
    assert paths(pickle.loads(pickled)) == paths(source)
    shutil.rmtree(cache)
    index_cache._recent.clear()
    with pytest.raises(ValueError, match="was changed after another process opened it"):
        pickle.loads(pickled)


def test_a_source_that_is_not_kept_carries_its_own_split_only(tmp_path: Path):
    root = write_tree(tmp_path / "data", SPLIT_TREE)
    train, test = (pickle.dumps(open_source(f"folder:{root}", s)) for s in ("train", "test"))
    assert b"train/cat" in train and b"test/cat" not in train
    assert b"test/cat" in test and b"train/cat" not in test
    shutil.rmtree(root)
    assert paths(pickle.loads(train)) == sorted(n for n in SPLIT_TREE if n.startswith("train"))


def test_threads_may_read_a_kept_index_at_once(data: Path, cache: Path):
    open_anew(data)
    source = open_anew(data)
    wanted = [source[i % 12] for i in range(600)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: source[i % 12], range(600)))
    assert [r["image"] for r in found] == [r["image"] for r in wanted]
    assert [r["name"] for r in found] == [r["name"] for r in wanted]


def test_records_are_numbered_as_in_a_sequence(tree: Path):
    source = open_source(f"folder:{tree}")
    assert source[-1]["name"] == source.record_name(-1) == "train/dog/3.jpg"
    assert source[np.int64(4)]["name"] == source.record_name(np.int64(4)) == "train/cat/0.jpg"
    assert len(list(source)) == 12
    for index in (12, -13):
        with pytest.raises(IndexError):
            source[index]


def test_opening_a_kept_index_takes_no_memory_for_its_files(tmp_path: Path, cache: Path):
    count = 20_000
    archive = tmp_path / "many.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(count):
            file.writestr(f"class{i % 7}/a_name_of_usual_length_{i:08}.jpg", b"")
    spec = f"folder:{archive}"

    def peak() -> int:
        index_cache._recent.clear()
        tracemalloc.start()
        try:
            assert len(open_source(spec)) == count - count // 10
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak() > 200 * count  # to list takes objects for a while
    assert peak() < 10 * count  # of the 85 that each takes on the disk


def test_slow_file_systems_are_listed_by_threads_in_the_same_order(
    tree: Path, tmp_path: Path, monkeypatch
):
    write_tree(tmp_path / "other", [f"{i}/{j}/0.jpg" for i in range(9) for j in range(9)])
    (tree / "train/ant/a").symlink_to(tmp_path / "other")
    (tree / "train/dog/b").symlink_to(tmp_path / "other/5")
    plain = file_listing.list_folder(str(tree), lambda _: None)
    scan, threads = file_listing._scan, set()

    def noted(*args: str) -> file_listing._Scanned:
        threads.add(threading.get_ident())
        return scan(*args)

    monkeypatch.setattr(file_listing, "_scan", noted)
    monkeypatch.setattr(file_listing, "_SECONDS_OF_TRIAL", 0)
    monkeypatch.setattr(file_listing, "_SLOW_SECONDS_PER_FILE", 0)
    threaded = file_listing.list_folder(str(tree), lambda _: None)
    assert len(threads) > 1
    for group, same in zip(threaded.groups, plain.groups, strict=True):
        assert group[:2] == same[:2] and np.array_equal(group.sizes, same.sizes)
    assert threaded.stamp == plain.stamp
    monkeypatch.setattr(file_listing, "_FOLDERS_PER_THREAD", 1)
    assert plain.stamp.holds(str(tree))
    (tree / "train/ant/4.jpg").touch()
    assert not plain.stamp.holds(str(tree))


def test_a_folder_that_cannot_be_listed_is_named(tree: Path, monkeypatch):
    listed = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("cat/"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for seconds in (0.2, 0):  # with threads or without
        monkeypatch.setattr(file_listing, "_SECONDS_OF_TRIAL", seconds)
        monkeypatch.setattr(file_listing, "_SLOW_SECONDS_PER_FILE", 0)
        with pytest.raises(ValueError, match=r"cannot list .*cat/: .*Permission denied"):
            open_source(f"folder:{tree}")


def test_listing_says_what_it_does_only_where_it_takes_long(
    data: Path, monkeypatch, cache: Path, caplog, capsys
):
    with caplog.at_level(logging.INFO):
        open_anew(data)
        assert len(caplog.records) == 1
        assert caplog.messages[0].startswith(f"folder: listed 18 files of {data} in 0.")
        assert "per second); its index is kept in " in caplog.messages[0]
        caplog.clear()
        open_anew(data)
        assert caplog.messages == []
        shutil.rmtree(cache)
        monkeypatch.setattr(index_cache, "_PATIENCE", 0.01)
        for name in ("list_folder", "list_zip"):
            slow = delayed(getattr(index_cache, name))
            monkeypatch.setattr(index_cache, name, slow)
        open_anew(data)
        assert caplog.messages[0] == f"folder: listing the files of {data} ..."
    assert capsys.readouterr().err == ""  # a bar is for terminals


def test_a_terminal_gets_a_bar_where_it_takes_long(tree: Path, monkeypatch, cache: Path, caplog):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def slowly(root: str, progress: Callable[[int], object]) -> file_listing.Listing:
        for _ in range(4):
            time.sleep(0.15)
            progress(1000)
        return file_listing.list_folder(root, progress)

    shown = []
    for patience in (60, 0.01):
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setattr(index_cache, "_PATIENCE", patience)
        monkeypatch.setattr(index_cache, "list_folder", slowly)
        with caplog.at_level(logging.INFO):
            open_anew(tree)
        shown.append(sys.stderr.getvalue())
        shutil.rmtree(cache)
    assert shown[0] == "" and f"listing {tree}: " in shown[1] and "k files" in shown[1]
    assert not any("listing the files" in message for message in caplog.messages)


def delayed(function: Callable) -> Callable:
    def slow(*args: object) -> object:
        time.sleep(0.2)
        return function(*args)

    return slow


def test_remarks_about_what_is_left_out_come_with_a_kept_index_too(tree: Path, cache: Path, caplog):
    write_tree(tree, ["other/0.jpg"])
    (tree / "notes.txt").touch()
    open_anew(tree)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_anew(tree)
    assert caplog.messages == [
        f"folder: left out 1 file(s) of {tree} that are not images",
        "folder: left out 1 image(s) outside train/ and test/",
    ]
