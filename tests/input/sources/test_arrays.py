import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from sample_files import idx, images, labels, npz, write_idx_folder, write_tree, zip_tree

from nat_jax.input.sources import arrays, open_source
from nat_jax.input.sources.source import split_positions


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_npz_with_a_test_split(tmp_path: Path, keys: tuple[str, ...]):
    x, y = images(12, 5, 6, 3), np.arange(12)[:, None] % 4  # Keras gives labels as a column
    parts = dict(zip(keys, (x[:9], y[:9], x[9:], y[9:]), strict=True))
    spec = npz(tmp_path / "a.npz", unrelated=np.zeros(3), **parts)
    train, test = open_source(spec), open_source(spec, "test")
    assert np.array_equal(train[8]["image"], x[8]) and np.array_equal(test[2]["image"], x[11])
    assert labels(train) + labels(test) == y[:, 0].tolist()
    assert train.class_names == test.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("others", "count"),
    [
        (("x_val", "y_val"), 3),
        (("x_val", "y_val", "x_test"), 3),
        (("x_val", "y_val", "x_test", "y_test"), 2),
        (("x_val", "x_test"), 2),
    ],
)
def test_which_arrays_are_for_testing(tmp_path: Path, others: tuple[str, ...], count: int):
    counts = {"train": 9, "val": 3, "test": 2}
    arrays = {}
    for key in ("x_train", "y_train", *others):
        n = counts[key[2:]]
        arrays[key] = images(n, 4, 4) if key[0] == "x" else np.arange(n)
    spec = npz(tmp_path / "a.npz", **arrays)
    assert (len(open_source(spec)), len(open_source(spec, "test"))) == (9, count)
    assert (open_source(spec, "test").class_names is None) == ("y_val" not in others)


@pytest.mark.parametrize("keys", [("x", "y"), ("image", "label"), ("x_train", "y_train")])
def test_npz_without_a_test_split_holds_a_tenth_out(tmp_path: Path, keys: tuple[str, str]):
    x, y = images(40, 4, 4), np.arange(40) % 4
    spec = npz(tmp_path / "a.npz", **{keys[0]: x, keys[1]: y})
    for split in ("train", "test"):
        source, rows = open_source(spec, split), split_positions(40, split)
        assert labels(source) == y[rows].tolist()
        assert all(np.array_equal(source[i]["image"], x[row]) for i, row in enumerate(rows))


def test_a_held_out_record_that_is_alone_in_its_class_has_no_label(tmp_path: Path):
    y = np.arange(40) % 4
    alone, other = split_positions(40, "test")[:2]
    y[[alone, other]] = 7, 2
    test = open_source(npz(tmp_path / "a.npz", x=images(40, 4, 4), y=y), "test")
    assert labels(test)[:2] == [-1, 2] and test.class_names == ("0", "1", "2", "3", "7")
    everyone = open_source(npz(tmp_path / "b.npz", x=images(40, 4, 4), y=np.arange(40)), "test")
    assert everyone.class_names is None


def test_npz_without_labels(tmp_path: Path):
    source = open_source(npz(tmp_path / "a.npz", x=images(20, 4, 4, 1)))
    assert source.class_names is None and labels(source) == [-1] * 18


@pytest.mark.parametrize(
    ("train", "test", "classes"),
    [
        ([1, 2, 3, 3], [3, 1], ("1", "2", "3")),
        ([0, 200_000, 100_000, 0], [200_000, 0], ("0", "100000", "200000")),
        ([-1, 0, 1, -1], [1, -1], ("0", "1")),
        ([-1, 7, 5, 5], [6, 7], ("5", "6", "7")),
    ],
)
def test_classes_are_the_labels_that_occur(tmp_path: Path, train, test, classes, caplog):
    with caplog.at_level("INFO"):
        found = made_of(tmp_path, train, test)
    for source, values in zip(found, (train, test), strict=True):
        assert source.class_names == classes and source.num_classes == len(classes)
        assert labels(source) == source.labels.tolist()
        assert [-1 if label < 0 else int(classes[label]) for label in source.labels] == values
    without = f"{train.count(-1)} of 4 records of {tmp_path}/a.npz (train) have no label (-1)"
    assert (without in caplog.text) == (-1 in train)


