"""What folders are read as, from their names alone: the table in docs/data.md."""

import pytest

from nat_jax.errors import InputError
from nat_jax.input.sources.folder_layout import read_layout

NFC, NFD = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"


def layout(*folders: str):
    return read_layout([f"{folder}/" if folder else "" for folder in folders], "ROOT")


def classes(*folders: str) -> dict[str, list[str | None]]:
    """Return for each split the class of its folders, None without labels."""
    read = layout(*folders)
    return {
        split: [None if n == -1 else (read.class_names[split] or ())[n] for n in labels if n >= -1]
        for split, labels in read.labels.items()
    }


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "test"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("trainset", "Testset"),
        ("training_data", "test-images"),
        ("TrainImages", "TestImages"),
        ("traindata", "testimages"),
        ("seg_train", "seg_test"),
        ("TRAIN", "valid"),
        ("train", "Validation"),
        ("train", "test1"),
        ("train2017", "val2017"),
        ("ILSVRC2012_img_train", "ILSVRC2012_img_val"),
        ("cats-and-dogs_train", "cats-and-dogs_eval"),
        ("train", "dev"),
        ("train_val", "test"),
    ],
)
@pytest.mark.parametrize("front", ["", "data set/images/"])
def test_splits_by_their_usual_names(train: str, test: str, front: str):
    folders = [f"{front}{split}/{name}" for split in (train, test) for name in ("ant", "bee")]
    assert layout(*folders).splits == (train, test)
    assert classes(*folders) == {"train": ["ant", "bee"], "test": ["ant", "bee"]}


@pytest.mark.parametrize(
    "folders",
    [
        ("car", "plane", "train"),
        ("boat", "train"),
        ("beaker", "bullet_train", "test tube", "van"),
        ("constraint", "contest"),
    ],
)
def test_names_like_those_of_splits_among_classes(folders: tuple[str, ...]):
    assert layout(*folders).splits is None
    assert classes(*folders)["train"] == list(folders)


@pytest.mark.parametrize(
    "folders",
    [
        ("train/a", "training/a"),
        ("train/a", "unlabeled"),
        ("test/a", "val/a"),
        ("train_a/c", "train_b/c", "test/c"),
        ("trainA", "trainB", "testA", "testB"),
        ("seg_train", "det_train", "seg_test", "det_test"),
        ("train_images/c", "test_photos/c"),
        ("Train/c", "train/c", "test/c"),
        ("train/c", "Test/c", "test/c"),
        ("deep/er/train", "deep/er/pred"),
    ],
)
def test_splits_that_are_not_understood_are_named(folders: tuple[str, ...]):
    with pytest.raises(InputError, match=r"look like splits, but .*expected one train/ and one"):
        layout(*folders)


@pytest.mark.parametrize(
    ("folders", "place"),
    [
        (("plants/plants/train/c", "plants/plants/valid/c", "test/test"), "ROOT/plants/plants/"),
        (("x/y/bottle/train/good", "x/y/bottle/test/bad", "x/y/cable/train"), "ROOT/x/y/bottle/"),
    ],
)
def test_splits_below_one_of_several_folders_are_refused(folders: tuple[str, ...], place: str):
    with pytest.raises(InputError, match=rf"{place} has splits of its own"):
        layout(*folders)


@pytest.mark.parametrize(
    ("folders", "test"),
    [
        (("test/a", "train/a", "val/a"), "test"),
        (("dev/a", "train/a", "valid/a"), "valid"),
        (("test", "train/a", "val/a"), "val"),
        (("test/images", "train/a", "val/a"), "val"),
        (("test/unknown", "train/a", "val/a"), "val"),
        (("test", "train/a", "val"), "test"),
        (("seg_pred/seg_pred", "seg_test/a", "seg_train/a"), "seg_test"),
        (("train/a", "test/a", "other/b", "more/c", "than/d"), "test"),
        (("x/train_set/a", "x/test_set/a", "x/other/b", "x/more/c"), "test_set"),
        (("my_train/a", "my_test/a", "other/b", "more/c"), "my_test"),
        (("train_images", "train_masks", "test_images", "test_masks"), "test_images"),
        (("train", "test", "test1", "train_test"), "test"),
    ],
)
def test_which_of_several_splits_is_for_testing(folders: tuple[str, ...], test: str):
    read = layout(*folders)
    assert read.splits is not None and read.splits[1] == test
    said = f"{read.splits[0]}/ is the training split, {test}/ the test split"
    if test == "val":
        said += ", as test/ has no class of train/"
    assert read.remarks == ([] if read.splits == ("train", "test") else [said])


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("seg_train/seg_train/a", "seg_train/seg_train/b", "seg_test/seg_test/a"), ["a"]),
        (("train/images/a", "train/images/b", "test/images/b"), ["b"]),
        (("train/a", "train/b", "test/images"), [None]),
        (("train/a", "train/test", "test/test"), ["test"]),
        (("train/7", "train/8", "test/8"), ["8"]),
        (("train/a/images", "train/b/images", "val/b/images"), ["b"]),
        (("train/a", "train/b", "test/new"), ["new"]),
        (("train/a", "train/images", "test/Images"), ["images"]),
    ],
)
def test_single_folders_below_a_split(folders: tuple[str, ...], expected: list[str | None]):
    assert classes(*folders)["test"] == expected


def test_spellings_of_one_class():
    read = classes(f"train/{NFC}", "train/Dog", f"test/{NFD}", "test/DOG")
    assert read == {"train": [NFC, "Dog"], "test": [NFC, "Dog"]}
    assert classes(NFD, NFC, "b")["train"] == [NFD, NFD, "b"]
    assert classes("train/e", f"test/{NFC}")["test"] == [NFC]


def test_names_that_differ_in_case_within_a_split_are_classes():
    read = layout("train/A", "train/a", "train/b", "test/a", "test/B")
    assert read.class_names["test"] == ("A", "a", "b")
    assert read.labels["test"].tolist()[3:] == [1, 2]
    assert read.remarks[0] == "classes whose names differ in case only: A, a"
