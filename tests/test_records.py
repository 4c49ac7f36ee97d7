import gzip
import io
import logging
import os
import pickle
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nat_jax import records
from nat_jax.records.source import split_positions


def jpeg(seed: int, height: int = 8, width: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def write_tree(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    return root


def zip_tree(root: Path, archive: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            file.write(path, prefix + path.relative_to(root).as_posix())
    return archive


SPLIT_TREE = [
    f"{split}/{name}/{i}.jpg"
    for split, n in (("train", 4), ("test", 2))
    for name in ("cat", "ant", "dog")
    for i in range(n)
]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", SPLIT_TREE)


def names(source: records.Source) -> list[str]:
    return [source[i]["name"] for i in range(len(source))]


def labels(source: records.Source) -> list[int]:
    return [source[i]["label"] for i in range(len(source))]


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return f"arrays:{path}"


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


# What holds for every source.


@pytest.fixture(params=["digits", "folder", "zip", "npz", "idx", "tfds"])
def any_spec(request, tmp_path: Path) -> str:
    kind = request.param
    if kind == "digits":
        return "digits"
    if kind == "npz":
        return npz(tmp_path / "a.npz", x=images(30, 4, 4), y=np.arange(30) % 3)
    if kind == "idx":
        return write_idx_folder(tmp_path / "idx")
    if kind == "tfds":
        request.getfixturevalue("prepared")
        return "tfds:tiny_shapes"
    root = write_tree(tmp_path / "tree", SPLIT_TREE)
    return f"folder:{root if kind == 'folder' else zip_tree(root, tmp_path / 'tree.zip')}"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_source_numbers_its_records_and_survives_pickling(any_spec: str, split: str):
    source = records.open_source(any_spec, split)
    again = pickle.loads(pickle.dumps(source))
    assert (source.name, source.split) == (any_spec, split)
    assert (again.name, again.split, len(again)) == (any_spec, split, len(source))
    assert len(again.fingerprint) == 64 and again.fingerprint == source.fingerprint
    assert again.class_names == source.class_names and len(source.class_names) > 1
    assert again.num_classes == source.num_classes == len(source.class_names)
    for index in range(len(source)):
        record, other = source[index], again[index]
        assert record["index"] == index
        assert 0 <= record["label"] < source.num_classes
        assert np.array_equal(record.pop("image"), other.pop("image"))
        assert record == other
    assert len(set(names(source))) == len(source)


def test_train_and_test_have_different_fingerprints(any_spec: str):
    train, test = (records.open_source(any_spec, s) for s in ("train", "test"))
    assert train.fingerprint != test.fingerprint


# Specifications.


def test_unknown_source_lists_the_known_ones_and_suggests_the_path(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown source 'mnist'; known: digits, folder:PATH, "):
        records.open_source("mnist")
    with pytest.raises(ValueError, match=f"did you mean folder:{tmp_path} or arrays:"):
        records.open_source(str(tmp_path))
    assert set(records.SOURCES) == {"digits", "folder", "arrays", "tfds"}


@pytest.mark.parametrize("kind", ["folder", "arrays", "tfds"])
def test_a_source_without_its_argument_says_what_to_write(kind: str):
    with pytest.raises(ValueError, match=f"write {kind}:(PATH|NAME)"):
        records.open_source(kind)


def test_digits_with_an_argument_and_an_unknown_split_are_refused():
    with pytest.raises(ValueError, match="digits takes no argument, got digits:x"):
        records.open_source("digits:x")
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, test"):
        records.open_source("digits", "valid")


# The held-out tenth.


@pytest.mark.parametrize("count", [2, 9, 10, 37, 1000])
def test_held_out_positions_are_a_tenth_and_the_rest(count: int):
    train, test = split_positions(count, "train"), split_positions(count, "test")
    assert len(test) == max(1, count // 10)
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(count))
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()


def test_held_out_positions_never_change():
    # A change here moves images between training and probes in data sets that people use.
    assert split_positions(50, "test").tolist() == [10, 18, 21, 41, 48]


def test_held_out_positions_are_spread_over_sorted_data():
    test = split_positions(10_000, "test")
    per_tenth = np.histogram(test, bins=10, range=(0, 10_000))[0]
    assert (per_tenth > 60).all() and (per_tenth < 140).all()


def test_one_image_cannot_be_split():
    with pytest.raises(ValueError, match="1 image: too few to hold one out"):
        split_positions(1, "train")


# digits


def test_digits_are_scikit_learns_in_file_order():
    from sklearn.datasets import load_digits

    data = load_digits()
    train, test = records.open_source("digits"), records.open_source("digits", "test")
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert labels(train) + labels(test) == data.target.tolist()
    image = test[0]["image"]
    assert image.dtype == np.uint8 and image.shape == (8, 8)
    assert np.abs(image - data.images[1437] * 255 / 16).max() <= 0.5
    assert max(train[i]["image"].max() for i in range(100)) == 255


# folder


def test_folder_splits_share_one_sorted_list_of_classes(tree: Path):
    (tree / "test/dog/0.jpg").rename(tree / "test/0.tmp")
    write_tree(tree, ["test/bee/0.jpg"])
    train, test = (records.open_source(f"folder:{tree}", s) for s in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "bee", "cat", "dog")
    assert labels(train) == [0] * 4 + [2] * 4 + [3] * 4
    assert names(test)[:3] == ["test/ant/0.jpg", "test/ant/1.jpg", "test/bee/0.jpg"]
    assert test[2]["image"] == (tree / "test/bee/0.jpg").read_bytes()


def test_val_stands_in_for_test_and_gives_way_to_it(tree: Path, caplog):
    (tree / "test").rename(tree / "val")
    assert len(records.open_source(f"folder:{tree}", "test")) == 6
    write_tree(tree, ["test/ant/0.jpg"])
    with caplog.at_level(logging.INFO):
        assert names(records.open_source(f"folder:{tree}", "test")) == ["test/ant/0.jpg"]
    assert "left out 6 image(s) outside train/ and test/" in caplog.text


def test_class_folders_without_splits_hold_a_tenth_out(tmp_path: Path):
    write_tree(tmp_path, [f"{c}/{i:02d}.jpg" for c in "ab" for i in range(20)])
    train, test = (records.open_source(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    assert train.class_names == test.class_names == ("a", "b")
    everything = sorted(names(train) + names(test))
    assert everything == [f"{c}/{i:02d}.jpg" for c in "ab" for i in range(20)]
    for source in (train, test):
        assert labels(source) == ["ab".index(n[0]) for n in names(source)]


def test_a_flat_folder_is_unlabelled(tmp_path: Path):
    write_tree(tmp_path, [f"{i}.jpg" for i in range(10)])
    train, test = (records.open_source(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (9, 1)
    assert train.class_names is None and train.num_classes is None
    assert labels(train) == [-1] * 9


def test_a_flat_test_folder_beside_a_labelled_one_is_unlabelled(tmp_path: Path):
    write_tree(tmp_path, ["train/a/0.jpg", "train/b/0.jpg", "test/0.jpg"])
    assert records.open_source(f"folder:{tmp_path}").class_names == ("a", "b")
    test = records.open_source(f"folder:{tmp_path}", "test")
    assert test.class_names is None and labels(test) == [-1]


def test_zip_and_folder_of_one_tree_are_the_same_data(tree: Path, tmp_path: Path):
    spec = f"folder:{zip_tree(tree, tmp_path / 'tree.zip')}"
    for split in ("train", "test"):
        folder, archive = (
            records.open_source(f"folder:{tree}", split),
            records.open_source(spec, split),
        )
        assert archive.fingerprint == folder.fingerprint
        assert [archive[i] for i in range(len(archive))] == [folder[i] for i in range(len(folder))]


def test_a_common_top_folder_is_looked_through(tree: Path, tmp_path: Path):
    archive = zip_tree(tree, tmp_path / "deep.zip", prefix="some/where/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/train/._0.jpg", b"no")
    source = records.open_source(f"folder:{archive}", "test")
    assert (len(source), source.num_classes) == (6, 3)
    assert source[0]["name"] == "some/where/test/ant/0.jpg"


def test_hidden_files_are_skipped_and_other_suffixes_counted(tree: Path, caplog):
    write_tree(tree, ["train/cat/.hidden.jpg", ".cache/a/1.jpg", "__MACOSX/a/2.jpg"])
    write_tree(tree, ["train/cat/UPPER.JPEG", "train/cat/deeper/5.Png"])
    (tree / "train/cat/notes.txt").write_text("no image")
    (tree / "README.md").write_text("no image")
    with caplog.at_level(logging.INFO):
        source = records.open_source(f"folder:{tree}")
    assert len(source) == 12 + 2
    assert {"train/cat/UPPER.JPEG", "train/cat/deeper/5.Png"} <= set(names(source))
    assert "left out 2 file(s)" in caplog.text


def test_links_are_followed_and_loops_end(tree: Path, tmp_path: Path):
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    for name in ("ant", "cat", "dog"):
        (linked / "train" / name).symlink_to(tree / "train" / name)
    (linked / "test").symlink_to(tree / "test")
    (tree / "train/cat/loop").symlink_to(linked)
    assert len(records.open_source(f"folder:{linked}")) == 12


def test_mistakes_with_folders_have_one_clear_message(tree: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no such folder or \.zip: .*nowhere"):
        records.open_source(f"folder:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty \(0 other files\); expected files"):
        records.open_source(f"folder:{tmp_path}/empty")
    (tmp_path / "empty/a.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no images in .*empty \(1 other files\)"):
        records.open_source(f"folder:{tmp_path}/empty")
    with pytest.raises(ValueError, match=r"neither a folder nor a readable \.zip"):
        records.open_source(f"folder:{tree}/train/cat/0.jpg")
    write_tree(tree, ["train/loose.jpg"])
    with pytest.raises(ValueError, match=r"mixes 1 loose images \(such as train/loose.jpg\)"):
        records.open_source(f"folder:{tree}")


def test_a_zip_with_a_password_is_refused_at_once(tree: Path, tmp_path: Path):
    archive = zip_tree(tree, tmp_path / "locked.zip")
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(signature)
        data[at + offset] |= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="protected by a password"):
        records.open_source(f"folder:{archive}")


def test_files_that_vanish_or_break_later_keep_name_and_label(tree: Path, tmp_path: Path):
    source = records.open_source(f"folder:{tree}")
    (tree / "train/cat/0.jpg").unlink()
    with pytest.raises(records.UnreadableRecord, match=r"train/cat/0\.jpg: .*No such file") as info:
        source[4]
    assert (info.value.name, info.value.label) == ("train/cat/0.jpg", 1)

    archive = zip_tree(tree, tmp_path / "damaged.zip")
    content = (tree / "train/dog/2.jpg").read_bytes()
    data = archive.read_bytes()
    archive.write_bytes(data.replace(content, content[:-9] + b"x" + content[-8:]))
    damaged = records.open_source(f"folder:{archive}")
    bad = names_that_fail(damaged)
    assert bad == ["train/dog/2.jpg: Bad CRC-32 for file 'train/dog/2.jpg'"]


def names_that_fail(source: records.Source) -> list[str]:
    failures = []
    for index in range(len(source)):
        try:
            source[index]
        except records.UnreadableRecord as error:
            failures.append(str(error))
    return failures


def test_threads_may_read_one_zip_at_once(tree: Path, tmp_path: Path):
    source = records.open_source(f"folder:{zip_tree(tree, tmp_path / 'tree.zip')}")
    wanted = [source[i % 12]["image"] for i in range(600)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: source[i % 12]["image"], range(600))) == wanted


def test_fingerprints_see_names_sizes_and_order(tree: Path):
    before = records.open_source(f"folder:{tree}").fingerprint
    assert records.open_source(f"folder:{tree}").fingerprint == before
    (tree / "train/cat/0.jpg").rename(tree / "train/cat/9.jpg")
    renamed = records.open_source(f"folder:{tree}").fingerprint
    with (tree / "train/ant/0.jpg").open("ab") as file:
        file.write(b"\0")
    longer = records.open_source(f"folder:{tree}").fingerprint
    assert len({before, renamed, longer}) == 3


# arrays


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
    train, test = records.open_source(spec), records.open_source(spec, "test")
    assert np.array_equal(train[8]["image"], x[8]) and np.array_equal(test[2]["image"], x[11])
    assert labels(train) + labels(test) == y[:, 0].tolist()
    assert train.class_names == test.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize("keys", [("x", "y"), ("image", "label"), ("x_train", "y_train")])
def test_npz_without_a_test_split_holds_a_tenth_out(tmp_path: Path, keys: tuple[str, str]):
    x, y = images(40, 4, 4), np.arange(40)
    spec = npz(tmp_path / "a.npz", **{keys[0]: x, keys[1]: y})
    train, test = records.open_source(spec), records.open_source(spec, "test")
    assert labels(test) == split_positions(40, "test").tolist()
    assert sorted(labels(train) + labels(test)) == list(range(40))
    assert all(np.array_equal(train[i]["image"], x[train[i]["label"]]) for i in range(len(train)))


def test_npz_without_labels(tmp_path: Path):
    source = records.open_source(npz(tmp_path / "a.npz", x=images(20, 4, 4, 1)))
    assert source.class_names is None and labels(source) == [-1] * 18


def test_array_fingerprints_see_every_pixel_and_label(tmp_path: Path):
    x, y = images(10, 4, 4), np.arange(1, 11)
    found = {records.open_source(npz(tmp_path / "a.npz", x=x, y=y)).fingerprint}
    found.add(records.open_source(npz(tmp_path / "b.npz", x=x, y=y)).fingerprint)
    assert len(found) == 1
    first, second = split_positions(10, "train")[:2]
    x[first, 1, 2] ^= 1
    found.add(records.open_source(npz(tmp_path / "c.npz", x=x, y=y)).fingerprint)
    y[second] = 0
    found.add(records.open_source(npz(tmp_path / "d.npz", x=x, y=y)).fingerprint)
    assert len(found) == 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": images(4, 2, 2)}, r"holds pictures; expected x_train, y_train"),
        ({"x": images(4, 2, 2) / 255}, r"x in .* is float64\[4, 2, 2\]; expected uint8"),
        ({"x": images(4, 8)}, r"x in .* is uint8\[4, 8\]; expected uint8 images \[N, H, W\]"),
        ({"x": images(4, 2, 2, 2)}, r"uint8\[4, 2, 2, 2\]; expected uint8 images"),
        ({"x": images(0, 2, 2)}, r"x in .* is empty: \[0, 2, 2\]"),
        ({"x": images(4, 2, 2), "y": np.arange(3)}, r"y in .* is int64\[3\]; expected one integer"),
        ({"x": images(4, 2, 2), "y": np.ones(4)}, r"y in .* is float64\[4\]; expected one integer"),
        ({"x": images(4, 2, 2), "y": np.arange(4) - 1}, r"labels below 0 \(lowest -1\)"),
        ({"x": np.array([None] * 4)}, r"not a readable \.npz file of plain arrays"),
    ],
)
def test_unfit_npz_files_are_named_with_what_was_expected(tmp_path: Path, arrays, message: str):
    with pytest.raises(ValueError, match=message):
        records.open_source(npz(tmp_path / "a.npz", **arrays))


def test_files_that_are_no_npz(tmp_path: Path):
    with pytest.raises(ValueError, match=r"no such file or folder: .*nowhere"):
        records.open_source(f"arrays:{tmp_path}/nowhere.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", images(4, 2, 2))
    whole = npz(tmp_path / "whole.npz", x=images(40, 9, 9)).removeprefix("arrays:")
    (tmp_path / "cut.npz").write_bytes(Path(whole).read_bytes()[:900])
    for name in ("text.npz", "one.npy", "cut.npz"):
        with pytest.raises(ValueError, match=rf"{name} is not a readable \.npz file"):
            records.open_source(f"arrays:{tmp_path}/{name}")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_idx_folder(root: Path) -> str:
    root.mkdir()
    x, y = images(12, 5, 6), (np.arange(12) % 3).astype(np.uint8)
    with gzip.open(root / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(idx(x[:9]))
    (root / "train-labels-idx1-ubyte").write_bytes(idx(y[:9]))
    (root / "t10k-images.idx3-ubyte").write_bytes(idx(x[9:]))
    with gzip.open(root / "t10k-labels.idx1-ubyte.gz", "wb") as file:
        file.write(idx(y[9:]))
    return f"arrays:{root}"


def test_idx_folder_plain_and_packed(tmp_path: Path):
    spec = write_idx_folder(tmp_path / "idx")
    train, test = records.open_source(spec), records.open_source(spec, "test")
    x = images(12, 5, 6)
    assert np.array_equal(train[8]["image"], x[8]) and np.array_equal(test[0]["image"], x[9])
    assert labels(train) + labels(test) == [0, 1, 2] * 4
    (tmp_path / "idx/train-labels-idx1-ubyte").unlink()
    assert records.open_source(spec).class_names is None


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
        records.open_source(spec)


def test_damaged_gzip_and_a_folder_without_idx_files(tmp_path: Path):
    spec = write_idx_folder(tmp_path / "idx")
    path = tmp_path / "idx/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        records.open_source(spec)
    write_tree(tmp_path / "other", ["0.jpg"])
    with pytest.raises(ValueError, match=r"no idx files in .*other \(it holds 0\.jpg\).*folder:"):
        records.open_source(f"arrays:{tmp_path}/other")


# tfds

BUILDER = """
import io
import sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        features = tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["round", "square"]),
        })
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        splits = {"train": self._make(9), "validation": self._make(4)}
        return splits | {key: self._make(3, -1) for key in sys.argv[2:]}

    def _make(self, count, label=None):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((6, 7, 3), i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2 if label is None else label}

    def _generate_examples(self):
        raise NotImplementedError
"""

PREPARE = """
import sys
from tiny_shapes.tiny_shapes_dataset_builder import Builder
Builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="session")
def prepare(tmp_path_factory) -> Callable[..., Path]:
    code = tmp_path_factory.mktemp("code")
    (code / "tiny_shapes").mkdir()
    (code / "tiny_shapes/__init__.py").touch()
    (code / "tiny_shapes/tiny_shapes_dataset_builder.py").write_text(BUILDER)

    def run(*unlabelled_splits: str) -> Path:
        data = tmp_path_factory.mktemp("tfds")
        environment = {**os.environ, "PYTHONPATH": str(code)}
        command = [sys.executable, "-c", PREPARE, str(data), *unlabelled_splits]
        subprocess.run(command, check=True, env=environment, cwd=code, timeout=120)
        return data

    return run


@pytest.fixture(scope="session")
def prepared_dir(prepare: Callable[..., Path]) -> Path:
    return prepare()


@pytest.fixture
def prepared(prepared_dir: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_dir))
    return prepared_dir


def test_tfds_gives_encoded_records_and_validation_as_test(prepared: Path):
    train = records.open_source("tfds:tiny_shapes:1.2.0")
    test = records.open_source("tfds:tiny_shapes", "test")
    assert (len(train), len(test), train.class_names) == (9, 4, ("round", "square"))
    for source in (train, test):
        for i in range(len(source)):
            record = source[i]
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
            assert pixels.shape == (6, 7, 3) and pixels[0, 0, 0] % 2 == record["label"]
    assert test[1]["name"] == "tfds:tiny_shapes validation[1]"


@pytest.mark.parametrize("extra", ["test", "other"])
def test_tfds_test_images_without_labels_give_way_to_validation(
    prepare: Callable[..., Path], monkeypatch, extra: str
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepare(extra)))
    test = records.open_source("tfds:tiny_shapes", "test")
    assert sorted(labels(test)) == [0, 0, 1, 1]


def test_tfds_without_a_train_split_or_images_says_what_there_is():
    from nat_jax.records import tfds

    builder = types.SimpleNamespace(info=types.SimpleNamespace(features={"text": 0}, splits={}))
    with pytest.raises(ValueError, match=r"no feature 'image' in this data set \(it has text\)"):
        tfds._split_key(builder, "train", "tfds:x")
    builder.info.features = {"image": 0}
    with pytest.raises(ValueError, match="no test or validation split; prepared: none"):
        tfds._split_key(builder, "test", "tfds:x")


@pytest.mark.parametrize("then", ["", "import tensorflow"])
def test_tfds_never_imports_tensorflow(prepared: Path, tmp_path: Path, then: str):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("import os; os._exit(7)")
    code = (
        "from nat_jax import records\n"
        "assert len(records.open_source('tfds:tiny_shapes')[8]['image'])\n" + then
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"}
    command = [sys.executable, "-c", code]
    status = subprocess.run(command, env=environment, timeout=120).returncode
    assert status == (7 if then else 0)


def refused(spec: str) -> str:
    """Open what cannot be opened; give the message, which must come without trying to download."""
    start = time.monotonic()
    with pytest.raises(ValueError) as info:
        records.open_source(spec)
    assert time.monotonic() - start < 30, "took as long as a download that is tried again and again"
    assert "tensorflow" not in sys.modules
    return str(info.value)


def test_tfds_that_is_not_prepared_says_how(prepared: Path):
    message = refused("tfds:mnist")
    assert f"mnist is not prepared in {prepared}" in message
    assert f"tfds.builder('mnist', data_dir='{prepared}', file_format='array_record')" in message
    assert ".download_and_prepare()" in message


def test_tfds_unknown_names_and_versions(prepared: Path):
    assert "TFDS does not know that name (known: mnist" in refused("tfds:mnits")
    message = refused("tfds:tiny_shapes:9.9.9")
    assert "not prepared in version 9.9.9; prepared: 1.2.0" in message


def fake(data: Path, path: str, content: str) -> None:
    (data / path).mkdir(parents=True)
    (data / path / "dataset_info.json").write_text(content)


def test_tfds_in_another_format_says_how_to_prepare_it(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fake(tmp_path, "mnist/3.0.1", '{"fileFormat": "tfrecord"}')
    message = refused("tfds:mnist")
    assert "is prepared as tfrecord" in message and "file_format='array_record'" in message


def test_tfds_takes_the_newest_version_and_asks_for_the_configuration(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fake(tmp_path, "a/2.0.0", '{"fileFormat": "older"}')
    fake(tmp_path, "a/10.0.0", '{"fileFormat": "newer"}')
    assert "10.0.0 is prepared as newer" in refused("tfds:a")
    fake(tmp_path, "b/left/1.0.0", "{}")
    fake(tmp_path, "b/right/1.0.0", "{}")
    assert "name one: tfds:b/left, tfds:b/right" in refused("tfds:b")
    assert "left/1.0.0 is prepared as tfrecord" in refused("tfds:b/left")


# Real data.


def test_real_fashion_mnist(shared_data: Path):
    train = records.open_source(f"arrays:{shared_data}/fashion_mnist")
    test = records.open_source(f"arrays:{shared_data}/fashion_mnist", "test")
    assert (len(train), len(test)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert abs(train.images.mean() / 255 - 0.2860) < 1e-4


def test_real_cifar10_zip_agrees_with_the_exact_pixels(shared_data: Path):
    lossy = records.open_source(f"folder:{shared_data}/cifar10.zip", "test")
    exact = records.open_source(f"arrays:{shared_data}/cifar10_exact_subset.npz", "test")
    assert (len(lossy), lossy.num_classes, lossy.class_names[9]) == (10_000, 10, "truck")
    seen: dict[int, int] = {}
    for i in range(100):
        label, image = exact[i]["label"], exact[i]["image"].astype(float)
        record = lossy[1000 * label + seen.get(label, 0)]
        seen[label] = seen.get(label, 0) + 1
        decoded = np.asarray(Image.open(io.BytesIO(record["image"])))
        assert record["label"] == label
        assert np.square(decoded - image).mean() < 255**2 / 10**2.2  # 22 dB


def test_real_imagenette_zip_uses_val_as_test(shared_data: Path):
    train = records.open_source(f"folder:{shared_data}/imagenette_like.zip")
    test = records.open_source(f"folder:{shared_data}/imagenette_like.zip", "test")
    assert (len(train), len(test), train.num_classes) == (1920, 450, 6)
    assert test[0]["name"].startswith("val/n01440764/")
