"""A .zip read in place: every way of packing, and every kind of damage."""

import functools
import gc
import io
import logging
import os
import pickle
import struct
import threading
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sample_files import jpeg, zip_tree

from nat_jax.input.sources import (
    UnreadableRecord,
    file_listing,
    index_cache,
    open_source,
)

IMAGES = {f"{c}/{i}.jpg": jpeg(i) * (1 + 20 * i) for c in "ab" for i in range(4)} | {
    "b/empty.jpg": b"",
    "b/one.jpg": b"\xff",
}
METHODS = [
    zipfile.ZIP_STORED,
    zipfile.ZIP_DEFLATED,
    zipfile.ZIP_BZIP2,
    zipfile.ZIP_LZMA,
]


def pack(path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, image in IMAGES.items():
            file.writestr(name, image)
    return path


def content(archive: Path) -> dict[str, bytes]:
    splits = [open_source(f"folder:{archive}", split) for split in ("train", "test")]
    return {r["name"]: r["image"] for source in splits for r in source}


def failure(archive: Path, name: str) -> str:
    """Give the reason why one record cannot be read, after all others were."""
    reasons = []
    for split in ("train", "test"):
        source = open_source(f"folder:{archive}", split)
        for i in range(len(source)):
            try:
                record = source[i]
                assert record["image"] == IMAGES[record["name"]]
            except UnreadableRecord as error:
                assert (error.name, error.label) == (name, "ab".index(name[0]))
                reasons.append(error.reason)
    assert len(reasons) == 1
    return reasons[0]


def local_header(archive: Path, name: str) -> int:
    with zipfile.ZipFile(archive) as file:
        return file.getinfo(name).header_offset


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def methods_mixed(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for number, (name, image) in enumerate(IMAGES.items()):
            file.writestr(name, image, compress_type=METHODS[number % 4])


def fields_in_local_headers_only(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, image in IMAGES.items():
            with file.open(name, "w", force_zip64=True) as member:
                member.write(image)


def zip64(path: Path) -> None:
    """As an archive beyond 4 GiB has them: offsets and sizes in the directory's extra fields."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 100)
        patch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
        pack(path, zipfile.ZIP_DEFLATED)
    assert b"PK\x06\x06" in path.read_bytes()


def beyond_4_gib(path: Path) -> None:
    with path.open("wb") as file:
        try:
            file.seek(2**32 + 12345)  # a hole
            file.write(b"\0")
        except OSError:
            pytest.skip("this file system has no files of 4 GiB")
        with zipfile.ZipFile(file, "a") as archive:
            for name, image in IMAGES.items():
                archive.writestr(name, image)
    assert local_header(path, "a/0.jpg") > 2**32


def streamed(path: Path) -> None:
    class Pipe(io.FileIO):
        def seekable(self) -> bool:
            return False

        def tell(self) -> int:
            raise OSError("a pipe has no position")

        seek = tell

    pipe = Pipe(path, "w")
    with pipe, zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as file:
        for name, image in IMAGES.items():
            with file.open(name, "w") as member:
                member.write(image)
    with zipfile.ZipFile(path) as file:
        assert file.getinfo("a/1.jpg").flag_bits & 8


def behind_a_program(path: Path) -> None:
    path.write_bytes(b"#!/bin/sh\nexit 1\n" * 50 + pack(path, zipfile.ZIP_DEFLATED).read_bytes())


@pytest.mark.parametrize(
    "write",
    [
        *(functools.partial(pack, method=method) for method in METHODS),
        *(methods_mixed, fields_in_local_headers_only, zip64),
        *(beyond_4_gib, streamed, behind_a_program),
    ],
)
def test_every_archive_gives_the_bytes_that_were_packed(write, tmp_path: Path):
    write(tmp_path / "a.zip")
    assert content(tmp_path / "a.zip") == IMAGES


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_member_is_one_unreadable_record(method: int, tmp_path: Path):
    archive = pack(tmp_path / "a.zip", method)
    start = local_header(archive, "b/3.jpg") + 30 + len("b/3.jpg")
    overwrite(archive, start + 60, b"\x55" * 40)
    reason = failure(archive, "b/3.jpg")
    if method == zipfile.ZIP_STORED:
        assert reason == "Bad CRC-32 for file 'b/3.jpg'"
    else:
        assert reason


def test_a_damaged_local_header_is_one_unreadable_record(tmp_path: Path):
    archive = pack(tmp_path / "a.zip")
    at = local_header(archive, "a/2.jpg")
    overwrite(archive, at, b"XX")
    assert failure(archive, "a/2.jpg") == f"no file begins at byte {at} of the .zip"


def in_directory(archive: Path, name: str) -> int:
    """Give where the entry of a member begins in the directory of the archive."""
    return archive.read_bytes().rindex(name.encode()) - 46


def test_a_method_that_python_lacks_is_one_unreadable_record(tmp_path: Path):
    archive = pack(tmp_path / "a.zip")
    for at in (in_directory(archive, "a/2.jpg") + 10, local_header(archive, "a/2.jpg") + 8):
        overwrite(archive, at, struct.pack("<H", 99))
    assert "compression" in failure(archive, "a/2.jpg")


@pytest.mark.parametrize("method", METHODS[:2])
def test_a_directory_that_claims_gigabytes_costs_no_memory(method: int, tmp_path: Path):
    archive = pack(tmp_path / "a.zip", method)
    at = in_directory(archive, "a/2.jpg")
    overwrite(archive, at + 20, struct.pack("<2I", 2**32 - 2, 2**32 - 2))
    tracemalloc.start()
    try:
        assert "beyond the end" in failure(archive, "a/2.jpg")
        # Now the bytes in the archive are few, but not those that they inflate to.
        overwrite(archive, at + 20, struct.pack("<I", 100))
        assert failure(archive, "a/2.jpg")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


NAMES = {
    "./": lambda name: f"./{name}",
    "backslashes": lambda name: name.replace("/", "\\"),
    "repeated slashes": lambda name: name.replace("/", "//"),
    "up and down": lambda name: f"x/../{name}",
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_those_that_a_program_would_unpack(kind: str, tree: Path, tmp_path: Path):
    plain = zip_tree(tree, tmp_path / "plain.zip")
    odd = tmp_path / "odd.zip"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(odd, "w") as file:
        file.writestr("train\\", b"")  # a folder
        for info in source.infolist():
            file.writestr(NAMES[kind](info.filename), source.read(info))
    for split in ("train", "test"):
        found, wanted = (open_source(f"folder:{path}", split) for path in (odd, plain))
        assert found.fingerprint == wanted.fingerprint
        assert list(found) == list(wanted)


def test_a_file_that_tells_labels_is_found_under_such_a_name(tmp_path: Path):
    archive = tmp_path / "tiny.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(4):
            file.writestr(f".\\train\\n{i % 2}\\images\\{i}.JPEG", jpeg(i))
            file.writestr(f".\\val\\images\\val_{i}.JPEG", jpeg(i))
        lines = "".join(f"val_{i}.JPEG\tn{i // 2}\n" for i in range(4))
        file.writestr(".\\val\\val_annotations.txt", lines)
    assert open_source(f"folder:{archive}", "test").labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", ["../a/9.jpg", "a/../../9.jpg", "/a/9.jpg", "C:\\a\\9.jpg"])
def test_a_name_that_leads_outside_is_refused(name: str, tmp_path: Path):
    archive = pack(tmp_path / "a.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, jpeg(9))
    with pytest.raises(ValueError, match="a member that would be unpacked outside: "):
        open_source(f"folder:{archive}")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_of_members_of_one_name_the_last_counts(tmp_path: Path, caplog):
    archive = pack(tmp_path / "a.zip")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("a/1.jpg", jpeg(99))
        file.writestr("./b/1.jpg", jpeg(98))
    with caplog.at_level(logging.INFO):
        found = content(archive)
    assert found == {**IMAGES, "a/1.jpg": jpeg(99), "b/1.jpg": jpeg(98)}
    assert caplog.text.count("2 member(s) have the name of a later one, which counts") == 1


def split_zip(archive: Path) -> Path:
    """Return the last of two parts of an archive."""
    data = bytearray(archive.read_bytes())
    end = data.rindex(b"PK\5\6")
    data[end + 4 : end + 8] = b"\1\0\1\0"  # number of this part, and of that with the directory
    archive.with_suffix(".z01").write_bytes(data[:100])
    archive.write_bytes(data[100:])
    return archive


OTHERS = {
    "page.zip": (b"<!DOCTYPE html><p>Sign in", r"markup, as web pages .*'<!DOCTYPE html><'"),
    "a.tar": (bytes(257) + b"ustar\0" + bytes(300), r"a \.tar archive; unpack it"),
    "a.tar.gz": (b"\x1f\x8b\x08" + bytes(30), r"compressed by gzip, .*; unpack it"),
    "a.zip.001": (b"PK\3\4" + bytes(90), "one part of a .zip that was split; join the parts"),
    "a.z01": (b"PK\7\x08PK\3\4" + bytes(90), "one part of a .zip that was split"),
    "empty.zip": (b"", "nor a readable .zip: it is empty"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_other_kinds_are_named(name: str, tmp_path: Path):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(f"folder:{tmp_path / name}")


def test_the_last_part_of_a_split_archive_is_not_taken_for_all_of_it(tmp_path: Path):
    with pytest.raises(ValueError, match="one part of a .zip that was split"):
        open_source(f"folder:{split_zip(pack(tmp_path / 'a.zip'))}")


def test_archives_and_arrays_in_an_archive_are_not_opened(tmp_path: Path):
    for inner, hint in (("b.zip", "unpack them"), ("x.npy", "are read by arrays:PATH")):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr(inner, b"")
        with pytest.raises(ValueError, match=rf"no images in .*: 1 \{inner[1:]}; .*{hint}"):
            open_source(f"folder:{tmp_path / 'a.zip'}")


def test_what_is_no_archive_is_refused(tmp_path: Path):
    archive = pack(tmp_path / "a.zip")
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"nor a readable \.zip: .*is it complete\?"):
        open_source(f"folder:{archive}")
    (tmp_path / "a.jpg").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=f"nor a readable .*name the folder: {tmp_path}$"):
        open_source(f"folder:{tmp_path / 'a.jpg'}")


def test_an_archive_that_is_cut_or_overwritten_while_it_is_read_says_so(tmp_path: Path):
    archive = pack(tmp_path / "a.zip")
    source = open_source(f"folder:{archive}")
    os.truncate(archive, 100)
    with pytest.raises(UnreadableRecord, match=r"was changed after it was listed, start"):
        source[5]
    with pytest.raises(ValueError, match=r"a\.zip is neither a folder nor a readable"):
        pickle.loads(pickle.dumps(source))


def test_who_reads_an_archive_that_is_replaced_goes_on_with_the_old_one(tree: Path, tmp_path: Path):
    archive = zip_tree(tree, tmp_path / "tree.zip")
    old = open_source(f"folder:{archive}")
    before = [old[i] for i in range(len(old))]
    os.replace(pack(tmp_path / "new.zip"), archive)
    assert [old[i] for i in range(len(old))] == before
    assert content(archive) == IMAGES


def test_threads_read_at_the_same_time(tmp_path: Path, monkeypatch):
    source = open_source(f"folder:{pack(tmp_path / 'a.zip', zipfile.ZIP_DEFLATED)}")
    wanted = list(source)
    together = threading.Barrier(4, timeout=20)
    pread = os.pread

    def meet(*args: int) -> bytes:
        together.wait()  # breaks unless four threads are inside at once
        return pread(*args)

    monkeypatch.setattr(os, "pread", meet)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.__getitem__, [0, 1, 2, 3] * 5)) == wanted[:4] * 5


def test_a_worker_does_not_read_the_directory_of_the_archive_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setattr(file_listing, "SETTLED_NS", 0)
    source = open_source(f"folder:{pack(tmp_path / 'a.zip')}")
    wanted, pickled = list(source), pickle.dumps(source)
    assert b"a/1.jpg" not in pickled
    index_cache._recent.clear()

    def refuse(*args: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    assert list(pickle.loads(pickled)) == wanted


def test_the_file_is_closed_with_its_last_source(tmp_path: Path):
    archive = pack(tmp_path / "a.zip")

    def is_open() -> bool:
        return any(
            os.path.realpath(f"/proc/self/fd/{fd}") == str(archive)
            for fd in os.listdir("/proc/self/fd")
        )

    source = open_source(f"folder:{archive}")
    assert is_open()
    del source
    gc.collect()
    assert not is_open()


def test_a_zip_of_hidden_and_other_files_lists_the_images(tmp_path: Path, caplog):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("__MACOSX/x/._0.jpg", ".git/0.jpg", "a/.0.jpg", "a/notes.txt", "a/", "a/b/"):
            file.writestr(name, b"")
        for name, image in IMAGES.items():
            file.writestr(f"top/{name}", image)
    with caplog.at_level("INFO"):
        assert content(tmp_path / "a.zip") == {f"top/{n}": i for n, i in IMAGES.items()}
    assert "left out by suffix: 1 .txt" in caplog.text
