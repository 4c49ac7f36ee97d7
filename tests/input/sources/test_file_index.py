"""The index of `folder:`: what is in it, when it is used again, and what it costs."""

import io
import logging
import os
import pickle
import shutil
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sample_files import SPLIT_TREE, names, write_tree, zip_tree

from nat_jax.input.sources import (
    Source,
    UnreadableRecord,
    file_listing,
    index_cache,
    open_source,
)


@pytest.fixture
def cache(monkeypatch) -> Path:
    """Keep indexes of any size at once; return the folder that they are kept in."""
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setattr(file_listing, "SETTLED_NS", 0)
    monkeypatch.setattr(index_cache, "_recent", {})
    return Path(os.environ["NAT_JAX_CACHE"]) / "file_index"


@pytest.fixture
def listings(monkeypatch) -> list[str]:
    """Return the roots that were listed, one after the other."""
    done: list[str] = []
    wrap_listing(monkeypatch, lambda root, *_: done.append(root))
    return done


def wrap_listing(monkeypatch, before: Callable[..., object]) -> None:
    """Call a function with the arguments of each listing before it starts."""

    def wrapped(listed: Callable) -> Callable:
        def listing(*args: object) -> object:
            before(*args)
            return listed(*args)

        return listing

    for name in ("list_folder", "list_zip"):
        monkeypatch.setattr(index_cache, name, wrapped(getattr(index_cache, name)))


@pytest.fixture(params=["folder", "zip"])
def data(request, tree: Path, tmp_path: Path) -> Path:
    return tree if request.param == "folder" else zip_tree(tree, tmp_path / "tree.zip")


def open_fresh(root: Path, split: str = "train") -> Source:
    """Open as another process does, which remembers nothing."""
    index_cache._recent.clear()
    return open_source(f"folder:{root}", split)


def paths(source: Source) -> list[str]:
    """Return the names without reading, of files that may be gone."""
    return [source.record_name(i) for i in range(len(source))]


def kept(cache: Path) -> list[Path]:
    return sorted(cache.glob("*"))


def later() -> None:
    """Wait until the file system's clock has moved on."""
    time.sleep(0.02)


def test_records_come_in_the_order_of_their_paths_as_strings(tmp_path: Path):
    rng = np.random.default_rng(0)
    parts = ["a", "a-", "a0", "a.b", "b", "é", "日", "😀", "\uffff", "", "x.jpg"]
    for trial in range(30):
        found = {"other/0.jpg"} | {
            "/".join(["c", *rng.choice(parts, rng.integers(0, 4)), f"{rng.choice(parts[:8])}.jpg"])
            for _ in range(rng.integers(1, 40))
        }
        archive = tmp_path / f"{trial}.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for name in found:
                file.writestr(name, b"")
        train, test = (open_source(f"folder:{archive}", split) for split in ("train", "test"))
        assert paths(train) == sorted(paths(train)) and paths(test) == sorted(paths(test))
        assert sorted(paths(train) + paths(test)) == sorted({os.path.normpath(n) for n in found})
        classes = [name.partition("/")[0] for name in paths(train)]
        assert [train.class_names[i] for i in train.labels] == classes
        learned = [name for name in paths(test) if name.partition("/")[0] in classes]
        assert [name for name, i in zip(paths(test), test.labels, strict=True) if i >= 0] == learned


def test_a_name_that_is_not_utf8_is_a_record_like_any_other(tmp_path: Path, cache: Path):
    root = write_tree(tmp_path / "data", ["a.jpg", "b.jpg", "é.jpg"])
    try:
        os.rename(root / "b.jpg", os.fsencode(root) + b"/\xff.jpg")
    except OSError:
        pytest.skip("this file system has no such names")
    for _ in range(2):
        source = open_fresh(root)
        assert names(source)[-1] == "\udcff.jpg" and source[-1]["image"]
        assert len(source.fingerprint) == 64


def test_a_kept_index_is_used_without_listing(data: Path, cache: Path, listings: list[str]):
    first = [open_fresh(data, s) for s in ("train", "test")]
    assert len(listings) == 1 and len(kept(cache)) == 1
    second = [open_fresh(data, s) for s in ("train", "test")]
    assert len(listings) == 1
    for old, new in zip(first, second, strict=True):
        assert [old[i] for i in range(len(old))] == [new[i] for i in range(len(new))]
        assert (old.class_names, old.num_classes) == (new.class_names, new.num_classes)
        assert old.fingerprint == new.fingerprint
        assert new.labels.dtype == np.int32 and np.array_equal(old.labels, new.labels)
        assert type(new.labels) is np.ndarray


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


def end_a_loop(tree: Path) -> None:
    (tree.parent / "loop").unlink()
    (tree.parent / "loop").symlink_to(tree.parent / "v2")


