"""Data sets prepared by TensorFlow Datasets as array_record files, read without TensorFlow."""

import difflib
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.records.source import Record, UnreadableRecord

_FORMAT = "array_record"


class TfdsSource:
    """Encoded images of one split of a prepared data set.

    Args:
        name: the specification, "tfds:NAME[:VERSION]".
        split: "train" or "test".
        directory: the prepared version's folder.
    """

    def __init__(self, name: str, split: str, directory: Path):
        self.name = name
        self.split = split
        self._directory = directory
        self._open()
        feature = dict(self._builder.info.features.items()).get("label")
        self.num_classes: int | None = getattr(feature, "num_classes", None)
        self.class_names: tuple[str, ...] | None = None
        if self.num_classes is not None:
            names = getattr(feature, "names", None)
            self.class_names = tuple(names or (str(c) for c in range(self.num_classes)))
        self.labels: np.ndarray | None = None

    def _open(self) -> None:
        import tensorflow_datasets as tfds

        self._builder = tfds.builder_from_directory(self._directory)
        self._key = _split_key(self._builder, self.split, self.name)
        self._data = _data_source(self._builder, self._key)

    @functools.cached_property
    def fingerprint(self) -> str:
        info = self._builder.info.splits[self._key]
        identity = [self._builder.info.full_name, self._key, info.shard_lengths, info.num_bytes]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        name = f"{self.name} {self._key}[{index}]"
        try:
            example = self._data[index]
        except Exception as error:
            # array_record reports damaged files by exceptions of no common type.
            raise UnreadableRecord(name, -1, str(error)) from error
        label = -1 if self.num_classes is None else int(example["label"])
        return {"index": index, "name": name, "label": label, "image": example["image"]}

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_builder", "_data")
        return {k: v for k, v in self.__dict__.items() if k not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def open_tfds(argument: str, split: str) -> TfdsSource:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, already prepared as array_record.

    Looks in the folder that the environment variable TFDS_DATA_DIR names, or in
    ~/tensorflow_datasets. Never downloads and never imports TensorFlow.

    Raises:
        ValueError: the data set is unknown, not prepared, prepared as another format, or has no
            images; the message holds the command that prepares it.
    """
    name, _, version = argument.partition(":")
    data_dir = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    prepared = [
        path.parent
        for pattern in ("*/dataset_info.json", "*/*/dataset_info.json")
        for path in (data_dir / name).glob(pattern)
    ]
    if not prepared:
        raise ValueError(_not_prepared(name, data_dir))
    parents = sorted({p.parent for p in prepared})
    if len(parents) > 1:
        configs = ", ".join(f"tfds:{p.relative_to(data_dir).as_posix()}" for p in parents)
        raise ValueError(f"tfds: {name} is prepared in several configurations; name one: {configs}")
    if version:
        matching = [p for p in prepared if p.name == version]
        if not matching:
            found = ", ".join(sorted(p.name for p in prepared))
            raise ValueError(
                f"tfds: {name} is not prepared in version {version}; prepared: {found}"
            )
        prepared = matching
    directory = max(prepared, key=_version_number)
    file_format = json.loads((directory / "dataset_info.json").read_text()).get("fileFormat")
    if file_format != _FORMAT:
        raise ValueError(
            f"tfds: {directory} is prepared as {file_format or 'tfrecord'}, which only TensorFlow "
            f"reads; prepare it once more as {_FORMAT}: {_command(name, data_dir)}"
        )
    return TfdsSource(f"tfds:{argument}", split, directory)


def _version_number(directory: Path) -> tuple[int, ...]:
    return tuple(int(n) if n.isdigit() else -1 for n in directory.name.split("."))


def _not_prepared(name: str, data_dir: Path) -> str:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = name.partition("/")[0]
    if base not in known:
        close = ", ".join(difflib.get_close_matches(base, known)) or "none with a similar name"
        return (
            f"tfds: no data set {name!r} in {data_dir}, and TFDS does not know that name "
            f"(known: {close}); set TFDS_DATA_DIR if it is prepared in another folder"
        )
    return (
        f"tfds: {name} is not prepared in {data_dir} (set TFDS_DATA_DIR if it is elsewhere); "
        f"nothing is downloaded unasked. Prepare it once: {_command(name, data_dir)}. Or read the "
        "images from a folder or a zip, --config.data.source=folder:PATH; or try the embedded "
        "demo, --config=configs/digits.py"
    )


def _command(name: str, data_dir: Path) -> str:
    by_hand = (
        f"put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {data_dir}/downloads/manual,"
        " then "
    )
    return (by_hand if name.startswith("imagenet2012") else "") + (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='{_FORMAT}')"
        '.download_and_prepare()" (some data sets need TensorFlow installed for this step, never '
        "for training)"
    )


def _split_key(builder: Any, split: str, name: str) -> str:
    """Choose TFDS's name of the split: a test split without labels gives way to validation."""
    splits = builder.info.splits
    if "image" not in builder.info.features:
        found = ", ".join(builder.info.features)
        raise ValueError(f"{name}: no feature 'image' in this data set (it has {found})")
    candidates = ("train",) if split == "train" else ("test", "validation")
    present = [key for key in candidates if key in splits and splits[key].num_examples]
    if not present:
        raise ValueError(
            f"{name}: no {' or '.join(candidates)} split; prepared: {', '.join(splits) or 'none'}"
        )
    if present == ["test", "validation"] and "label" in builder.info.features:
        # imagenet2012's test images have the label -1: not known.
        labelled = _data_source(builder, "test")[0]["label"] >= 0
        return "test" if labelled else "validation"
    return present[0]


def _data_source(builder: Any, key: str) -> Any:
    import tensorflow_datasets as tfds

    return builder.as_data_source(split=key, decoders={"image": tfds.decode.SkipDecoding()})
