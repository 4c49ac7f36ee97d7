"""Images and files for tests of decoding and cropping."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nat_jax.input import decode
from nat_jax.input.sources import Record

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
    """Return an image that JPEG changes little, unlike its rotations and mirror images."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 128 + 60], -1).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def photographs(shared_data: Path, wanted: int) -> list[bytes]:
    """Return JPEG files of some 500 x 375 pixels."""
    with zipfile.ZipFile(shared_data / "voc2007_subset.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        return [archive.read(names[i * len(names) // wanted]) for i in range(wanted)]


class Album:
    """Made records of several sizes, shapes, colour modes and orientations; number 11 is broken.

    In a module of its own, as data workers import it.
    """

    name = "album"
    split = "train"
    class_names = ("a", "b", "c")
    num_classes = 3
    labels = None
    fingerprint = "0" * 64

    def __init__(self, kind: str, count: int):
        self.kind, self.count = kind, count

    def __len__(self) -> int:
        return self.count

    def record_name(self, index: int) -> str:
        return f"{index}.{self.kind}"

    def __getitem__(self, index: int) -> Record:
        return Record(
            index=index,
            name=self.record_name(index),
            label=index % 3,
            image=b"broken" if index == 11 else self._image(index),
        )

    def _image(self, index: int) -> bytes | np.ndarray:
        height, width = ((16, 16), (20, 27), (41, 32), (150, 171), (90, 60))[index % 5]
        image = (
            smooth(height, width) // 2
            + noise(-(-height // 4), -(-width // 4), index)
            .repeat(4, 0)
            .repeat(4, 1)[:height, :width]
            // 2
        )
        if self.kind == "png":
            if index % 7 == 3:
                return image
            mode = ("RGB", "L", "RGBA", "P")[index // 5 % 4]
            return encode(Image.fromarray(image).convert(mode), "PNG")
        mode = ("RGB", "RGB", "L", "CMYK")[index // 5 % 4]
        exif = Image.Exif()
        if index % 4:
            exif[0x0112] = index % 9
        return encode(Image.fromarray(image).convert(mode), "JPEG", exif=exif, quality=90)
