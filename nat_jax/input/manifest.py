"""What a conversion notes of itself: its plan, and every shard that is finished."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.input.sources.source import SPLITS

MANIFEST = "conversion.json"
SUMS = "SHA256SUMS"  # of all other files, as sha256sum -c reads it; the manifest's once it is final
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class SplitPlan:
    """One split of the source, and how it is divided.

    Attributes:
        fingerprint: the source's.
        class_names: the source's.
        has_labels: the source knows its labels without reading the records.
        record_bytes: mean size of a record, from a sample.
        lengths: records in each shard.
    """

    fingerprint: str
    class_names: tuple[str, ...] | None
    has_labels: bool
    record_bytes: int
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Finished:
    """A shard that is whole.

    Attributes:
        sha256: of the file, in hex.
        num_bytes: of its records together.
        unreadable: names of the records that are empty because their files could not be read.
    """

    sha256: str
    num_bytes: int
    unreadable: tuple[str, ...]


@dataclasses.dataclass
class Manifest:
    """The state of a conversion.

    Attributes:
        name: what TFDS calls the data set; the shards' names begin with it.
        shard_mb: wanted size of a shard in MiB.
        splits: by name.
        shards: those that are finished, by the names of their files.
    """

    name: str
    shard_mb: int
    splits: dict[str, SplitPlan]
    shards: dict[str, Finished]

    def shard_names(self, split: str) -> list[str]:
        """Name the files of a split in order."""
        count = len(self.splits[split].lengths)
        return [f"{self.name}-{split}.array_record-{i:05}-of-{count:05}" for i in range(count)]

    def to_json(self) -> dict[str, Any]:
        """Give what `read_manifest` reads, the same whatever was finished first."""
        saved = {"format": _FORMAT, **dataclasses.asdict(self)}
        return saved | {"shards": dict(sorted(saved["shards"].items()))}

    def to_dataset_info(self) -> dict[str, Any]:
        """Give what TFDS reads as dataset_info.json; numbers are strings in the JSON of protos."""
        splits = [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(sum(self.shards[s].num_bytes for s in self.shard_names(split))),
                "shardLengths": [str(length) for length in plan.lengths],
            }
            for split, plan in self.splits.items()
        ]
        return {
            "name": self.name,
            "version": "1.0.0",
            "fileFormat": "array_record",
            "splits": splits,
        }


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
        saved = json.loads(data)
        if saved.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        lines = sums.read_text().splitlines() if sums.exists() else []
        right = f"{hashlib.sha256(data).hexdigest()}  {MANIFEST}"
        if any(line.endswith(MANIFEST) and line != right for line in lines):
            raise ValueError(f"its checksum is not that in {SUMS}; one of the two is damaged")
        if set(saved["splits"]) != set(SPLITS):
            raise ValueError(f"its splits are not {', '.join(SPLITS)}")
        saved["splits"] = {key: _plan(**value) for key, value in saved["splits"].items()}
        saved["shards"] = {key: _finished(**value) for key, value in saved["shards"].items()}
        return Manifest(**saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({error}): restore it, or delete {directory} and convert once more"
        ) from error


def labels_file(directory: Path, split: str) -> Path:
    """Give the place of a converted split's labels."""
    return directory / f"labels-{split}.npy"


def _plan(class_names: Any, lengths: Any, **others: Any) -> SplitPlan:
    names = None if class_names is None else tuple(class_names)
    return SplitPlan(class_names=names, lengths=tuple(lengths), **others)


def _finished(unreadable: Any, **others: Any) -> Finished:
    return Finished(unreadable=tuple(unreadable), **others)
