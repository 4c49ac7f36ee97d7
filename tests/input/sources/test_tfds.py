import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from project import ROOT, python
from sample_files import example, examples, jpeg, labels, write_data_set

from nat_jax.input.sources import open_source


def test_tfds_gives_encoded_records_and_validation_as_test(prepared: Path):
    import tensorflow_datasets as tfds

    train = open_source("tfds:tiny_shapes:1.2.0")
    test = open_source("tfds:tiny_shapes", "test")
    assert (len(train), len(test), train.class_names) == (9, 4, ("round", "square"))
    for source in (train, test):
        for i in range(len(source)):
            record = source[i]
            pixels = np.asarray(Image.open(io.BytesIO(record["image"])))
            assert pixels.shape == (6, 7, 3) and pixels[0, 0, 0] % 2 == record["label"]
    assert test[1]["name"] == "tfds:tiny_shapes validation[1]"
    builder = tfds.builder_from_directory(prepared / "tiny_shapes/1.2.0")
    decoders = {"image": tfds.decode.SkipDecoding()}
    theirs = builder.as_data_source("train", decoders=decoders)
    assert [train[i]["image"] for i in range(9)] == [record["image"] for record in theirs]
    assert labels(train) == [record["label"] for record in theirs]


def prepared_as(root: Path, monkeypatch, splits, features=None, **identity) -> None:
    name, config = identity.get("name", "made"), identity.get("config", "")
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    folder = root / name / config / identity.get("version", "1.2.3")
    write_data_set(folder, splits, features, **identity)


def feature(kind: str, **options):
    import tensorflow_datasets as tfds

    return getattr(tfds.features, kind)(**options)


def test_tfds_image_and_label_may_have_other_names(tmp_path: Path, monkeypatch):
    features = {
        "photo": feature(
            "FeaturesDict", feature_dict={"grey": feature("Image", shape=(28, 28, 1))}
        ),
        "kind": feature("ClassLabel", num_classes=3),
        "file_name": feature("Text"),
        "height": feature("Scalar", dtype=np.int64),
    }
    file = io.BytesIO()
    Image.fromarray(np.arange(784, dtype=np.uint8).reshape(28, 28)).save(file, "PNG")
    record = example(photo__grey=file.getvalue(), kind=2, file_name=b"a/\xff.png", height=28)
    prepared_as(tmp_path, monkeypatch, {"train": [[record]]}, features)
    source = open_source("tfds:made")
    assert source.class_names == ("0", "1", "2")
    name = b"a/\xff.png".decode(errors="surrogateescape")
    image = file.getvalue()
    assert source[0] == {"index": 0, "name": name, "label": 2, "image": image}
    assert np.asarray(Image.open(io.BytesIO(source[0]["image"]))).shape == (28, 28)


@pytest.mark.parametrize(
    ("kinds", "got"),
    [
        ({"text": ("Text", {})}, "text: Text"),
        ({"left": ("Image", {}), "right": ("Image", {})}, "left: Image uint8, right: Image uint8"),
        ({"image": ("Image", {"dtype": np.uint16, "encoding_format": "png"})}, "Image uint16"),
        ({"image": ("Tensor", {"shape": (4, 4, 3), "dtype": np.uint8})}, "image: Tensor"),
    ],
)
def test_tfds_that_has_no_images_says_what_it_has(tmp_path: Path, monkeypatch, kinds, got: str):
    features = {key: feature(kind, **options) for key, (kind, options) in kinds.items()}
    prepared_as(tmp_path, monkeypatch, {"train": [[example(text=b"x")]]}, features)
    with pytest.raises(ValueError, match=f"expected one Image feature of uint8, .*; got .*{got}"):
        open_source("tfds:made")


def test_tfds_features_of_kinds_that_nobody_knows_are_passed_over(tmp_path: Path, monkeypatch):
    features = {"image": feature("Image"), "other": feature("Text"), "label": feature("Text")}
    record = example(image=jpeg(0), other=b"x", label=b"y")
    prepared_as(tmp_path, monkeypatch, {"train": [[record]]}, features)
    path = tmp_path / "made/1.2.3/features.json"
    path.write_text(path.read_text().replace("core.features.text_feature.Text", "no.such.Kind"))
    source = open_source("tfds:made")
    assert source[0]["image"] == jpeg(0) and source[0]["label"] == -1
    assert source.class_names is None and source.num_classes is None