def made_of(tmp_path: Path, train: list[int], test: list[int]):
    parts = {"x_train": images(len(train), 4, 4), "y_train": np.array(train)}
    parts |= {"x_test": images(len(test), 4, 4), "y_test": np.array(test, np.int32)}
    spec = npz(tmp_path / "a.npz", **parts)
    return open_source(spec), open_source(spec, "test")


def test_labels_that_are_all_missing(tmp_path: Path):
    train, test = made_of(tmp_path, [-1, -1], [2, 4])
    assert train.class_names is None and labels(train) == [-1, -1]
    assert test.class_names == ("2", "4")


def test_labels_of_idx_files_from_one(tmp_path: Path):
    spec = write_idx_folder(tmp_path / "idx")
    (tmp_path / "idx/train-labels-idx1-ubyte").write_bytes(idx(np.arange(1, 10, dtype=np.uint8)))
    assert open_source(spec).class_names == tuple("0123456789")  # 0 is in the test split
    (tmp_path / "idx/t10k-labels.idx1-ubyte.gz").unlink()
    train = open_source(spec)
    assert train.class_names == tuple("123456789") and labels(train) == list(range(9))


def test_array_fingerprints_see_every_pixel_and_label(tmp_path: Path):
    x, y = images(10, 4, 4), np.arange(1, 11)
    found = {open_source(npz(tmp_path / "a.npz", x=x, y=y)).fingerprint}
    found.add(open_source(npz(tmp_path / "b.npz", x=x, y=y)).fingerprint)
    assert len(found) == 1
    first, second = split_positions(10, "train")[:2]
    x[first, 1, 2] ^= 1
    found.add(open_source(npz(tmp_path / "c.npz", x=x, y=y)).fingerprint)
    y[second] = 0
    found.add(open_source(npz(tmp_path / "d.npz", x=x, y=y)).fingerprint)
    found.add(open_source(npz(tmp_path / "e.npz", x=x, y=2 * y)).fingerprint)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": images(4, 2, 2)}, r"holds pictures; expected arrays named x_train\[, y_tr"),
        ({f"p{i}": np.zeros(1) for i in range(20)}, r"holds p0, .*, p7 and 12 more; expected"),
        ({"x": images(4, 2, 2) / 255}, r"x in .* is float64\[4, 2, 2\]; expected uint8"),
        ({"x": images(4, 8)}, r"x in .* is uint8\[4, 8\]; expected uint8 images \[N, H, W\]"),
        ({"x": images(4, 2, 2, 2)}, r"uint8\[4, 2, 2, 2\]; expected uint8 images"),
        ({"x": images(0, 2, 2)}, r"x in .* is empty: \[0, 2, 2\]"),
        ({"x": images(4, 2, 2), "y": np.arange(3)}, r"y in .* is int64\[3\]; expected one integer"),
        ({"x": images(4, 2, 2), "y": np.ones(4)}, r"y in .* is float64\[4\]; expected one integer"),
        ({"x": images(4, 2, 2), "y": np.arange(4) - 2}, r"labels below -1, .*lowest -2"),
        ({"x": np.array([None] * 4)}, r"plain arrays: x holds other objects; expected numbers$"),
    ],
)
def test_unfit_npz_files_are_named_with_what_was_expected(tmp_path: Path, arrays, message: str):
    with pytest.raises(ValueError, match=message):
        open_source(npz(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize("keys", arrays._NPZ_LAYOUTS)
def test_every_key_in_the_message_can_be_read(tmp_path: Path, keys: tuple[str | None, ...]):
    parts = {
        key: images(8, 2, 2) if "y" not in key and "label" not in key else np.arange(8) % 2
        for key in filter(None, keys)
    }
    source = open_source(npz(tmp_path / "a.npz", **parts))
    assert source.num_classes == 2
    with pytest.raises(ValueError) as caught:
        open_source(npz(tmp_path / "b.npz", other=images(8, 2, 2)))
    assert all(key in str(caught.value) for key in parts)


def test_arrays_of_other_names_are_said_to_be_left_out(tmp_path: Path, caplog):
    keys = ("train_images", "val_images", "test_images")
    spec = npz(tmp_path / "a.npz", **{key: images(4, 2, 2) for key in keys})
    with caplog.at_level(logging.INFO):
        for split in ("train", "test"):
            open_source(spec, split)
    assert caplog.messages == [f"arrays: {tmp_path}/a.npz: left out val_images"]


WRONG = {
    "page.npz": (b"<html><body>403", r"markup, as web pages .*'<html><body>403'.*download it"),
    "a.npz": (b"\x1f\x8b\x08" + bytes(30), r"compressed by gzip, .*; unpack it"),
    "text.npz": (b"hello", r"of no known kind \(it begins with 'hello'\)"),
    "empty.npz": (b"", "it is empty"),
    "lfs.npz": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "pickle.npz": (pickle.dumps([1, 2, 3]), r"a Python pickle; make an \.npz"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_under_a_wrong_name_is_named_by_what_it_is(tmp_path: Path, name: str):
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not a readable \.npz .*{message}") as caught:
        open_source(f"arrays:{tmp_path / name}")
    assert "allow_pickle" not in str(caught.value)


def test_files_that_are_no_npz(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no such file or folder: .*nowhere"):
        open_source(f"arrays:{tmp_path}/nowhere.npz")
    np.save(tmp_path / "one.npy", images(4, 2, 2))
    with pytest.raises(ValueError, match=r"one\.npy is not .*a single array, .*np\.savez\("):
        open_source(f"arrays:{tmp_path}/one.npy")
    whole = Path(npz(tmp_path / "whole.npz", x=images(40, 9, 9)).removeprefix("arrays:"))
    data = bytearray(whole.read_bytes())
    (tmp_path / "cut.npz").write_bytes(data[:900])
    data[data.index(b"PK\1\2") + 8] |= 1  # encrypted, says the directory
    (tmp_path / "locked.npz").write_bytes(data)
    for name in ("cut.npz", "locked.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable \.npz file"):
            open_source(f"arrays:{tmp_path}/{name}")
    tree = write_tree(tmp_path / "tree", ["a/0.jpg", "b/0.jpg"])
    with pytest.raises(ValueError, match=r"holds a/0\.jpg, .* image files is read by folder:"):
        open_source(f"arrays:{zip_tree(tree, tmp_path / 'images.zip')}")


def test_idx_folder_plain_and_packed(tmp_path: Path):
    spec = write_idx_folder(tmp_path / "idx")
    train, test = open_source(spec), open_source(spec, "test")
    x = images(12, 5, 6)
    assert np.array_equal(train[8]["image"], x[8]) and np.array_equal(test[0]["image"], x[9])
    assert labels(train) + labels(test) == [0, 1, 2] * 4
    (tmp_path / "idx/train-labels-idx1-ubyte").unlink()
    assert open_source(spec).class_names is None
    packed = tmp_path / "idx/train-images-idx3-ubyte.gz"
    packed.write_bytes(idx(x[:9]))  # as browsers leave it, which unpack and keep the name
    assert np.array_equal(open_source(spec).images, x[:9])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], r"truncated or damaged: its header says \[9\], so 9 bytes, but 8"),
        (lambda data: data + b"x", r"so 9 bytes, but 10 follow"),
        (lambda data: b"\0\0\x0d\x01" + data[4:], r"starts with 0x00000d01, not 0x00000801"),
        (lambda data: data[:5], r"truncated: 5 bytes"),
        (lambda data: idx(np.zeros(8, np.uint8)), r"uint8\[8\]; expected one integer label for"),
    ],
)
def test_damaged_idx_files(tmp_path: Path, damage, message: str):
    spec = write_idx_folder(tmp_path / "idx")
    path = tmp_path / "idx/train-labels-idx1-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        open_source(spec)


def test_damaged_gzip_and_a_folder_without_idx_files(tmp_path: Path):
    spec = write_idx_folder(tmp_path / "idx")
    path = tmp_path / "idx/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        open_source(spec)
    write_tree(tmp_path / "other", ["0.jpg"])
    with pytest.raises(ValueError, match=r"no idx files in .*other \(it holds 0\.jpg\).*folder:"):
        open_source(f"arrays:{tmp_path}/other")


def test_real_fashion_mnist(shared_data: Path):
    train = open_source(f"arrays:{shared_data}/fashion_mnist")
    test = open_source(f"arrays:{shared_data}/fashion_mnist", "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert abs(train.images.mean() / 255 - 0.2860) < 1e-4
