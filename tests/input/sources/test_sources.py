import pickle
from pathlib import Path

import numpy as np
import pytest
from sample_files import (
    SPLIT_TREE,
    images,
    labels,
    names,
    npz,
    write_idx_folder,
    write_tree,
    zip_tree,
)

from nat_jax.input.convert import convert
from nat_jax.input.sources import SOURCES, open_source
from nat_jax.input.sources.source import split_positions


@pytest.fixture(
    params=["digits", "folder", "zip", "npz", "idx", "tfds", "arrayrecord", "converted"]
)
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
    if kind == "arrayrecord":
        return f"arrayrecord:{request.getfixturevalue('prepared')}/tiny_shapes/1.2.0"
    root = write_tree(tmp_path / "tree", SPLIT_TREE)
    if kind == "converted":
        return f"arrayrecord:{convert(f'folder:{root}', str(tmp_path / 'shards'))}"
    return f"folder:{root if kind == 'folder' else zip_tree(root, tmp_path / 'tree.zip')}"


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_source_numbers_its_records_and_survives_pickling(any_spec: str, split: str):
    source = open_source(any_spec, split)
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
    train, test = (open_source(any_spec, s) for s in ("train", "test"))
    assert train.fingerprint != test.fingerprint


def test_unknown_source_lists_the_known_ones_and_suggests_the_path(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown source 'mnist'; known: digits, folder:PATH, "):
        open_source("mnist")
    with pytest.raises(ValueError, match=f"did you mean folder:{tmp_path} or arrays:"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="arrays:PATH, tfds:NAME, arrayrecord:GLOB$"):
        open_source("mnist")
    with pytest.raises(ValueError, match=r"; there is no /nowhere/x, .* as in folder:PATH$"):
        open_source("/nowhere/x")
    assert set(SOURCES) == {"digits", "folder", "arrays", "tfds", "arrayrecord"}


@pytest.mark.parametrize("kind", ["folder", "arrays", "tfds", "arrayrecord"])
def test_a_source_without_its_argument_says_what_to_write(kind: str):
    with pytest.raises(ValueError, match=f"write {kind}:(PATH|NAME|GLOB)"):
        open_source(kind)


def test_digits_with_an_argument_and_an_unknown_split_are_refused():
    with pytest.raises(ValueError, match="digits takes no argument, got digits:x"):
        open_source("digits:x")
    with pytest.raises(ValueError, match="unknown split 'valid'; known: train, test"):
        open_source("digits", "valid")


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


def test_digits_are_scikit_learns_in_file_order():
    from sklearn.datasets import load_digits

    data = load_digits()
    train, test = open_source("digits"), open_source("digits", "test")
    assert (len(train), len(test), train.num_classes) == (1437, 360, 10)
    assert labels(train) + labels(test) == data.target.tolist()
    image = test[0]["image"]
    assert image.dtype == np.uint8 and image.shape == (8, 8)
    assert np.abs(image - data.images[1437] * 255 / 16).max() <= 0.5
    assert max(train[i]["image"].max() for i in range(100)) == 255
