"""The images of ``input_pipeline.py``, made from archives of real photographs in a folder.

    voc2007_subset.zip  700 JPEG files of about 500 x 375 pixels, ImageNet's usual size
    cifar10.zip         JPEG files of 32 x 32 pixels

The first becomes a tree of class folders with train/ and val/, the same as a .zip, and array_record
files, converted by nat_jax's own command. The second becomes a folder of very many small files.
What exists is used again.
"""

import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import measure

_CLASSES = 20
_MANY_CLASSES = 1000
_VAL = 26  # one file in so many, as in ImageNet
_SETTLE = 3  # seconds: what has just changed is not kept in an index


def photographs(data: Path, scratch: Path, *, copies: int) -> tuple[Path, dict[str, str]]:
    """Lay out the photographs as class folders, a .zip and array_record files.

    Args:
        data: the folder of the archives.
        scratch: where to put them.
        copies: of each photograph, so that they do not all fit into a processor's cache.

    Returns:
        The folder, with train/ and val/; and what nat_jax opens, by kind.
    """
    folder = scratch / f"photos500x{copies}"
    archive, shards = folder.with_suffix(".zip"), scratch / f"{folder.name}_array_record"

    def extract(half: Path) -> None:
        with zipfile.ZipFile(data / "voc2007_subset.zip") as opened:
            names = sorted(name for name in opened.namelist() if name.endswith(".jpg"))
            for number, name in enumerate(names):
                split = "val" if number // _CLASSES % 10 == 0 else "train"
                place = half / split / f"class{number % _CLASSES:02}"
                place.mkdir(parents=True, exist_ok=True)
                for copy in range(copies):
                    (place / f"{Path(name).stem}_{copy}.jpg").write_bytes(opened.read(name))

    def pack(half: Path) -> None:
        with zipfile.ZipFile(half, "w", zipfile.ZIP_STORED) as opened:
            for image in sorted(folder.glob("*/*/*")):
                opened.write(image, image.relative_to(folder))

    def convert(half: Path) -> None:
        subprocess.run(
            [
                *(sys.executable, "-m", "nat_jax.main"),
                f"--config={measure.ROOT / 'configs' / 'alexnet.py'}",
                "--config.task=convert",
                f"--workdir={scratch / 'convert'}",
                f"--config.data.source=folder:{folder}",
                f"--config.convert.to={half}",
            ],
            env=measure.child_environment(JAX_PLATFORMS="cpu"),
            check=True,
        )

    _once(folder, extract)
    _once(archive, pack)
    _once(shards, convert)
    kinds = {"folder": f"folder:{folder}", "zip": f"folder:{archive}"}
    return folder, kinds | {"arrayrecord": f"arrayrecord:{shards}"}


def _once(path: Path, make: Callable[[Path], None]) -> None:
    """Make a file or folder at a temporary place and move it where it belongs, if it is missing."""
    if not path.exists():
        half = path.with_name(f"{path.name}.part")
        shutil.rmtree(half, ignore_errors=True)
        half.parent.mkdir(parents=True, exist_ok=True)
        make(half)
        half.rename(path)


def many_files(archive: Path, scratch: Path, count: int, seed: int) -> tuple[Path, dict[str, int]]:
    """Write small JPEG files into 1,000 class folders with names as long as ImageNet's.

    Returns:
        The folder; and the number of files, of different ones, and of bytes.
    """
    folder = scratch / f"many_files_{count}"
    notes = folder.with_suffix(".json")

    def write(half: Path) -> None:
        draw = random.Random(seed)
        digests, size = set(), 0
        for number, image in zip(range(count), _small_images(archive, draw), strict=False):
            label = f"n{1_440_764 + number % _MANY_CLASSES:08}"
            split = "val" if number // _MANY_CLASSES % _VAL == 0 else "train"
            path = half / split / label / f"{label}_{10_000 + number // _MANY_CLASSES}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
            digests.add(hashlib.sha1(image).digest())
            size += len(image)
        notes.write_text(json.dumps({"files": count, "different": len(digests), "bytes": size}))
        time.sleep(_SETTLE)

    _once(folder, write)
    return folder, json.loads(notes.read_text())


def _small_images(archive: Path, draw: random.Random) -> Iterator[bytes]:
    """Yield JPEG files without end: those of the archive, then mirrored and cropped ones."""
    from PIL import Image

    with zipfile.ZipFile(archive) as opened:
        files = [opened.read(name) for name in opened.namelist() if name.endswith(".jpg")]
    draw.shuffle(files)
    yield from files
    while True:
        for data in files:
            image: Image.Image = Image.open(io.BytesIO(data))
            if draw.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left, top = draw.randrange(5), draw.randrange(5)
            quality, made = draw.randrange(70, 95), io.BytesIO()
            image.crop((left, top, left + 28, top + 28)).save(made, "JPEG", quality=quality)
            yield made.getvalue()