def set_the_time_back(tree: Path) -> None:
    before = (tree / "train/cat").stat()
    add(tree)
    os.utime(tree / "train/cat", ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [add, remove, rename, replace, rename_class, new_split, hide]
CHANGES += [link_elsewhere, end_a_loop, set_the_time_back]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tree_is_listed_again(
    change: Callable[[Path], None], tree: Path, tmp_path: Path, cache: Path, listings: list[str]
):
    # The class "linked" leads over a second link outside, "loop" back to where it is.
    for version in ("v1", "v2"):
        write_tree(tmp_path / version, [f"{version}.jpg"])
    (tmp_path / "current").symlink_to(tmp_path / "v1")
    (tmp_path / "loop").symlink_to(tree / "train")
    (tree / "train/linked").symlink_to(tmp_path / "current")
    (tree / "train/dog/loop").symlink_to(tmp_path / "loop")
    before = names(open_fresh(tree))
    assert names(open_fresh(tree)) == before and len(listings) == 1
    later()
    change(tree)
    found = open_fresh(tree)
    assert len(listings) == 2 and len(kept(cache)) == 1
    open_fresh(tree)
    assert len(listings) == 2
    shutil.rmtree(cache)
    listed = open_fresh(tree)
    assert (names(found), found.fingerprint) == (names(listed), listed.fingerprint)


def zip_with_other_names(archive: Path, tree: Path) -> None:
    rename(tree)
    zip_tree(tree, archive)


def same_size_and_time(archive: Path, tree: Path) -> None:
    before = archive.stat()
    zip_with_other_names(archive, tree)
    assert archive.stat().st_size == before.st_size
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))


def folder_in_its_place(archive: Path, tree: Path) -> None:
    archive.unlink()
    rename(tree)
    tree.rename(archive)


@pytest.mark.parametrize("change", [zip_with_other_names, same_size_and_time, folder_in_its_place])
def test_a_zip_replaced_by_something_else_is_listed_again(
    change: Callable[[Path, Path], None], tree: Path, tmp_path: Path, cache: Path
):
    archive = zip_tree(tree, tmp_path / "tree.zip")
    assert "train/cat/0.jpg" in names(open_fresh(archive))
    later()
    change(archive, tree)
    found = names(open_fresh(archive))
    assert "train/cat/9.jpg" in found and "train/cat/0.jpg" not in found


def test_what_changed_a_moment_ago_is_not_trusted(
    data: Path, monkeypatch, cache: Path, listings: list[str], caplog
):
    monkeypatch.setattr(file_listing, "SETTLED_NS", 2 * 10**9)
    with caplog.at_level(logging.INFO):
        open_source(f"folder:{data}")
    assert (
        "index cannot be kept" in caplog.text and "changed within the last seconds" in caplog.text
    )
    open_source(f"folder:{data}", "test")
    assert len(listings) == 2 and kept(cache) == []
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 2 * 10**9)
    for split in ("train", "test"):
        open_source(f"folder:{data}", split)
    assert len(listings) == 3 and len(kept(cache)) == 1


def test_a_file_overwritten_in_place_is_noticed_by_its_length(tree: Path, monkeypatch, cache: Path):
    open_fresh(tree)
    source = open_fresh(tree)
    path = tree / "train/cat/0.jpg"
    size = path.stat().st_size
    path.write_bytes(bytes(size))
    assert source[4]["image"] == bytes(size)  # no more is promised than the length
    path.write_bytes(b"short")
    with pytest.raises(UnreadableRecord) as caught:
        source[4]
    assert (caught.value.name, caught.value.label) == ("train/cat/0.jpg", 1)
    (index,) = kept(cache)
    assert f"it has 5 bytes, but {size} in the index of {tree}" in caught.value.reason
    assert f"delete {index} and start again" in caught.value.reason
    assert len(source[5]["image"]) > 5
    index.unlink()
    monkeypatch.setattr(index_cache, "KEPT_FROM", 10_000)
    source = open_fresh(tree)  # not kept, so that files count as they are
    path.write_bytes(b"shorter")
    assert source[4]["image"] == b"shorter"


