"""The task `convert`: a folder or a .zip of images becomes array_record shards.

The shards are planned once, and the plan and every finished shard are noted in a manifest. Every
run does the same: a shard that the manifest lists and whose checksum holds is kept, any other is
written. So a run that was killed goes on, a finished conversion is verified, and a damaged shard is
repaired.
"""

import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from nat_jax.errors import InputError, UserError
from nat_jax.input.sources import SOURCES, open_source
from nat_jax.input.sources.examples import example
from nat_jax.input.sources.folder import FolderSource
from nat_jax.input.sources.metadata import (
    INFO,
    MANIFEST,
    MANIFEST_FORMAT,
    TEMPLATE,
    Json,
    labels_file,
    read_manifest,
    shard_names,
)
from nat_jax.input.sources.shards import count_records
from nat_jax.input.sources.source import SPLITS, Record, UnreadableRecord
from nat_jax.runtime import atomic_files

_log = logging.getLogger(__name__)

_SUMS = "SHA256SUMS"  # of all other files, as sha256sum -c reads it
_READERS = 16  # threads: a slow disk or a network serves several reads at once
_AHEAD = 64  # records in memory
_FRAME = 128  # bytes that a record costs besides its image, about
_BAD_SHARE = 100  # one record in this many may be unreadable, as in training
_NAMES_SHOWN = 5
_MIB = 2**20
# Images are compressed already: on 1,920 JPEGs (10.5 KB each) zstd saves 1 %, and makes writing
# three times and reading one and a half times as long.
_OPTIONS = "group_size:1,uncompressed"
_PARTIAL = re.compile(r"\..*(array_record|json|npy|txt|SHA256SUMS).*\d")  # of a killed process


class ConversionError(UserError, RuntimeError):
    """A conversion cannot continue; the message has the reason."""


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
    if spec.partition(":")[0] in set(SOURCES) - {"folder"}:
        raise InputError(
            f"convert: {spec} needs no conversion, its records are read in place; expected "
            "--config.data.source=folder:PATH, a folder or a .zip of images"
        )
    if not to:
        raise InputError("convert.to is missing: name the folder to write, --config.convert.to=DIR")
    if shard_mb < 1:
        raise InputError(f"convert.shard_mb: expected at least 1; got {shard_mb}")
    sources = {split: cast(FolderSource, open_source(spec, split)) for split in SPLITS}
    folder = Path(to).expanduser()
    begun = time.monotonic()
    busy = f"another process is converting into {folder}; wait for it"
    with atomic_files.locked_folder(folder, "convert.to", busy):
        try:
            manifest = _begin(folder, spec, sources, shard_mb)
            written = _write_shards(folder, manifest, sources)
            _write_metadata(folder, manifest, sources)
        except UserError:
            raise
        except (OSError, RuntimeError) as error:
            raise ConversionError(
                f"cannot write {folder}: {error}. Finished shards are kept: put right what is "
                "wrong (make room, for instance), and run the same command again"
            ) from error
    shards = manifest["shards"]
    images = f"{sum(map(len, sources.values())):,}"
    if lost := [name for shard in shards.values() for name in shard["unreadable"]]:
        shown = ", ".join(lost[:_NAMES_SHOWN]) + (", ..." if len(lost) > _NAMES_SHOWN else "")
        problem = "could not be read and are empty images"
        _log.warning("convert: %d of %s records %s: %s", len(lost), images, problem, shown)
    _log.info(
        "convert: %s images in %d shards (%d written, %d verified) in %.1f s. Read them with "
        "--config.data.source=arrayrecord:%s",
        *(images, len(shards), written, len(shards) - written, time.monotonic() - begun, folder),
    )
    return folder


def _begin(folder: Path, spec: str, sources: dict[str, FolderSource], shard_mb: int) -> Json:
    """Return the manifest of an earlier run that fits, or plan the shards and write a new one."""
    manifest = read_manifest(folder)
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            path.unlink()
    if manifest is None:
        if others := sorted(os.listdir(folder)):
            raise InputError(
                f"convert.to: {folder} holds something else, such as {others[0]}; "
                "name an empty or a new folder"
            )
        stem = Path(spec.partition(":")[2]).expanduser().resolve().stem.lower()
        name = re.sub(r"[^a-z0-9]+", "_", stem).strip("_")
        if not name[:1].isalpha():  # TFDS wants a letter
            name = f"images_{name}".rstrip("_")
        plans = {split: _plan(source, shard_mb) for split, source in sources.items()}
        manifest = {"format": MANIFEST_FORMAT, "name": name, "shard_mb": shard_mb}
        manifest |= {"splits": plans, "shards": {}}
        _put(folder / MANIFEST, atomic_files.as_json(manifest))
    for split, source in sources.items():
        found = source.fingerprint, shard_mb
        noted = manifest["splits"][split]["fingerprint"], manifest["shard_mb"]
        if found != noted:
            raise InputError(
                f"convert.to: {folder} holds a conversion of another source, of {spec} before it "
                f"changed, or in shards of another size; expected fingerprint of {split} and "
                f"convert.shard_mb {noted}; got {found}. Set these, or name a new folder"
            )
    return manifest


