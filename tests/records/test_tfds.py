import io
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_files import labels

from nat_jax import records


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
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
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
