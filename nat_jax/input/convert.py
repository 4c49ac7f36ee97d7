"""The task `convert`: a folder or a .zip of images becomes array_record shards.

The shards are planned once, from the number of records and a sample of their sizes, and the plan
and every finished shard are noted in a manifest. Every run does the same: a shard that the manifest
lists and whose checksum holds is kept, any other is written. So a run that was killed goes on, a
finished conversion is verified, and a damaged shard is repaired.
"""

import hashlib
import io
import itertools
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.errors import InputError, UserError
from nat_jax.input.sources import open_source
from nat_jax.input.sources.examples import example
from nat_jax.input.sources.manifest import (
    FORMAT,
    MANIFEST,
    SUMS,
    Manifest,
    labels_file,
    read_manifest,
    shard_names,
)
from nat_jax.input.sources.metadata import INFO
from nat_jax.input.sources.shards import Shards
from nat_jax.input.sources.source import SPLITS, Record, Source, UnreadableRecord
from nat_jax.runtime import atomic_files

_log = logging.getLogger(__name__)

_READERS = 16  # threads: a slow disk or a network serves several reads at once
_AHEAD = 64  # records in memory
_SAMPLE = 256  # records of a split that are read to plan its shards
_FRAME = 64  # bytes that a record costs in a file, about
_BAD_SHARE = 100  # one record in this many may be unreadable, as in training
_NAMES_SHOWN = 5
_MIB = 2**20
# Images are compressed already: on 1,920 JPEGs (10.5 KB each) zstd saves 1 %, and makes writing
# three times and reading one and a half times as long.
_OPTIONS = "group_size:1,uncompressed"
# Files that a killed process was writing.
_PARTIAL = re.compile(r"\..*(array_record|\.json|\.npy|\.txt|SHA256SUMS).*(\d+|\.partial)")


class ConversionError(UserError, RuntimeError):
    """A conversion cannot go on; the message names the reason and what is kept."""


