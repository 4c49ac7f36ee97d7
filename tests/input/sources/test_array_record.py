import io
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import python
from sample_files import (
    example,
    examples,
    flip_bit,
    jpeg,
    labels,
    names,
    write_data_set,
    write_shard,
)

from nat_jax.input.sources import Source, UnreadableRecord, open_source
from nat_jax.input.sources.source import split_positions


def opened(path: Path | str, split: str = "train") -> Source:
    return open_source(f"arrayrecord:{path}", split)


def images(source: Source) -> list[bytes]:
    return [source[i]["image"] for i in range(len(source))]


def test_names_patterns_files_and_folders(prepared: Path):
    folder = prepared / "tiny_shapes/1.2.0"
    for split in ("train", "test"):
        theirs = open_source("tfds:tiny_shapes", split)
        for argument in (folder, f"{folder}/*", f"{prepared}/tiny_shapes/*/*.array_record*"):
            ours = opened(argument, split)
            assert ours.fingerprint == theirs.fingerprint
            assert ours.class_names == theirs.class_names == ("round", "square")
            assert images(ours) == images(theirs) and labels(ours) == labels(theirs)
    whole = opened(folder)
    for argument in (next(folder.glob("*train*")), f"{prepared}/**/*train*"):
        some = opened(argument)  # now there is nothing to test on
        assert images(some) == [images(whole)[i] for i in split_positions(9, "train")]
        assert some.class_names == whole.class_names and some.fingerprint != whole.fingerprint


def raw(count: int, start: int = 0) -> list[bytes]:
    return [jpeg(i) for i in range(start, start + count)]


@pytest.mark.parametrize(
    ("files", "counts"),
    [
        (
            {"a-train.array_record-00000-of-00001": 7, "a-test.array_record-00000-of-00001": 3},
            (7, 3),
        ),
        ({"a-train.array_record": 7, "a-validation.array_record": 3}, (7, 3)),
        ({"train-00000-of-00002.array_record": 4, "train-00001-of-00002.array_record": 3}, (6, 1)),
        ({"train.arrayrecord": 7, "val.arrayrecord": 3, "rest.arrayrecord": 9}, (7, 3)),
        ({"test.array_record": 3, "val.array_record": 4, "train.array_record": 5}, (5, 3)),
        ({"in_train.array_record": 20}, (18, 2)),
        ({"x.array_record": 10, "y.array_record": 10}, (18, 2)),
    ],
)
def test_names_tell_the_splits(tmp_path: Path, files: dict[str, int], counts: tuple[int, int]):
    start = 0
    for name, count in files.items():
        write_shard(tmp_path / name, raw(count, start))
        start += count
    train, test = opened(tmp_path), opened(tmp_path, "test")
    assert (len(train), len(test)) == counts
    assert train.fingerprint != test.fingerprint
    assert not set(images(train)) & set(images(test))
    assert train.num_classes is None and set(labels(train)) == {-1}


def test_files_that_are_no_shards_are_passed_over(tmp_path: Path):
    folder = tmp_path / "a [b]"  # a name that looks like a pattern
    write_shard(folder / "train.array_record", raw(4))
    write_shard(folder / "test.array_record", raw(1, 9))
    (folder / "README").write_text("shards")
    (folder / ".train.array_record.partial").write_text("half")
    (folder / "old.array_record").mkdir()
    for argument in (folder, f"{tmp_path}/a*/*", f"{tmp_path}/**"):
        assert images(opened(argument)) == raw(4)
    assert len(opened(folder / "train.array_record", "test")) == 1
    shutil.copy(folder / "train.array_record", tmp_path / "shard-0")  # by any name it is asked for
    assert len(opened(f"{tmp_path}/shard-?")) == 3


def test_a_held_out_tenth_is_by_position_over_all_shards(tmp_path: Path):
    for i, count in enumerate((12, 1, 17)):
        write_shard(tmp_path / f"x-{i:05}-of-00003.array_record", raw(count, 100 * i))
    everything = raw(12) + raw(1, 100) + raw(17, 200)
    for split in ("train", "test"):
        source, positions = opened(tmp_path, split), split_positions(30, split).tolist()
        assert images(source) == [everything[i] for i in positions]
        known = [source.record_name(i) for i in range(len(source))]  # without reading
        assert known == names(source) == [f"{source.name} [{i}]" for i in positions]


def test_the_index_is_the_position_over_shards_by_number(tmp_path: Path):
    for i in reversed(range(12)):
        write_shard(tmp_path / f"train-{i}-of-12.array_record", [jpeg(i)])
    write_shard(tmp_path / "test.array_record", [jpeg(99)])
    source = opened(tmp_path)
    assert images(source) == raw(12)
    assert source[11]["index"] == 11 and source[11]["name"] == f"arrayrecord:{tmp_path} train[11]"
    with pytest.raises(IndexError):
        source[12]
    with pytest.raises(IndexError):
        source[-1]