def test_tfds_names_of_classes_that_are_too_few_give_way_to_numbers(
    tmp_path: Path, monkeypatch, caplog
):
    prepared_as(tmp_path, monkeypatch, {"train": [examples(2)]})
    (tmp_path / "made/1.2.3/label.labels.txt").write_text("round\n\n")
    assert open_source("tfds:made").class_names == ("0", "1")
    assert "label.labels.txt names 1 classes of 2; it is left out" in caplog.text


def test_tfds_without_a_split_says_which_there_are(tmp_path: Path, monkeypatch):
    prepared_as(tmp_path, monkeypatch, {"train": [examples(2)], "extra": [examples(1)]})
    assert len(open_source("tfds:made")) == 2
    with pytest.raises(ValueError, match="tfds:made: no test or validation split; prepared: train"):
        open_source("tfds:made", "test")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("features.json", None, "is prepared without features.json .*Prepare it once as array_rec"),
        ("features.json", "{", "features.json is damaged, or not of a TFDS that"),
        ("dataset_info.json", '{"fileFormat": "array_record", "splits": [{}]}', "is damaged, or"),
        ("dataset_info.json", "{", "dataset_info.json is damaged"),
        ("dataset_info.json", "[1]", "dataset_info.json is damaged"),
        ("made-train.array_record-00001-of-00002", None, "1 of 2 shards are missing in"),
        ("made-train.array_record-00001-of-00002", "x" * 99, "is damaged, cut off or not an arr"),
    ],
)
def test_tfds_that_is_damaged_says_so_when_it_is_opened(
    tmp_path: Path, monkeypatch, file: str, content: str | None, message: str
):
    prepared_as(tmp_path, monkeypatch, {"train": [examples(2), examples(2, 2)]})
    path = tmp_path / "made/1.2.3" / file
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source("tfds:made")


def test_tfds_prepared_in_two_formats_is_read(tmp_path: Path, monkeypatch):
    prepared_as(tmp_path, monkeypatch, {"train": [examples(2)]})
    path = tmp_path / "made/1.2.3/dataset_info.json"
    info = json.loads(path.read_text())
    both = {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    path.write_text(json.dumps(info | both))
    assert len(open_source("tfds:made")) == 2


@pytest.mark.parametrize("then", ["", "import tensorflow"])
def test_tfds_never_imports_tensorflow(prepared: Path, tmp_path: Path, then: str):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("import os; os._exit(7)")
    code = (
        "from nat_jax.input import sources\n"
        "assert len(sources.open_source('tfds:tiny_shapes')[8]['image'])\n" + then
    )
    python("-c", code, code=7 if then else 0, PYTHONPATH=f"{tmp_path}:{ROOT}")


def refused(spec: str) -> str:
    """Open what cannot be opened; give the message, which must come without trying to download."""
    start = time.monotonic()
    with pytest.raises(ValueError) as info:
        open_source(spec)
    assert time.monotonic() - start < 30, "took as long as a download that is tried again and again"
    assert "tensorflow" not in sys.modules
    return str(info.value)


def fake(data: Path, path: str, content: str) -> None:
    (data / path).mkdir(parents=True)
    (data / path / "dataset_info.json").write_text(content)


def test_tfds_takes_the_newest_version_and_asks_for_the_configuration(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fake(tmp_path, "a/2.0.0", '{"fileFormat": "older"}')
    fake(tmp_path, "a/10.0.0", '{"fileFormat": "newer"}')
    assert "10.0.0 is prepared as newer" in refused("tfds:a")
    fake(tmp_path, "b/left/1.0.0", "{}")
    fake(tmp_path, "b/right/1.0.0", "{}")
    assert "name one: tfds:b/left, tfds:b/right" in refused("tfds:b")
    assert "left/1.0.0 is prepared as tfrecord" in refused("tfds:b/left")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mnist", "mnist is not prepared in "),
        ("mnits", r"TFDS does not know that name \(known: mnist"),
        ("a:9.9.9", "a is not prepared in .* in version 9.9.9; prepared: 1.2.0"),
        ("old", "old/1.0.0 is prepared as tfrecord"),
    ],
)
def test_tfds_that_is_not_prepared_says_how(tmp_path: Path, monkeypatch, spec: str, reason: str):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    fake(tmp_path, "a/1.2.0", '{"fileFormat": "array_record"}')
    fake(tmp_path, "old/1.0.0", '{"fileFormat": "tfrecord"}')
    message, name = refused(f"tfds:{spec}"), spec.partition(":")[0]
    assert re.search(reason, message)
    command = f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')"
    assert f"{command}.download_and_prepare()" in message