def convert(spec: str, to: str | None, *, shard_mb: int = 1024) -> Path:
    """Write the records of a source as array_record shards, or verify and repair them.

    Record i of a split of the source becomes record i of that split of `arrayrecord:DIR`, with the
    same bytes, label and name; class names and fingerprint stay the same too. The folder can also
    be read by `tfds.builder_from_directory(DIR).as_data_source("train")`. A file that cannot be
    read keeps its index, as an empty image.

    Args:
        spec: the source, "folder:PATH" with a folder or a .zip.
        to: the folder to write: empty, or missing, or an earlier run's.
        shard_mb: size of a shard in MiB, about.

    Returns:
        The folder.

    Raises:
        ValueError: the source needs no conversion, or the folder holds something else.
        ConversionError: writing failed, or more than 1 % of the records cannot be read.
    """
    if spec.partition(":")[0] in ("digits", "arrays", "tfds", "arrayrecord"):
        raise InputError(
            f"convert: {spec} needs no conversion, its records are read in place; expected "
            "--config.data.source=folder:PATH, a folder or a .zip of images"
        )
    if not to:
        raise InputError("convert.to is missing: name the folder to write, --config.convert.to=DIR")
    if shard_mb < 1:
        raise InputError(f"convert.shard_mb: expected at least 1; got {shard_mb}")
    sources = {split: open_source(spec, split) for split in SPLITS}
    folder = Path(to).expanduser()
    begun = time.monotonic()
    busy = f"another process is converting into {folder}; wait for it"
    with atomic_files.locked_folder(folder, "convert.to", busy):
        try:
            manifest = _begin(folder, spec, sources, shard_mb)
            written = _write_shards(folder, manifest, sources)
            _write_metadata(folder, manifest, sources)
        except (OSError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise ConversionError(
                f"cannot write {folder}: {error}. Finished shards are kept: put right what is "
                "wrong (make room, for instance), and run the same command again"
            ) from error
    _summarize(folder, manifest, written, time.monotonic() - begun)
    return folder


def _begin(folder: Path, spec: str, sources: dict[str, Source], shard_mb: int) -> Manifest:
    """Return the manifest of an earlier run that fits, or plan the shards and write a new one."""
    manifest = read_manifest(folder)
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink()
    if manifest is None:
        others = sorted(os.listdir(folder))
        if others:
            raise InputError(
                f"convert.to: {folder} holds something else, such as {others[0]}; "
                "name an empty or a new folder"
            )
        stem = Path(spec.partition(":")[2]).expanduser().resolve().stem.lower()
        name = re.sub(r"[^a-z0-9]+", "_", stem).strip("_")
        if not name[:1].isalpha():  # TFDS wants a letter
            name = f"images_{name}".rstrip("_")
        plans = {split: _plan(source, shard_mb) for split, source in sources.items()}
        manifest = {"format": FORMAT, "name": name, "shard_mb": shard_mb}
        manifest |= {"splits": plans, "shards": {}}
        _put(folder / MANIFEST, atomic_files.as_json(manifest))
    for split, source in sources.items():
        noted = manifest["splits"][split]["fingerprint"]
        if noted != source.fingerprint:
            raise InputError(
                f"convert.to: {folder} holds the conversion of another source, or {spec} has "
                f"changed since (fingerprint of {split}: {source.fingerprint[:12]}; there: "
                f"{noted[:12]}); name a new folder"
            )
    if manifest["shard_mb"] != shard_mb:
        raise InputError(
            f"convert.shard_mb: {folder} was begun with {manifest['shard_mb']}; got {shard_mb}. "
            f"Set --config.convert.shard_mb={manifest['shard_mb']}, or name a new folder"
        )
    plans = manifest["splits"]
    needed = sum(sum(p["lengths"]) * (p["record_bytes"] + _FRAME) for p in plans.values())
    needed -= sum(file.stat().st_size for file in folder.glob("*array_record*"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"convert.to: about {_size(needed)} more are needed in {folder}; "
            f"{_size(free)} are free. Make room, or name a folder on another disk"
        )
    return manifest


def _plan(source: Source, shard_mb: int) -> dict[str, Any]:
    """Divide a split evenly into shards of about the wanted size."""
    count = len(source)
    sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()
    records = _read(source, sample)
    sizes = [len(_serialized(r, True)) for r in records if not isinstance(r, UnreadableRecord)]
    mean = round(sum(sizes) / len(sizes)) if sizes else 1
    shards = -(-count // max(1, shard_mb * _MIB // mean))
    return {
        "fingerprint": source.fingerprint,
        "class_names": None if source.class_names is None else list(source.class_names),
        "has_labels": source.labels is not None,
        "record_bytes": mean,
        "lengths": [count // shards + (i < count % shards) for i in range(shards)],
    }


def _read(source: Source, rows: Sequence[int]) -> Iterator[Record | UnreadableRecord]:
    """Yield records in order, or why one cannot be read, while threads read the next ones."""

    def read(row: int) -> Record | UnreadableRecord:
        try:
            return source[row]
        except UnreadableRecord as error:
            return error

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(rows), _AHEAD):
            yield from pool.map(read, rows[start : start + _AHEAD])


def _serialized(record: Record | UnreadableRecord, labelled: bool) -> bytes:
    if isinstance(record, UnreadableRecord):
        return example(b"", record.label if labelled else None, record.name)
    image = record["image"]
    assert isinstance(image, bytes), "the sources that hold pixels need no conversion"
    return example(image, record["label"] if labelled else None, record["name"])


def _write_shards(folder: Path, manifest: Manifest, sources: dict[str, Source]) -> int:
    """Write every shard that is missing or damaged; return their number."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    written = 0
    total = sum(len(source) for source in sources.values())
    columns, lines = shutil.get_terminal_size()  # also where a terminal reports that it has none
    bar = tqdm(total=total, unit="image", disable=None, ncols=columns, nrows=lines)
    package = logging.getLogger("nat_jax")
    shown = package if package.handlers else logging.getLogger()
    with bar, nullcontext() if bar.disable else logging_redirect_tqdm([shown]):
        for split, source in sources.items():
            ends = itertools.accumulate(manifest["splits"][split]["lengths"], initial=0)
            rows = itertools.starmap(range, itertools.pairwise(ends))
            for name, part in zip(shard_names(manifest, split), rows, strict=True):
                path, noted = folder / name, manifest["shards"].get(name)
                if noted is not None:
                    if path.exists() and atomic_files.sha256(path) == noted["sha256"]:
                        bar.update(len(part))
                        continue
                    problem = "damaged (its checksum differs)" if path.exists() else "missing"
                    _log.warning("convert: %s is %s; it is made again", path, problem)
                _write_shard(path, manifest, source, part, bar)
                written += 1
    return written


def _write_shard(path: Path, manifest: Manifest, source: Source, rows: range, bar: Any) -> None:
    """Write one shard, and note it in the manifest once it is complete."""
    from array_record.python.array_record_module import ArrayRecordWriter

    begun = time.monotonic()
    labelled = any(plan["class_names"] is not None for plan in manifest["splits"].values())
    shards = manifest["shards"]
    before = shards.pop(path.name, None)
    names = set(shard_names(manifest, source.split)) & set(shards)
    lost = sum(len(shards[name]["unreadable"]) for name in names)
    allowed = max(1, len(source) // _BAD_SHARE)
    finished: dict[str, Any] = {"sha256": "", "num_bytes": 0, "unreadable": []}
    with atomic_files.replacing(path) as partial:
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        for record in _read(source, rows):
            if isinstance(record, UnreadableRecord):
                finished["unreadable"].append(record.name)
                if lost + len(finished["unreadable"]) > allowed:
                    raise ConversionError(
                        f"convert: more than {allowed} of the {len(source)} records of "
                        f"{source.name} ({source.split}) cannot be read, the last because "
                        f"{record}. At most 1 % may be: repair or delete these files. Finished "
                        "shards are kept"
                    )
                _log.warning("convert: unreadable, kept as an empty image: %s", record)
            data = _serialized(record, labelled)
            writer.write(data)
            finished["num_bytes"] += len(data)
            bar.update()
        writer.close()
        if Shards([partial]).lengths != (len(rows),):
            raise ConversionError(f"{path} does not hold the {len(rows)} records written to it")
        finished["sha256"] = atomic_files.sha256(partial)
        if before is not None and before["sha256"] != finished["sha256"]:
            raise ConversionError(
                f"{path} cannot be made again: {source.name} gives other bytes than it gave then. "
                "Bring the source back to what it was, or convert it into a new folder"
            )
    shards[path.name] = finished
    manifest["shards"] = dict(sorted(shards.items()))  # the same whatever was finished first
    _put(path.parent / MANIFEST, atomic_files.as_json(manifest))
    _log.info(
        "convert: wrote %s: %s images, %s, %s images/s",
        path.name,
        f"{len(rows):,}",
        _size(path.stat().st_size),
        f"{len(rows) / (time.monotonic() - begun):,.0f}",
    )


def _write_metadata(folder: Path, manifest: Manifest, sources: dict[str, Source]) -> None:
    """Write what TFDS and we read next to the shards, or what of it differs."""
    files = _tfds_files(manifest)
    for split, source in sources.items():
        if source.labels is not None:
            file = io.BytesIO()
            np.save(file, np.asarray(source.labels))
            files[labels_file(folder, split).name] = file.getvalue()
    files[INFO] = files.pop(INFO)  # the last one: it makes the folder a source
    for name, data in files.items():
        path = folder / name
        if path.exists() and path.read_bytes() != data:
            _log.warning("convert: %s is damaged or of another version; it is made again", path)
        _put(path, data)
    files[MANIFEST] = (folder / MANIFEST).read_bytes()
    sums = {name: shard["sha256"] for name, shard in manifest["shards"].items()}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    _put(folder / SUMS, atomic_files.sums_text(sums))


def _tfds_files(manifest: Manifest) -> dict[str, bytes]:
    """Return the metadata as TFDS writes them, by name; numbers are strings in JSON of protos."""
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    plans, shards = manifest["splits"], manifest["shards"]
    classes = next((p["class_names"] for p in plans.values() if p["class_names"] is not None), None)
    if classes is not None:
        # TFDS keeps names as lines without space around them; the manifest has them as they are.
        plain = all(name == name.strip() and name.isprintable() for name in classes)
        names = {"names": classes} if plain else {"num_classes": len(classes)}
        features["label"] = tfds.features.ClassLabel(**names)
    with tempfile.TemporaryDirectory() as scratch:
        tfds.features.FeaturesDict(features).save_config(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    splits = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": str(sum(shards[n]["num_bytes"] for n in shard_names(manifest, split))),
            "shardLengths": [str(length) for length in plan["lengths"]],
        }
        for split, plan in plans.items()
    ]
    info = {"name": manifest["name"], "version": "1.0.0", "fileFormat": "array_record"}
    return files | {INFO: atomic_files.as_json(info | {"splits": splits})}


def _put(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        atomic_files.write(path, data)


def _summarize(folder: Path, manifest: Manifest, written: int, seconds: float) -> None:
    shards = manifest["shards"]
    images = f"{sum(sum(plan['lengths']) for plan in manifest['splits'].values()):,}"
    lost = [name for shard in shards.values() for name in shard["unreadable"]]
    if lost:
        more = f" and {len(lost) - _NAMES_SHOWN} more" if len(lost) > _NAMES_SHOWN else ""
        _log.warning(
            "convert: %d of %s records could not be read and are empty images: %s%s",
            len(lost),
            images,
            ", ".join(lost[:_NAMES_SHOWN]),
            more,
        )
    kept = len(shards) - written
    done = [f"{written} written"] if written else []
    done += [f"{kept} verified: every checksum holds"] if kept else []
    _log.info(
        "convert: %s images in %d shards (%s) in %.1f s. Read them with "
        "--config.data.source=arrayrecord:%s",
        images,
        len(shards),
        ", ".join(done),
        seconds,
        folder,
    )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