def test_a_pattern_may_leave_out_shards_that_are_there(tmp_path: Path):
    write_data_set(tmp_path / "d", {"train": [examples(2), examples(2, 2)], "test": [examples(1)]})
    some = opened(f"{tmp_path}/d/*-00001-of-*")
    assert some.class_names == ("round", "square")
    assert len(some) + len(opened(f"{tmp_path}/d/*-00001-of-*", "test")) == 2
    assert some.fingerprint != opened(tmp_path / "d").fingerprint


def test_test_images_without_labels_give_way_to_validation(tmp_path: Path):
    unlabelled = [example(image=jpeg(i), label=-1) for i in range(3)]
    splits = {"train": [examples(3)], "test": [unlabelled], "validation": [examples(2, 3)]}
    folder = write_data_set(tmp_path / "d", splits)
    assert labels(opened(folder, "test")) == [1, 0]


def test_a_split_that_is_not_there_is_named(tmp_path: Path):
    write_shard(tmp_path / "a/x-test.array_record", raw(3))
    with pytest.raises(ValueError, match="no train split; prepared: test"):
        opened(tmp_path / "a")
    write_data_set(tmp_path / "b", {"left": [examples(3)], "right": [examples(3)]})
    with pytest.raises(ValueError, match="no test or validation split; prepared: left, right"):
        opened(tmp_path / "b", "test")
    assert len(opened(f"{tmp_path}/b/*left*", "test")) == 1


def test_examples_without_metadata(tmp_path: Path):
    contents = [
        example(image__encoded=jpeg(i), filename=b"%d.jpg" % i, label=i % 3, text=b"x", size=1.5)
        for i in range(10)
    ]
    write_shard(tmp_path / "train.array_record", contents)
    write_shard(tmp_path / "test.array_record", contents[:1])
    source = opened(tmp_path)
    assert images(source) == raw(10)
    assert set(labels(source)) == {-1} and source.num_classes is None


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_raw_images_of_every_kind(tmp_path: Path, kind: str):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, kind)
    write_shard(tmp_path / "train.array_record", [file.getvalue()] * 2)
    assert images(opened(tmp_path)) == [file.getvalue()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"neither",
            "expected an encoded image or a tf.train.Example; got 7 bytes that begin with",
        ),
        (b"", "got 0 bytes"),
        (
            example(image=b"pixels", label=1),
            "no encoded image in a record; .* features: image, lab",
        ),
        (example(label=1), "no encoded image in a record; .* features: label"),
        (example(a=jpeg(0), b=jpeg(1)), r"several images \(a, b\) in a record"),
    ],
)
def test_records_that_are_no_images_are_refused_at_once(
    tmp_path: Path, content: bytes, message: str
):
    write_shard(tmp_path / "train.array_record", [content] * 3)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            example(picture=jpeg(0), label=1),
            r"no feature 'image' with bytes \(it has label, pictur",
        ),
        (example(image=jpeg(0)), r"no feature 'label' with an integer \(it has image\)"),
        (example(image=jpeg(0), label=b"x"), "no feature 'label' with an integer"),
        (example(image=3, label=1), "no feature 'image' with bytes"),
        (b"\x0a\xff\xff\xff", "expected an encoded image or a tf.train.Example; got 4 bytes"),
    ],
)
def test_records_that_are_not_as_the_metadata_says(tmp_path: Path, content: bytes, message: str):
    wrong = write_data_set(tmp_path / "wrong", {"train": [[content, *examples(3)]]})
    with pytest.raises(ValueError, match=message):
        opened(wrong)
    splits = {"train": [[*examples(3), content]], "test": [examples(1)]}
    source = opened(write_data_set(tmp_path / "later", splits))
    assert [source[i]["label"] for i in range(3)] == [0, 1, 0]
    with pytest.raises(UnreadableRecord, match=message) as info:
        source[3]
    assert info.value.name == f"arrayrecord:{tmp_path}/later train[3]"


@pytest.mark.parametrize("with_metadata", [True, False])
def test_missing_shards_are_named(tmp_path: Path, with_metadata: bool):
    parts = [examples(2, 2 * i) for i in range(9)]
    folder = write_data_set(tmp_path / "d", {"train": parts, "test": [examples(1, 30)]})
    if not with_metadata:
        (folder / "features.json").unlink()
    for i in (0, 3, 4, 8):
        (folder / f"made-train.array_record-{i:05}-of-00009").unlink()
    with pytest.raises(ValueError) as info:
        opened(folder)
    assert (
        f"4 of 9 shards are missing in {folder}: made-train.array_record-00000-of-00009, "
        "made-train.array_record-00003-of-00009, made-train.array_record-00004-of-00009 and 1 more"
    ) in str(info.value)
    assert len(opened(folder, "test")) == 1
    (folder / "made-test.array_record-00000-of-00001").unlink()
    if with_metadata:  # or a tenth of something else would be judged on
        with pytest.raises(ValueError, match="1 of 1 shards are missing"):
            opened(folder, "test")


