"""What stands beside shards: the metadata of TensorFlow Datasets, and a conversion's manifest.

TFDS's own builder of a prepared folder is not asked: for some kinds of features it imports
TensorFlow, for others the code that prepared them.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.manifest import Manifest, labels_file, read_manifest
from nat_jax.input.sources.shards import NAME_KEYS, Fields

_log = logging.getLogger(__name__)

FORMAT = "array_record"
INFO = "dataset_info.json"
FEATURES = "features.json"

_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # where a split gives none of its own
_DIGITS = 5  # of a shard's number, or more


@dataclasses.dataclass(frozen=True)
class SplitMetadata:
    """What is known of one split before a record is read.

    Attributes:
        paths: its shards, in the order of their records.
        lengths: records in each.
        fingerprint: see `Source`.
        class_names: see `Source`.
        labels: integers [N], or None where they stand in the records alone.
    """

    paths: tuple[Path, ...]
    lengths: tuple[int, ...]
    fingerprint: str
    class_names: tuple[str, ...] | None
    labels: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What is known of a prepared data set: how its records are written, and its splits."""

    fields: Fields
    splits: dict[str, SplitMetadata]


def read_metadata(directory: Path, name: str) -> Metadata | None:
    """Read the metadata in a folder of shards.

    Args:
        directory: the folder.
        name: what messages call the source.

    Returns:
        None where there is none.

    Raises:
        ValueError: the metadata is damaged, a conversion is unfinished, or the data set is not one
            of images.
    """
    manifest = read_manifest(directory)
    if not (directory / INFO).exists() or not (directory / FEATURES).exists():
        if manifest is not None:
            raise InputError(
                f"{name}: the conversion in {directory} is not finished; "
                "run its command (--config.task=convert) again, which goes on where it stopped"
            )
        return None
    info = read_info(directory)
    fields, classes = _choose_features(_read_features(directory), directory, name)
    splits = {}
    for split in info.splits:
        lengths = tuple(split.shard_lengths)
        if not sum(lengths):
            continue
        full_name = "/".join(part for part in (info.name, info.config_name, info.version) if part)
        identity = [full_name, split.name, list(lengths), split.num_bytes]
        known = SplitMetadata(
            paths=_shard_paths(directory, info.name, split),
            lengths=lengths,
            fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            class_names=classes,
        )
        if manifest is not None:
            known = _converted(known, manifest, split.name, directory)
        splits[split.name] = known
    return Metadata(fields, splits)


def read_info(directory: Path) -> Any:
    """Read dataset_info.json as TFDS's proto DatasetInfo.

    Raises:
        ValueError: it is damaged.
    """
    from tensorflow_datasets.core.proto import dataset_info_pb2

    return _parse(directory / INFO, dataset_info_pb2.DatasetInfo())


def _read_features(directory: Path) -> dict[str, Any]:
    """Read features.json: TFDS's protos Feature by the keys that records have them under."""
    from tensorflow_datasets.core.proto import feature_pb2

    features: dict[str, Any] = {}
    pending = [("", _parse(directory / FEATURES, feature_pb2.Feature()))]
    while pending:
        key, feature = pending.pop()
        if feature.WhichOneof("content") == "features_dict":
            inner = feature.features_dict.features.items()
            pending += [(f"{key}/{k}" if key else k, f) for k, f in inner]
        else:
            features[key] = feature
    return dict(sorted(features.items()))


def _parse(path: Path, message: Any) -> Any:
    from google.protobuf import json_format

    try:
        return json_format.Parse(path.read_text(), message, ignore_unknown_fields=True)
    except (OSError, ValueError, json_format.ParseError) as error:
        raise InputError(
            f"{path} is damaged, or not of a TFDS that writes array_record ({error}): copy or "
            "prepare the data set once more"
        ) from error


