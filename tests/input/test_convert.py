import fcntl
import logging
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from project import python
from sample_files import SPLIT_TREE, flip_bit, jpeg, write_tree, zip_tree

from nat_jax.input import convert as conversion
from nat_jax.input.convert import ConversionError, convert
from nat_jax.input.sources import UnreadableRecord, open_source

SPLITS = ("train", "test")


@pytest.fixture(autouse=True)
def tiny_shards(monkeypatch) -> None:
    """A "MiB" is 1500 bytes, so that a few small images fill several shards."""
    monkeypatch.setattr(conversion, "_MIB", 1500)


@pytest.fixture
def logged(caplog) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "nat_jax")
    return caplog


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.array_record-*"))


def assert_same(spec: str, folder: Path) -> None:
    for split in SPLITS:
        before, after = (open_source(s, split) for s in (spec, f"arrayrecord:{folder}"))
        assert after.fingerprint == before.fingerprint and len(after) == len(before)
        assert after.class_names == before.class_names
        assert after.num_classes == before.num_classes
        assert np.array_equal(after.labels, before.labels)
        assert [after[i] for i in range(len(after))] == [before[i] for i in range(len(before))]


def layouts(tmp_path: Path) -> dict[str, str]:
    flat = [f"{i:02}.jpg" for i in range(30)]
    odd = [f"{name}/{i}.jpg" for name in (" a ", "Größe", "b") for i in range(9)]
    trees = {"split": SPLIT_TREE, "flat": flat, "held_out": [f"all/{n}" for n in odd]}
    trees["half"] = [f"train/{i}.jpg" for i in range(12)] + [f"val/x/{i}.jpg" for i in range(3)]
    trees["bytes"] = [os.fsdecode(b"\xff%d.jpg" % i) for i in range(12)]  # no text
    specs = {n: f"folder:{write_tree(tmp_path / n, tree)}" for n, tree in trees.items()}
    return specs | {"zip": f"folder:{zip_tree(tmp_path / 'split', tmp_path / '2024-x y.zip')}"}


@pytest.mark.parametrize("layout", ["split", "flat", "held_out", "half", "bytes", "zip"])
def test_the_same_records_labels_names_and_fingerprint(tmp_path: Path, layout: str):
    spec = layouts(tmp_path)[layout]
    folder = convert(spec, str(tmp_path / "out/put"), shard_mb=2)
    assert len(shard_files(folder)) >= 3
    assert_same(spec, folder)
    name = {"zip": "images_2024_x_y"}.get(layout, layout)
    assert shard_files(folder)[-1].name.startswith(f"{name}-train.array_record-00")


@pytest.mark.parametrize("layout", ["split", "flat"])
def test_tfds_reads_it_without_tensorflow(tmp_path: Path, monkeypatch, layout: str):
    import tensorflow_datasets as tfds

    spec = layouts(tmp_path)[layout]
    folder = convert(spec, str(tmp_path / f"data/{layout}/1.0.0"), shard_mb=2)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "data"))
    for split in SPLITS:
        source, by_name = open_source(spec, split), open_source(f"tfds:{layout}", split)
        assert by_name.fingerprint == source.fingerprint and by_name[0] == source[0]
        builder = tfds.builder_from_directory(folder)
        decoders = {"image": tfds.decode.SkipDecoding()}
        theirs = builder.as_data_source(split, decoders=decoders)
        assert len(theirs) == len(source)
        for i in range(len(source)):
            assert theirs[i]["image"] == source[i]["image"]
            assert theirs[i]["file_name"].decode() == source[i]["name"]
            assert theirs[i].get("label", -1) == source[i]["label"]
        assert builder.as_data_source(split)[0]["image"].shape == (8, 8, 3)
        if layout == "split":
            assert builder.info.features["label"].names == ["ant", "cat", "dog"]
    assert "tensorflow" not in sys.modules