def test_shards_of_two_sets_are_not_mixed(tmp_path: Path):
    for name in ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"):
        write_shard(tmp_path / f"x-{name}.array_record", raw(3))
    with pytest.raises(ValueError, match="shards of several sets: 1, 2 shards of x-train in all"):
        opened(tmp_path)
    assert len(opened(f"{tmp_path}/*-of-00002*", "test")) == 1


@pytest.mark.parametrize("argument", ["", "/nothing.array_record", "/*.array_record"])
def test_no_match_says_how_to_make_shards(tmp_path: Path, argument: str):
    (tmp_path / "photo.jpg").write_bytes(jpeg(0))
    with pytest.raises(ValueError, match="no file matches; .*--config.task=convert"):
        opened(f"{tmp_path}{argument}")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "index", "appended"])
def test_a_damaged_shard_is_named_when_it_is_opened(tmp_path: Path, damage: str):
    path = write_shard(tmp_path / "train.array_record", [os.urandom(5000) for _ in range(30)])
    data = bytearray(path.read_bytes())
    index = len(data) - 2**16  # the footer begins a block of 64 KiB
    changed = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "text": b"hello\n" * 20_000,
        "index": data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :],
        "appended": data + b"x",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=f"{path} is damaged, cut off or not an array_record"):
        opened(tmp_path)


def test_a_shard_of_another_length_or_without_records_is_named(tmp_path: Path):
    folder = write_data_set(tmp_path / "d", {"train": [examples(3)], "test": [examples(3)]})
    write_shard(folder / "made-train.array_record-00000-of-00001", examples(4))
    with pytest.raises(ValueError, match=r"has 4 records; dataset_info.json says 3"):
        opened(folder)
    write_shard(tmp_path / "train.array_record", [])
    with pytest.raises(ValueError, match="no records in train.array_record"):
        opened(tmp_path)


@pytest.mark.parametrize("broken", [0, 4, 8])
def test_a_flipped_bit_makes_one_record_unreadable(tmp_path: Path, broken: int):
    contents = examples(9)
    splits = {"train": [contents[:3], contents[3:]], "test": [examples(1, 20)]}
    folder = write_data_set(tmp_path / "d", splits)
    shard, row = (0, broken) if broken < 3 else (1, broken - 3)
    path = folder / f"made-train.array_record-{shard:05}-of-00002"
    assert len(images(opened(folder))) == 9
    flip_bit(path, path.read_bytes().index(jpeg(broken, width=8 + broken)) + 100)
    source = opened(folder)
    for i in range(9):
        if i != broken:
            assert source[i]["image"] == jpeg(i, width=8 + i)
    with pytest.raises(UnreadableRecord, match="hash mismatch") as info:
        source[broken]
    assert info.value.name == f"arrayrecord:{folder} train[{broken}]"
    assert f"made-train.array_record-{shard:05}-of-00002, record {row}: " in info.value.reason


def test_all_records_damaged_is_found_when_it_is_opened(tmp_path: Path):
    path = write_shard(tmp_path / "train.array_record", raw(3))
    for content in raw(3):
        flip_bit(path, path.read_bytes().index(content))
    with pytest.raises(ValueError, match="train.array_record, record 2: .*hash mismatch"):
        opened(tmp_path)


def test_many_threads_read_what_one_reads(tmp_path: Path):
    parts = [raw(20, 100 * i) for i in range(5)]
    for i, part in enumerate(parts):
        write_shard(tmp_path / f"train-{i:05}-of-00005.array_record", part)
    write_shard(tmp_path / "test.array_record", raw(1))
    source, expected = opened(tmp_path), [content for part in parts for content in part]
    order = np.random.default_rng(0).integers(0, 100, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: source[i]["image"], order))
    assert got == [expected[i] for i in order]


READ = """
import pickle, sys
source = pickle.loads(bytes.fromhex(sys.argv[1]))
assert [source[i]["label"] for i in (3, 0)] == [1, 0]
assert source[3]["image"][:2] == b"\\xff\\xd8"
assert "jax" not in sys.modules and "tensorflow" not in sys.modules
"""


def test_a_pickled_source_reads_in_another_process(tmp_path: Path):
    folder = write_data_set(
        tmp_path / "d", {"train": [examples(2), examples(2, 2)], "val": [examples(1)]}
    )
    source = opened(folder)
    source[0]
    assert len(pickle.dumps(source)) < 3000
    (folder / "dataset_info.json").unlink()  # what is known travels along
    python("-c", READ, pickle.dumps(source).hex())


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 4096))
from nat_jax.input import sources
source = sources.open_source("arrayrecord:" + sys.argv[1])
assert sum(source[i]["image"][:2] == b"\\xff\\xd8" for i in range(len(source))) == 100
"""


def test_more_shards_than_files_may_be_open(tmp_path: Path):
    for i in range(100):
        write_shard(tmp_path / f"train-{i:05}-of-00100.array_record", [jpeg(i)])
    write_shard(tmp_path / "test.array_record", [jpeg(0)])
    python("-c", LIMITED, tmp_path)
