"""Small image files, arrays and names that the tests of sources share."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nat_jax.input.sources import Source


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


def names(source: Source) -> list[str]:
    return [source[i]["name"] for i in range(len(source))]


def labels(source: Source) -> list[int]:
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


def write_shard(
    path: Path, contents: Sequence[bytes], options: str = "group_size:1,uncompressed"
) -> Path:
    from array_record.python.array_record_module import ArrayRecordWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(path), options)
    for content in contents:
        writer.write(content)
    writer.close()
    return path


def example(**features: Any) -> bytes:
    """Serialize a tf.train.Example; "__" in a key is "/"."""
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    for key, value in features.items():
        feature = message.features.feature[key.replace("__", "/")]
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return message.SerializeToString(deterministic=True)  # test names contain it


def write_data_set(
    directory: Path,
    splits: Mapping[str, Sequence[Sequence[bytes]]],
    features: Mapping[str, Any] | None = None,
    *,
    name: str = "made",
    config: str = "",
    version: str = "1.2.3",
) -> Path:
    """Write shards and the metadata that TFDS keeps beside them.

    Args:
        directory: where to.
        splits: the serialized records of each shard of each split.
        features: by default an image and a label of two classes.
        name: of the data set.
        config: of the data set; "" for none.
        version: of the data set.
    """
    import tensorflow_datasets as tfds

    kinds = features or {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["round", "square"]),
    }
    directory.mkdir(parents=True)
    tfds.features.FeaturesDict(kinds).save_config(str(directory))
    infos = []
    for split, shards in splits.items():
        for i, contents in enumerate(shards):
            shard = f"{name}-{split}.array_record-{i:05}-of-{len(shards):05}"
            write_shard(directory / shard, contents)
        infos.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(1000 * len(shards) + len(split)),
                "shardLengths": [str(len(contents)) for contents in shards],
            }
        )
    info = {"name": name, "version": version, "fileFormat": "array_record", "splits": infos}
    if config:
        info["configName"] = config
    (directory / "dataset_info.json").write_text(json.dumps(info))
    return directory


def examples(count: int, start: int = 0, **others: Any) -> list[bytes]:
    """Serialize records of an image and a label each; images are of different sizes."""
    return [
        example(image=jpeg(i, width=8 + i), label=i % 2, **others)
        for i in range(start, start + count)
    ]


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
