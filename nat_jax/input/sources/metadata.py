"""The metadata next to shards: that of TensorFlow Datasets, and the manifest of a conversion.

TFDS's own builder of a prepared folder is not used: for some kinds of features it imports
TensorFlow, for others the code that prepared them.

The manifest (conversion.json) is the state of a conversion:

* format: version of the file;
* name: what TFDS calls the data set; the shards' names begin with it;
* shard_mb: wanted size of a shard in MiB;
* splits: for each split fingerprint and class_names of the source, and lengths (records in each
  shard); its labels are in a file of their own;
* shards: for each finished file its sha256, num_bytes (of its records together), and unreadable
  (names of records that are empty because their files could not be read).
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.sources.examples import Fields
from nat_jax.input.sources.source import SPLITS

_log = logging.getLogger(__name__)

INFO = "dataset_info.json"
FEATURES = "features.json"
MANIFEST = "conversion.json"
MANIFEST_FORMAT = 1
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # TFDS's names of shards
_NAME_KEYS = ("file_name", "filename", "image/filename")
_PLAN = {"fingerprint", "class_names", "lengths"}
_SHARD = {"sha256", "num_bytes", "unreadable"}

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SplitShards:
    """The shards of one split, and what is known of them before a record is read.

    Attributes:
        paths: those to read, in the order of their records.
        lengths: records in each of `paths`; None where nothing states them.
        fingerprint: see `Source`; None where it has to be computed from the files.
        class_names: see `Source`.
        labels: integers [N], or None where they are in the records alone.
    """

    paths: tuple[Path, ...]
    lengths: tuple[int, ...] | None = None
    fingerprint: str | None = None
    class_names: tuple[str, ...] | None = None
    labels: np.ndarray | None = None


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
    info = read_json(directory / INFO)
    try:
        features = _flat(read_json(directory / FEATURES))
        fields, classes = _choose_features(features, directory, name)
        splits = {
            stated["name"]: _split(directory, info, stated, classes, manifest)
            for stated in info.get("splits", ())
        }
    except InputError:
        raise
    except (OSError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _damaged(directory, error) from error
    return fields, {name: split for name, split in splits.items() if sum(split.lengths or ())}


def read_json(path: Path) -> Json:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: it is damaged.
    """
    try:
        value: Json = json.loads(path.read_text("utf-8"))
        value.keys()
    except (OSError, AttributeError, ValueError) as error:
        raise _damaged(path, error) from error
    return value


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is damaged, or not of a TFDS that writes array_record "
        f"({type(error).__name__}: {error}): copy or prepare the data set once more; if it was "
        "converted, run that command (--config.task=convert) again"
    )


def shard_names(name: str, split: str, count: int, template: str = TEMPLATE) -> list[str]:
    """Name the files of a split in order, as TFDS does."""
    import tensorflow_datasets as tfds

    files = tfds.core.ShardedFileTemplate("", template, name, split, "array_record")
    return [files.relative_filepath(shard_index=i, num_shards=count) for i in range(count)]


def _split(
    directory: Path,
    info: Json,
    stated: Json,
    class_names: tuple[str, ...] | None,
    manifest: Json | None,
) -> SplitShards:
    name, lengths = stated["name"], tuple(map(int, stated.get("shardLengths", ())))
    template = stated.get("filepathTemplate") or TEMPLATE
    names = shard_names(info["name"], name, len(lengths), template)
    paths = tuple(directory / file for file in names)
    if manifest is None:
        parts = (info["name"], info.get("configName"), info.get("version"))
        full_name = "/".join(part for part in parts if part)
        identity = [full_name, name, lengths, int(stated.get("numBytes", 0))]
        fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return SplitShards(paths, lengths, fingerprint, class_names)
    # Only the manifest has the source's own fingerprint and classes.
    plan, labels = manifest["splits"][name], np.load(labels_file(directory, name))
    if labels.shape != (sum(lengths),):
        raise ValueError(f"{labels.shape} labels of {name}")
    classes = None if plan["class_names"] is None else tuple(plan["class_names"])
    return SplitShards(paths, lengths, plan["fingerprint"], classes, labels)


def _flat(feature: Json, key: str = "") -> dict[str, Json]:
    """Return features by the keys that records have them under."""
    if "featuresDict" not in feature:
        return {key: feature}
    inner = sorted(feature["featuresDict"].get("features", {}).items())
    return {k: f for n, v in inner for k, f in _flat(v, f"{key}/{n}" if key else n).items()}


def _choose_features(
    features: dict[str, Json], directory: Path, name: str
) -> tuple[Fields, tuple[str, ...] | None]:
    """Choose the features that are image, label and name of a file, and name the classes."""
    kinds = {key: f.get("pythonClassName", "").rpartition(".")[2] for key, f in features.items()}
    images, labels = (
        [preferred] if kinds.get(preferred) == kind else [k for k in kinds if kinds[k] == kind]
        for preferred, kind in (("image", "Image"), ("label", "ClassLabel"))
    )
    dtypes = {key: features[key].get("image", {}).get("dtype") or "uint8" for key in images}
    if list(dtypes.values()) != ["uint8"]:
        found = ", ".join(f"{k}: {kind} {dtypes.get(k, '')}".rstrip() for k, kind in kinds.items())
        raise InputError(
            f"{name}: expected one Image feature of uint8, or several of which one is called "
            f"'image'; got {found}. Other images are read from files (folder:PATH, arrays:PATH)"
        )
    label, classes = None, None
    if len(labels) == 1:
        count = int(features[labels[0]].get("classLabel", {}).get("numClasses", 0))
        classes = tuple(map(str, range(count))) or None
        file = directory / f"{labels[0].replace('/', '-')}.labels.txt"
        if file.exists():
            # As TFDS reads it. Other ends of lines than "\n" belong to a name.
            lines = map(str.strip, file.read_text("utf-8").split("\n"))
            names = tuple(line for line in lines if line)
            if count and len(names) != count:
                _log.warning("%s names %d classes of %d; it is left out", file, len(names), count)
            else:
                classes = names or None
        label = None if classes is None else labels[0]
    texts = [key for key in _NAME_KEYS if kinds.get(key) == "Text"]
    return Fields(images[0], label, texts[0] if texts else None), classes


def read_manifest(directory: Path) -> Json | None:
    """Read the state of a conversion; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = directory / MANIFEST
    if not path.exists():
        return None
    try:
        saved: Json = json.loads(path.read_bytes())
        entries = [(plan, _PLAN) for plan in saved["splits"].values()]
        entries += [(shard, _SHARD) for shard in saved["shards"].values()]
        entries += [(saved, {"name", "shard_mb"}), (saved["splits"], set(SPLITS))]
        if saved["format"] != MANIFEST_FORMAT or any(keys - set(e) for e, keys in entries):
            raise ValueError("entries are missing")
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): restore it, or delete {directory} and convert once more"
        ) from error
    return saved


def labels_file(directory: Path, split: str) -> Path:
    """Return the path of a converted split's labels."""
    return directory / f"labels-{split}.npy"