def _plan(source: FolderSource, shard_mb: int) -> Json:
    """Divide a split evenly into shards of about the wanted size."""
    count = len(source)
    num_bytes = int(source.sizes.sum()) + _FRAME * count
    shards = min(count, -(-num_bytes // (shard_mb * _MIB)))
    return {
        "fingerprint": source.fingerprint,
        "class_names": None if source.class_names is None else list(source.class_names),
        "lengths": [count // shards + (i < count % shards) for i in range(shards)],
    }


def _write_shards(folder: Path, manifest: Json, sources: dict[str, FolderSource]) -> int:
    """Write every shard that is missing or damaged; return their number."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    package = logging.getLogger("nat_jax")
    shown = package if package.handlers else logging.getLogger()
    columns, lines = shutil.get_terminal_size()  # also where a terminal reports that it has none
    size = {"ncols": columns, "nrows": lines}
    bar = tqdm(total=sum(map(len, sources.values())), unit="image", disable=None, **size)
    shards, written = manifest["shards"], 0
    labelled = any(plan["class_names"] is not None for plan in manifest["splits"].values())
    with bar, logging_redirect_tqdm([shown]):
        for split, source in sources.items():
            lengths = manifest["splits"][split]["lengths"]
            allowed, bad = max(1, len(source) // _BAD_SHARE), []
            stop = 0
            for name, length in zip(_names(manifest, split), lengths, strict=True):
                rows = range(stop, stop := stop + length)
                path, noted = folder / name, shards.get(name)
                if path.exists() and noted and atomic_files.sha256(path) == noted["sha256"]:
                    bar.update(length)
                else:
                    if noted:
                        problem = "damaged (its checksum differs)" if path.exists() else "missing"
                        _log.warning("convert: %s is %s; it is made again", path, problem)
                    shards[name] = _write_shard(path, source, rows, labelled, bar)
                    _put(folder / MANIFEST, atomic_files.as_json(manifest))
                    _log.info("convert: wrote %s: %s images", name, f"{length:,}")
                    written += 1
                bad += shards[name]["unreadable"]
                if len(bad) > allowed:
                    raise ConversionError(
                        f"convert: more than {allowed} of the {len(source)} records of "
                        f"{source.name} ({split}) cannot be read, such as {bad[-1]}. At most 1 % "
                        "may be: repair or delete these files. Finished shards are kept"
                    )
    return written


def _write_shard(path: Path, source: FolderSource, rows: range, labelled: bool, bar: Any) -> Json:
    """Write one shard; return what the manifest notes of it."""
    from array_record.python.array_record_module import ArrayRecordWriter

    num_bytes, unreadable = 0, []
    with atomic_files.replacing(path) as partial:
        writer = ArrayRecordWriter(str(partial), _OPTIONS)
        for record, error in _read(source, rows):
            if error is not None:
                unreadable.append(record["name"])
                _log.warning("convert: unreadable, kept as an empty image: %s", error)
            label = record["label"] if labelled else None
            data = example(cast(bytes, record["image"]), label, record["name"])
            writer.write(data)
            num_bytes += len(data)
            bar.update()
        writer.close()
        if count_records(partial) != len(rows):
            raise ConversionError(f"{path} does not hold the {len(rows)} records written to it")
        checksum = atomic_files.sha256(partial)
    return {"sha256": checksum, "num_bytes": num_bytes, "unreadable": unreadable}


def _read(source: FolderSource, rows: range) -> Iterator[tuple[Record, UnreadableRecord | None]]:
    """Yield records in order, the unreadable ones empty, while threads read the next ones."""

    def read(row: int) -> tuple[Record, UnreadableRecord | None]:
        try:
            return source[row], None
        except UnreadableRecord as error:
            return Record(index=row, name=error.name, label=error.label, image=b""), error

    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(rows), _AHEAD):
            yield from pool.map(read, rows[start : start + _AHEAD])


def _write_metadata(folder: Path, manifest: Json, sources: dict[str, FolderSource]) -> None:
    """Write what TFDS and we read next to the shards, or what of it differs."""
    import tensorflow_datasets as tfds

    plans, shards = manifest["splits"], manifest["shards"]
    features: dict[str, Any] = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    classes = next((p["class_names"] for p in plans.values() if p["class_names"] is not None), None)
    if classes is not None:
        # TFDS keeps names as lines without space around them; the manifest has them as they are.
        plain = all(name == name.strip() and name.isprintable() for name in classes)
        names = {"names": classes} if plain else {"num_classes": len(classes)}
        features["label"] = tfds.features.ClassLabel(**names)
    with tempfile.TemporaryDirectory() as scratch:
        tfds.features.FeaturesDict(features).save_config(scratch)
        for split, source in sources.items():
            np.save(labels_file(Path(scratch), split), source.labels)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    info: Json = {"name": manifest["name"], "version": "1.0.0", "fileFormat": "array_record"}
    info["splits"] = [
        {  # numbers are strings in JSON of protos
            "name": split,
            "filepathTemplate": TEMPLATE,
            "numBytes": str(sum(shards[n]["num_bytes"] for n in _names(manifest, split))),
            "shardLengths": list(map(str, plan["lengths"])),
        }
        for split, plan in plans.items()
    ]
    files[INFO] = atomic_files.as_json(info)  # the last one: it makes the folder a source
    for name, data in files.items():
        _put(folder / name, data)
    files[MANIFEST] = (folder / MANIFEST).read_bytes()
    sums = {name: shard["sha256"] for name, shard in shards.items()}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    _put(folder / _SUMS, atomic_files.sums_text(sums))


def _names(manifest: Json, split: str) -> list[str]:
    return shard_names(manifest["name"], split, len(manifest["splits"][split]["lengths"]))


def _put(path: Path, data: bytes) -> None:
    if not path.exists() or path.read_bytes() != data:
        atomic_files.write(path, data)
