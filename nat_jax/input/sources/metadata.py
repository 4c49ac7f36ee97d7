"""What stands in a folder of shards: the metadata of TensorFlow Datasets, a conversion's manifest.

TFDS's own builder of a prepared folder is not used: for some kinds of features it imports
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
from nat_jax.input.sources.examples import NAME_KEYS, Fields
from nat_jax.input.sources.manifest import Manifest, labels_file, read_manifest

_log = logging.getLogger(__name__)

FORMAT = "array_record"
INFO = "dataset_info.json"
FEATURES = "features.json"


@dataclasses.dataclass(frozen=True)
class SplitShards:
    """The shards of one split, and what is known of them before a record is read.

    Attributes:
        paths: those to read, in the order of their records.
        expected: those that have to be there.
        lengths: records in each of `paths`; None where nothing states them.
        fingerprint: see `Source`; None where it has to be computed from the files.
        class_names: see `Source`.
        labels: integers [N], or None where they stand in the records alone.
    """

    paths: tuple[Path, ...]
    expected: tuple[Path, ...]
    lengths: tuple[int, ...] | None = None
    fingerprint: str | None = None
    class_names: tuple[str, ...] | None = None
    labels: np.ndarray | None = None

    def only(self, wanted: set[Path]) -> "SplitShards":
        """Return the shards that a pattern chose, of which less is known."""
        kept = [i for i, path in enumerate(self.paths) if path in wanted]
        if len(kept) == len(self.paths):
            return self
        paths = tuple(self.paths[i] for i in kept)
        lengths = self.lengths and tuple(self.lengths[i] for i in kept)
        return SplitShards(paths, self.expected, lengths, class_names=self.class_names)


def read_metadata(directory: Path, name: str) -> tuple[Fields, dict[str, SplitShards]] | None:
    """Read the metadata in a folder of shards.

    Args:
        directory: the folder.
        name: what messages call the source.

    Returns:
        How records are written, and the splits that have records; None where there is no metadata.

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
    import tensorflow_datasets as tfds

    info = read_info(directory)
    fields, classes = _choose_features(_read_features(directory), directory, name)
    full_name = "/".join(part for part in (info.name, info.config_name, info.version) if part)
    # TFDS can keep other formats in the same folder.
    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=info.name, filetype_suffix=FORMAT
    )
    splits = {}
    for key, found in tfds.core.SplitDict.from_proto(info.splits, template).items():
        if not found.num_examples:
            continue
        try:
            names = found.filename_template.sharded_filepaths(found.num_shards)
        except (KeyError, ValueError, IndexError) as error:
            raise InputError(
                f"{directory / INFO}: expected a pattern of TFDS for the names of files; "
                f"got {found.filename_template.template!r}"
            ) from error
        paths = tuple(map(Path, names))
        identity = [full_name, key, found.shard_lengths, int(found.num_bytes)]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        split = SplitShards(paths, paths, tuple(found.shard_lengths), fingerprint, classes)
        if manifest is not None:
            split = _converted(split, manifest, directory, key)
        splits[key] = split
    return fields, splits


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


def _converted(split: SplitShards, manifest: Manifest, directory: Path, key: str) -> SplitShards:
    """Put in what only the manifest knows: the source's own fingerprint, classes and labels."""
    try:
        plan = manifest["splits"][key]
        labels = np.load(labels_file(directory, key)) if plan["has_labels"] else None
        if labels is not None and labels.shape != (sum(split.lengths or ()),):
            raise ValueError(f"{labels.shape} labels")
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"the conversion in {directory} is damaged ({error!r}); "
            "run its command (--config.task=convert) again, which checks and repairs it"
        ) from error
    names = None if plan["class_names"] is None else tuple(plan["class_names"])
    return dataclasses.replace(
        split, fingerprint=plan["fingerprint"], class_names=names, labels=labels
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
    label, classes = None, None
    if len(labels) == 1:
        count = features[labels[0]].class_label.num_classes
        classes = _class_names(directory, labels[0], count)
        label = None if classes is None else labels[0]
    names = [key for key in NAME_KEYS if kinds.get(key) == "Text"]
    return Fields(images[0], label, names[0] if names else None), classes


def _class_names(directory: Path, label: str, count: int) -> tuple[str, ...] | None:
    """Name the classes, by their numbers where they have no names; None if `count` is unknown."""
    names = read_class_names(directory, label)
    if names is not None and count and len(names) != count:
        file = class_names_file(directory, label)
        _log.warning("%s names %d classes of %d; it is left out", file, len(names), count)
        names = None
    return names or tuple(map(str, range(count))) or None


def class_names_file(directory: Path, label: str) -> Path:
    """Return the path where TFDS keeps the names of a label's classes, one a line."""
    return directory / f"{label.replace('/', '-')}.labels.txt"


def read_class_names(directory: Path, label: str) -> tuple[str, ...] | None:
    """Read the names of a label's classes; None where there are none."""
    file = class_names_file(directory, label)
    if not file.exists():
        return None
    # As TFDS reads it. Other ends of lines than "\n" belong to a name.
    return tuple(n.strip() for n in file.read_text("utf-8").split("\n") if n.strip())