def flipped(position: int) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = position % len(data)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return flip


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "cut header": lambda data: data[:7],
    "empty": lambda _: b"",
    "scribbled": lambda _: b"\x93NUMPY\x01\x00\xff\xffgarbage {]",
    "longer": lambda data: data + b"}",
} | {f"bit {position}": flipped(position) for position in (0, 9, 13, 500, -1)}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again(damage: str, data: Path, cache: Path, caplog, listings):
    wanted = names(open_fresh(data))
    (path,) = kept(cache)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[damage](whole))
    source = open_fresh(data)
    assert names(source) == wanted and len(source[0]["image"]) > 100
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1 and f"the index in {path} cannot be used" in warnings[0]
    assert names(open_fresh(data)) == wanted and len(listings) == 2
    assert len(caplog.records) == 1 and path.read_bytes() == whole


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("a file/cache", "Not a directory"),
        ("tree/cache", "lies inside the data"),
        ("", "there is no home folder"),
    ],
)
def test_where_no_index_can_be_kept_each_start_lists(
    place: str, reason: str, tree: Path, monkeypatch, cache: Path, listings: list[str], caplog
):
    (tree.parent / "a file").touch()
    monkeypatch.setenv("NAT_JAX_CACHE", str(tree.parent / place) if place else "~")
    if not place:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of one without a home
    with caplog.at_level(logging.INFO):
        _, test = (open_source(f"folder:{tree}", s) for s in ("train", "test"))
    assert len(listings) == 1 and len(caplog.records) == 1
    assert "cannot be kept" in caplog.text and reason in caplog.text
    assert "NAT_JAX_CACHE names a folder" in caplog.text and not (tree / "cache").exists()
    assert len(open_fresh(tree)) == 12 and len(listings) == 2
    again = pickle.loads(pickle.dumps(test))
    assert [again[i] for i in range(6)] == [test[i] for i in range(6)]
    assert len(listings) == 2


def test_indexes_in_a_folder_of_version_0_1_are_replaced(data: Path, cache: Path):
    open_fresh(data)
    (path,) = kept(cache)
    path.rename(cache / "old")
    path.mkdir()
    (cache / "old").rename(path / "old")
    assert len(open_fresh(data)) == 12
    assert path.is_file()


def test_a_source_pickles_to_its_path(data: Path, cache: Path, listings: list[str]):
    source = open_fresh(data)
    pickled = pickle.dumps(source)
    assert len(pickled) < 500 + 2 * len(str(data))
    for listed in (1, 2):
        index_cache._recent.clear()
        again = pickle.loads(pickled)
        assert [again[i] for i in range(12)] == [source[i] for i in range(12)]
        assert len(listings) == listed
        shutil.rmtree(cache)
    later()
    data.rename(data.with_name("gone"))
    write_tree(data, SPLIT_TREE[1:])
    with pytest.raises(ValueError, match="was changed after another process opened it"):
        pickle.loads(pickled)


def test_records_are_numbered_as_in_a_sequence(tree: Path):
    source = open_source(f"folder:{tree}")
    assert source[-1]["name"] == source.record_name(-1) == "train/dog/3.jpg"
    assert source[np.int64(4)]["name"] == source.record_name(np.int64(4)) == "train/cat/0.jpg"
    assert len(list(source)) == 12
    for index in (12, -13):
        with pytest.raises(IndexError):
            source[index]


def test_opening_a_kept_index_takes_no_memory_for_its_files(tmp_path: Path, cache: Path):
    def peak(count: int) -> int:
        archive = tmp_path / f"{count}.zip"
        if not archive.exists():
            with zipfile.ZipFile(archive, "w") as file:
                for i in range(count):
                    file.writestr(f"class{i % 7}/a_name_of_usual_length_{i:08}.jpg", b"")
        tracemalloc.start()
        try:
            assert len(open_fresh(archive)) == count - count // 10
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = 500, 5500
    assert peak(many) - peak(few) > 200 * (many - few)  # listing takes objects for a while
    assert abs(peak(many) - peak(few)) < 5 * (many - few)  # of the 85 that each takes on the disk


@pytest.mark.parametrize("long", [False, True])
def test_a_terminal_gets_a_bar_where_it_takes_long(
    tree: Path, monkeypatch, cache: Path, caplog, long: bool
):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def wait(root: str, progress: Callable[[int], object]) -> None:
        for _ in range(2):
            time.sleep(0.12)
            progress(1000)

    monkeypatch.setattr(sys, "stderr", Terminal())
    if long:
        monkeypatch.setattr(index_cache, "_PATIENCE", 0.01)
        wrap_listing(monkeypatch, wait)
    with caplog.at_level(logging.INFO):
        open_fresh(tree)
    shown = sys.stderr.getvalue()
    assert (f"listing {tree}: " in shown and "k files" in shown) if long else shown == ""
    (message,) = caplog.messages
    assert message.startswith(f"folder: listed 18 files of {tree} in 0.")
    assert "per second); its index is kept in " in message


def test_remarks_about_what_is_left_out_come_with_a_kept_index_too(tree: Path, cache: Path, caplog):
    write_tree(tree, ["other/0.jpg"])
    (tree / "notes.txt").touch()
    open_fresh(tree)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        open_fresh(tree)
    assert caplog.messages == [
        f"folder: {tree}: left out by suffix: 1 .txt",
        f"folder: {tree}: left out 1 image(s) outside train/ and test/",
    ]
    open_source(f"folder:{tree}", "test")
    assert len(caplog.messages) == 2  # of a folder that is open, they are known
