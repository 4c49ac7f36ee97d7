"""The state of a conversion, kept in its folder as conversion.json.

* format: version of the file;
* name: what TFDS calls the data set; the shards' names begin with it;
* shard_mb: wanted size of a shard in MiB;
* splits: for each split fingerprint and class_names of the source, has_labels (the source knows its
  labels without reading the records), record_bytes (mean size, from a sample), and lengths (records
  in each shard);
* shards: for each finished file its sha256, num_bytes (of its records together), and unreadable
  (names of records that are empty because their files could not be read).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.input.sources.source import SPLITS

MANIFEST = "conversion.json"
SUMS = "SHA256SUMS"  # of all other files, as sha256sum -c reads it
FORMAT = 1
_KEYS = {"format", "name", "shard_mb", "splits", "shards"}
_PLAN = {"fingerprint", "class_names", "has_labels", "record_bytes", "lengths"}
_SHARD = {"sha256", "num_bytes", "unreadable"}

Manifest = dict[str, Any]


def shard_names(manifest: Manifest, split: str) -> list[str]:
    """Name the files of a split in order."""
    count = len(manifest["splits"][split]["lengths"])
    return [f"{manifest['name']}-{split}.array_record-{i:05}-of-{count:05}" for i in range(count)]


def read_manifest(directory: Path) -> Manifest | None:
    """Read what the task `convert` noted in a folder; None where there is nothing.

    Raises:
        ValueError: it is damaged.
    """
    path, sums = directory / MANIFEST, directory / SUMS
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        saved: Manifest = json.loads(data)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        lines = sums.read_text().splitlines() if sums.exists() else []
        right = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}"
        if any(line.endswith(MANIFEST) and line != right for line in lines):
            raise ValueError(f"its checksum is not that in {SUMS}; one of the two is damaged")
        if set(saved["splits"]) != set(SPLITS):
            raise ValueError(f"its splits are not {', '.join(SPLITS)}")
        entries = [(saved, _KEYS), *((plan, _PLAN) for plan in saved["splits"].values())]
        entries += [(shard, _SHARD) for shard in saved["shards"].values()]
        if any(set(entry) != keys for entry, keys in entries):
            raise ValueError("entries are missing")
        return saved
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): restore it, or delete {directory} and convert once more"
        ) from error


def labels_file(directory: Path, split: str) -> Path:
    """Return the place of a converted split's labels."""
    return directory / f"labels-{split}.npy"
