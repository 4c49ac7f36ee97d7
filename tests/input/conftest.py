"""Fixtures that the tests of input share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pictures import READERS, read_jpeg_with
from sample_files import SPLIT_TREE, write_tree


@pytest.fixture(autouse=True)
def no_real_cache(tmp_path: Path, monkeypatch) -> None:
    """Keep indexes of large folders out of the cache of whoever runs the tests."""
    monkeypatch.setenv("NAT_JAX_CACHE", str(tmp_path / ".cache"))


@pytest.fixture(params=READERS)
def jpeg_reader(request, monkeypatch) -> str:
    read_jpeg_with(request.param, monkeypatch)
    return request.param


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree", SPLIT_TREE)


BUILDER = """
import io
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
        return {"train": self._make(9), "validation": self._make(4)}

    def _make(self, count):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(np.full((6, 7, 3), i, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 2}

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
def prepared_dir(tmp_path_factory) -> Path:
    code, data = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("tfds")
    (code / "tiny_shapes").mkdir()
    (code / "tiny_shapes/__init__.py").touch()
    (code / "tiny_shapes/tiny_shapes_dataset_builder.py").write_text(BUILDER)
    command = [sys.executable, "-c", PREPARE, str(data)]
    environment = {**os.environ, "PYTHONPATH": str(code)}
    subprocess.run(command, check=True, env=environment, cwd=code, timeout=120)
    return data


@pytest.fixture
def prepared(prepared_dir: Path, monkeypatch) -> Path:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared_dir))
    return prepared_dir
