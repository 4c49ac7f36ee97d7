"""Images and files for tests of decoding and cutting."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nat_jax.input import decode

READERS = ("Pillow", "simplejpeg")


def read_jpeg_with(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decode.simplejpeg is None:
        if reader == "simplejpeg":
            pytest.skip("simplejpeg is not installed")
    elif reader == "Pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """Give an image that JPEG changes little, different from all its turned and mirrored forms."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 128 + 60], -1).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def photographs(shared_data: Path, wanted: int) -> list[bytes]:
    """Give JPEG files of some 500 x 375 pixels."""
    with zipfile.ZipFile(shared_data / "voc2007_subset.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return [archive.read(names[i * len(names) // wanted]) for i in range(wanted)]