def _shard_paths(directory: Path, data_set: str, split: Any) -> tuple[Path, ...]:
    """Name a split's array_record files; TFDS can keep other formats beside them."""
    count = len(split.shard_lengths)
    digits = max(_DIGITS, len(str(count)))
    paths = []
    for i in range(count):
        number, total = f"{i:0{digits}}", f"{count:0{digits}}"
        variables = {
            "DATASET": data_set,
            "SPLIT": split.name,
            "FILEFORMAT": FORMAT,
            "SHARD_INDEX": number,
            "NUM_SHARDS": total,
            "SHARD_X_OF_Y": f"{number}-of-{total}",
        }
        try:
            name = (split.filepath_template or _TEMPLATE).format_map(variables)
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"{directory / INFO}: expected a pattern of TFDS for the names of files; "
                f"got {split.filepath_template!r}"
            ) from error
        paths.append(directory / name)
    return tuple(paths)


def _converted(
    known: SplitMetadata, manifest: Manifest, key: str, directory: Path
) -> SplitMetadata:
    """Put in what only the manifest knows: the source's own fingerprint, classes and labels."""
    try:
        plan = manifest.splits[key]
        labels = np.load(labels_file(directory, key)) if plan.has_labels else None
        if labels is not None and labels.shape != (sum(known.lengths),):
            raise ValueError(f"{labels.shape} labels")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"the conversion in {directory} is damaged ({error!r}); "
            "run its command (--config.task=convert) again, which checks and repairs it"
        ) from error
    return dataclasses.replace(
        known, fingerprint=plan.fingerprint, class_names=plan.class_names, labels=labels
    )


def _choose_features(
    features: dict[str, Any], directory: Path, name: str
) -> tuple[Fields, tuple[str, ...] | None]:
    """Choose the features that are image, label and name of a file, and name the classes."""
    kinds = {key: f.python_class_name.rpartition(".")[2] for key, f in features.items()}
    images = [key for key, kind in kinds.items() if kind == "Image"]
    if "image" in images:
        images = ["image"]
    if len(images) > 1:
        raise InputError(
            f"{name}: several images in each record of this data set ({', '.join(images)}), and "
            "none of them is called 'image'"
        )
    if not images:
        found = ", ".join(f"{key}: {kind}" for key, kind in kinds.items())
        raise InputError(
            f"{name}: no feature 'image' in this data set (it has {', '.join(kinds)}); expected "
            f"one encoded Image; got {found}"
        )
    dtype = features[images[0]].image.dtype
    if dtype not in ("", "uint8"):
        raise InputError(
            f"{name}: feature {images[0]!r} holds images of {dtype}; expected uint8. "
            "Convert them, and read them with --config.data.source=arrays:PATH or folder:PATH"
        )
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    if "label" in labels:
        labels = ["label"]
    label = labels[0] if len(labels) == 1 else None
    names = [key for key in NAME_KEYS if kinds.get(key) == "Text"]
    classes = None if label is None else _class_names(directory, label, features[label])
    fields = Fields(images[0], None if classes is None else label, names[0] if names else None)
    return fields, classes


def _class_names(directory: Path, label: str, feature: Any) -> tuple[str, ...] | None:
    """Name the classes, by their numbers where they have no names; None where nobody counts."""
    count = feature.class_label.num_classes
    names = read_class_names(directory, label)
    if names is not None and count and len(names) != count:
        file = class_names_file(directory, label)
        _log.warning("%s names %d classes of %d; it is left out", file, len(names), count)
        names = None
    return names or tuple(map(str, range(count))) or None


def class_names_file(directory: Path, label: str) -> Path:
    """Give where TFDS keeps the names of a label's classes, one a line."""
    return directory / f"{label.replace('/', '-')}.labels.txt"


def read_class_names(directory: Path, label: str) -> tuple[str, ...] | None:
    """Read the names of a label's classes; None where there are none."""
    file = class_names_file(directory, label)
    if not file.exists():
        return None
    # As TFDS reads it. Other ends of lines than "\n" belong to a name.
    return tuple(n.strip() for n in file.read_text("utf-8").split("\n") if n.strip())