def test_real_photographs(tmp_path: Path, shared_data: Path, monkeypatch):
    monkeypatch.setattr(conversion, "_MIB", 2**20)
    spec = f"folder:{shared_data}/imagenette_like.zip"
    folder = convert(spec, str(tmp_path / "out"), shard_mb=8)
    assert_same(spec, folder)
    sizes = [path.stat().st_size / 2**20 for path in shard_files(folder)]
    assert len(sizes) == 4 and max(sizes) < 8


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_accepts_the_checksums(tmp_path: Path):
    folder = convert(layouts(tmp_path)["split"], str(tmp_path / "out"), shard_mb=2)

    def check() -> subprocess.CompletedProcess:
        command = ["sha256sum", "-c", "SHA256SUMS"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True)

    assert check().returncode == 0
    assert check().stdout.count(": OK") == len(contents(folder)) - 1
    flip_bit(shard_files(folder)[1], 200)
    assert f"{shard_files(folder)[1].name}: FAILED" in check().stdout


def test_running_again_verifies_and_changes_nothing(tmp_path: Path, logged):
    spec = layouts(tmp_path)["split"]
    folder = convert(spec, str(tmp_path / "out"), shard_mb=2)
    before = contents(folder)
    assert str(tmp_path).encode() not in b"".join(before.values())
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    logged.clear()
    convert(spec, str(folder), shard_mb=2)
    assert f"(0 written, {len(shard_files(folder))} verified)" in logged.text
    assert "made again" not in logged.text
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_whatever_is_damaged_is_named_and_made_again(tmp_path: Path, logged, damage: str):
    spec = layouts(tmp_path)["split"]
    folder = convert(spec, str(tmp_path / "out"), shard_mb=2)
    before = contents(folder)
    paths = [path for path in sorted(folder.iterdir()) if path.name != "conversion.json"]
    assert len(paths) >= 9
    for path in paths:
        if damage == "bit":
            flip_bit(path, path.stat().st_size // 2)
        elif damage == "cut":
            os.truncate(path, path.stat().st_size - 1)
        else:
            path.unlink()
        logged.clear()
        convert(spec, str(folder), shard_mb=2)
        assert contents(folder) == before
        if "array_record" in path.name:
            word = "missing" if damage == "gone" else "damaged"
            assert f"{path} is {word}" in logged.text and "it is made again" in logged.text
            assert "1 written, " in logged.text


DAMAGED = ["{", "[]", '{"format": 9}', '{"format": 1, "splits": {}, "shards": {"a": {}}}']


def test_a_damaged_manifest_is_refused(tmp_path: Path):
    spec = layouts(tmp_path)["split"]
    folder = convert(spec, str(tmp_path / "out"), shard_mb=2)
    path = folder / "conversion.json"
    less = path.read_text().replace('"lengths"', '"length"')
    for text in (*DAMAGED, less):
        path.write_text(text)
        for reopen in (
            lambda: convert(spec, str(folder), shard_mb=2),
            lambda: open_source(f"arrayrecord:{folder}"),
        ):
            with pytest.raises(ValueError, match=r"conversion.json is damaged \(.*or delete"):
                reopen()


def test_damaged_labels_are_refused(tmp_path: Path):
    folder = convert(layouts(tmp_path)["split"], str(tmp_path / "out"))
    np.save(folder / "labels-train.npy", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"is damaged.*--config.task=convert\) again"):
        open_source(f"arrayrecord:{folder}")


# Converts in children that kill themselves, as kill -9 does, before they open, rename or remove the
# first, second, ... file. A second child goes on; the parent compares.
KILLED = """
import os, signal, sys
from pathlib import Path
from nat_jax.input import convert as conversion
import google.protobuf.json_format, tensorflow_datasets as tfds, tqdm.contrib.logging
tfds.features.Image(), tfds.features.Text(), tfds.features.ClassLabel(num_classes=2)
from array_record.python import array_record_data_source  # or every child imports it

conversion._MIB = 1500
spec, complete, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])


def child(moment):
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    left = [moment]

    def count(event, arguments):
        if (event == "open" or event.startswith("os.")) and str(folder.parent) in str(arguments):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    conversion.convert(spec, str(folder), shard_mb=1)
    os._exit(0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


kept, moments = 0, 0
while True:
    moments += 1
    status = child(1 + (moments - 1) * int(sys.argv[4]))
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    finished = {p: p.stat().st_ino for p in folder.glob("*-of-*")} if folder.exists() else {}
    noted = (folder / "conversion.json").read_text() if finished else ""
    assert child(0) == 0
    assert contents(folder) == contents(complete), moments
    for path, inode in finished.items():
        if path.name in noted:
            assert path.stat().st_ino == inode, "a finished shard was written again"
            kept += 1
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
assert contents(folder) == contents(complete)
print(moments, kept)
"""


@pytest.mark.parametrize("stride", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, stride: int):
    files = ["train/a/0.jpg", "train/a/1.jpg", "train/b/0.jpg", "test/a/0.jpg", "test/b/0.jpg"]
    spec = f"folder:{write_tree(tmp_path / 'tree', files)}"
    whole = convert(spec, str(tmp_path / "whole"), shard_mb=1)
    assert len(shard_files(whole)) == 4
    folders = [str(whole), str(tmp_path / "killed")]
    moments, kept = map(int, python("-c", KILLED, spec, *folders, str(stride)).stdout.split())
    assert moments > 60 // stride and kept > 100 // stride


def test_the_command_line_needs_no_device(tmp_path: Path):
    spec = f"folder:{write_tree(tmp_path / 'tree', SPLIT_TREE)}"
    command = ["-m", "nat_jax.main", "--config=configs/alexnet.py"]
    command += ["--config.task=convert", f"--config.data.source={spec}"]
    command += [f"--config.convert.to={tmp_path}/out", "--config.convert.shard_mb=1"]
    done = python(*command, cwd=tmp_path, JAX_PLATFORMS="cuda")
    assert "convert: 18 images in 2 shards (2 written, 0 verified)" in done.stderr
    assert f"--config.data.source=arrayrecord:{tmp_path}/out" in done.stderr
    assert_same(spec, tmp_path / "out")
    assert {path.name for path in tmp_path.glob("[!.]*")} == {"out", "tree"}


def begun(tmp_path: Path, spec: str, monkeypatch) -> Path:
    """Convert until the first shard is finished."""
    write = conversion._write_shard

    def stop(path: Path, *others) -> dict:
        if "00000" not in path.name:
            raise KeyboardInterrupt
        return write(path, *others)

    monkeypatch.setattr(conversion, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(spec, str(tmp_path / "out"), shard_mb=2)
    monkeypatch.setattr(conversion, "_write_shard", write)
    return tmp_path / "out"


def test_an_unfinished_conversion_is_no_source(tmp_path: Path, monkeypatch):
    spec = layouts(tmp_path)["split"]
    folder = begun(tmp_path, spec, monkeypatch)
    for argument in (folder, f"{folder}/*"):
        with pytest.raises(ValueError, match="is not finished; run its command .*again"):
            open_source(f"arrayrecord:{argument}")
    convert(spec, str(folder), shard_mb=2)
    assert_same(spec, folder)


def test_a_source_that_changed_in_between_is_refused(tmp_path: Path, monkeypatch):
    spec = layouts(tmp_path)["split"]
    folder = begun(tmp_path, spec, monkeypatch)
    before = contents(folder)
    (tmp_path / "split/train/cat/1.jpg").write_bytes(jpeg(77, width=30))
    changed = f"of {spec} before it changed, .*; expected .*; got .*name a new folder"
    with pytest.raises(ValueError, match=changed):
        convert(spec, str(folder), shard_mb=2)
    assert contents(folder) == before
    other = f"folder:{write_tree(tmp_path / 'other', SPLIT_TREE[::-1])}"
    with pytest.raises(ValueError, match="holds a conversion of another source"):
        convert(other, str(folder), shard_mb=2)
    with pytest.raises(ValueError, match=r"convert.shard_mb .*, 2\); got .*, 3\). Set these"):
        convert(layouts(tmp_path / "again")["split"], str(folder), shard_mb=3)


def test_a_disk_that_fills_up_leaves_what_is_finished(tmp_path: Path):
    # The second half of the images is larger than a file may be: writing fails as on a full disk.
    for i in range(12):
        path = tmp_path / f"tree/train/{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i) if i < 6 else jpeg(i) + bytes(300_000))
    write_tree(tmp_path / "tree/val", ["x.jpg"])
    spec, folder = f"folder:{tmp_path}/tree", tmp_path / "out"
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited[1]))
    try:
        with pytest.raises(ConversionError, match="cannot write .*File too large.*Finished shards"):
            convert(spec, str(folder), shard_mb=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    first = shard_files(folder)
    assert first and not list(folder.glob(".*"))
    inodes = [path.stat().st_ino for path in first]
    convert(spec, str(folder), shard_mb=2)
    assert [path.stat().st_ino for path in first] == inodes
    assert_same(spec, folder)


def damaged_zip(path: Path, count: int, *broken: int) -> str:
    with zipfile.ZipFile(path, "w") as file:
        for i in range(count):
            file.writestr(f"train/{'ab'[i % 2]}/{i:03}.jpg", jpeg(i))
        file.writestr("val/a/x.jpg", jpeg(900))
        file.writestr("val/b/x.jpg", jpeg(901))
    for i in broken:
        flip_bit(path, path.read_bytes().index(jpeg(i)) + 100)
    return f"folder:{path}"


def test_an_unreadable_file_keeps_its_index(tmp_path: Path, logged):
    spec = damaged_zip(tmp_path / "a.zip", 30, 7)
    folder = convert(spec, str(tmp_path / "out"), shard_mb=2)
    before, after = (open_source(s) for s in (spec, f"arrayrecord:{folder}"))
    assert after.fingerprint == before.fingerprint
    bad = 0
    for i in range(len(before)):
        try:
            expected = before[i]
        except UnreadableRecord as error:
            with pytest.raises(UnreadableRecord, match="unreadable or empty") as info:
                after[i]
            assert (info.value.name, info.value.label) == (error.name, error.label)
            bad += 1
        else:
            assert after[i] == expected
    assert bad == 1
    assert "1 of 32 records could not be read and are empty images: train/b/007.jpg" in logged.text
    logged.clear()
    convert(spec, str(folder), shard_mb=2)
    assert "1 of 32 records could not be read" in logged.text


def test_more_than_one_in_a_hundred_unreadable_files_stop_it(tmp_path: Path):
    spec = damaged_zip(tmp_path / "a.zip", 30, 7, 21)
    for _ in range(2):  # it is not forgotten
        with pytest.raises(
            ConversionError, match="more than 1 of the 30 records .* as train/b/021"
        ):
            convert(spec, str(tmp_path / "out"), shard_mb=2)
        assert not (tmp_path / "out/dataset_info.json").exists()


@pytest.mark.parametrize("spec", ["digits", "arrays:x.npz", "tfds:mnist", "arrayrecord:x"])
def test_sources_that_need_no_conversion(tmp_path: Path, spec: str):
    with pytest.raises(ValueError, match=f"{spec} needs no conversion"):
        convert(spec, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_other_mistakes_are_named_before_anything_is_written(tmp_path: Path, tree: Path):
    spec = f"folder:{tree}"
    for to in (None, ""):
        with pytest.raises(ValueError, match="convert.to is missing: .* --config.convert.to=DIR"):
            convert(spec, to)
    with pytest.raises(ValueError, match="shard_mb: expected at least 1; got 0"):
        convert(spec, str(tmp_path / "out"), shard_mb=0)
    with pytest.raises(ValueError, match="unknown source 'imagnet'"):
        convert("imagnet", str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no such folder or .zip"):
        convert("folder:nothing", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot use .*file: .*Choose another"):
        convert(spec, str(tmp_path / "file"))
    with pytest.raises(
        ValueError, match=f"{tree} holds something else, such as test; name an empt"
    ):
        convert(spec, str(tree))


def test_two_processes_do_not_convert_into_one_folder(tmp_path: Path, tree: Path):
    (tmp_path / "out").mkdir()
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is converting into"):
        convert(f"folder:{tree}", str(tmp_path / "out"))
    os.close(handle)
    convert(f"folder:{tree}", str(tmp_path / "out"))
