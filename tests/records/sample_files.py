"""Small image files, arrays and names that the tests of sources share."""

import gzip
import io
import struct
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from nat_jax import records


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


def names(source: records.Source) -> list[str]:
    return [source[i]["name"] for i in range(len(source))]


def labels(source: records.Source) -> list[int]:
    return [source[i]["label"] for i in range(len(source))]


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return f"arrays:{path}"


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


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
