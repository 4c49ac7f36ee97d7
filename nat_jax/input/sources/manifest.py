"""The state of a conversion, kept in its folder: the plan, and every shard that is finished."""

import hashlib
import json
from pathlib import Path
from typing import TypedDict

from nat_jax.errors import InputError
from nat_jax.input.sources.source import SPLITS

MANIFEST = "conversion.json"
SUMS = "SHA256SUMS"  # of all other files, as sha256sum -c reads it
FORMAT = 1


class SplitPlan(TypedDict):
    """One split of the source, and how it is divided.

    Attributes:
        fingerprint: the source's.
        class_names: the source's.
        has_labels: the source knows its labels without reading the records.
        record_bytes: mean size of a record, from a sample.
        lengths: records in each shard.
    """

    fingerprint: str
    class_names: list[str] | None
    has_labels: bool
    record_bytes: int
    lengths: list[int]


class Finished(TypedDict):
    """A complete shard.

    Attributes:
        sha256: of the file, in hex.
        num_bytes: of its records together.
        unreadable: names of the records that are empty because their files could not be read.
    """

    sha256: str
    num_bytes: int
    unreadable: list[str]


class Manifest(TypedDict):
    """The content of conversion.json.

    Attributes:
        format: version of this format.
        name: what TFDS calls the data set; the shards' names begin with it.
        shard_mb: wanted size of a shard in MiB.
        splits: by name.
        shards: those that are finished, by the names of their files.
    """

    format: int
    name: str
    shard_mb: int
    splits: dict[str, SplitPlan]
    shards: dict[str, Finished]


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
        kinds = [(saved, Manifest), *((plan, SplitPlan) for plan in saved["splits"].values())]
        kinds += [(shard, Finished) for shard in saved["shards"].values()]
        if any(set(value) != set(kind.__annotations__) for value, kind in kinds):
            raise ValueError("entries are missing")
        return saved
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): restore it, or delete {directory} and convert once more"
        ) from error


def labels_file(directory: Path, split: str) -> Path:
    """Return the place of a converted split's labels."""
    return directory / f"labels-{split}.npy"
