"""The task `convert`: a folder or a .zip of images becomes array_record shards.

The shards are planned once, from the number of records and a sample of their sizes, and the plan
and every finished shard are noted in a manifest. Whatever a run finds, it does the same: a shard
that the manifest lists and whose checksum holds is kept, any other is made. So a run that was
killed goes on, a finished conversion is verified, and a damaged shard is repaired.
"""

import hashlib
import io
import logging
import os
import re
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from nat_jax.errors import InputError
from nat_jax.input.manifest import (
    MANIFEST,
    SUMS,
    Finished,
    Manifest,
    SplitPlan,
    labels_file,
    read_manifest,
)
from nat_jax.input.read_ahead import READERS, read_ahead
from nat_jax.input.sources import open_source
from nat_jax.input.sources.metadata import FORMAT, INFO
from nat_jax.input.sources.shards import Shards, example
from nat_jax.input.sources.source import SPLITS, Record, Source, UnreadableRecord
from nat_jax.runtime.atomic_files import (
    ConversionError,
    RecordWriter,
    as_json,
    kept_for_us,
    partial_path,
    publish,
    put,
    remove_partial,
    sha256,
    sums_text,
)

_log = logging.getLogger(__name__)

_SAMPLE = 256  # records of a split that are read to plan its shards
_FRAME = 64  # bytes that a record costs in a file, about
_BAD_SHARE = 100  # one record in this many may be unreadable, as in training
_NAMES_SHOWN = 5
_MIB = 2**20


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
    _check_arguments(spec, to, shard_mb)
    sources = {split: open_source(spec, split) for split in SPLITS}
    folder = Path(str(to)).expanduser()
    begun = time.monotonic()
    busy = f"another process is converting into {folder}; wait for it"
    with kept_for_us(folder, "convert.to", busy), ThreadPoolExecutor(READERS) as pool:
        manifest = _begin(folder, spec, sources, shard_mb, pool)
        _check_space(folder, manifest)
        made = _make_shards(folder, manifest, sources, pool)
        _write_metadata(folder, manifest, sources)
    _summarize(folder, manifest, made, time.monotonic() - begun)
    return folder


def _check_arguments(spec: str, to: str | None, shard_mb: int) -> None:
    kind = spec.partition(":")[0]
    if kind in ("digits", "arrays", "tfds", "arrayrecord"):
        raise InputError(
            f"convert: {spec} needs no conversion, its records are read in place; expected "
            "--config.data.source=folder:PATH, a folder or a .zip of images"
        )
    if not to:
        raise InputError("convert.to is missing: name the folder to write, --config.convert.to=DIR")
    if shard_mb < 1:
        raise InputError(f"convert.shard_mb: expected at least 1; got {shard_mb}")


def _begin(
    folder: Path, spec: str, sources: dict[str, Source], shard_mb: int, pool: ThreadPoolExecutor
) -> Manifest:
    """Give the manifest of an earlier run that fits, or plan the shards and write a new one."""
    manifest = read_manifest(folder)
    if manifest is None:
        remove_partial(folder)
        others = sorted(os.listdir(folder))
        if others:
            raise InputError(
                f"convert.to: {folder} holds something else, such as {others[0]}; "
                "name an empty or a new folder"
            )
        plans = {split: _plan(source, shard_mb, pool) for split, source in sources.items()}
        manifest = Manifest(_data_set_name(spec), shard_mb, plans, {})
        put(folder / MANIFEST, as_json(manifest.to_json()))
        return manifest
    for split, source in sources.items():
        noted = manifest.splits[split].fingerprint
        if noted != source.fingerprint:
            raise InputError(
                f"convert.to: {folder} holds the conversion of another source, or {spec} has "
                f"changed since (fingerprint of {split}: {source.fingerprint[:12]}; there: "
                f"{noted[:12]}); name a new folder"
            )
    if manifest.shard_mb != shard_mb:
        raise InputError(
            f"convert.shard_mb: {folder} was begun with {manifest.shard_mb}; got {shard_mb}. "
            f"Set --config.convert.shard_mb={manifest.shard_mb}, or name a new folder"
        )
    remove_partial(folder)
    return manifest


def _data_set_name(spec: str) -> str:
    """Make a name that TFDS accepts out of that of the folder or .zip."""
    stem = Path(spec.partition(":")[2]).expanduser().resolve().stem
    name = re.sub(r"[^a-z0-9]+", "_", stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"images_{name}".rstrip("_")


def _plan(source: Source, shard_mb: int, pool: ThreadPoolExecutor) -> SplitPlan:
    """Divide a split evenly into shards of about the wanted size."""
    count = len(source)
    sample = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int).tolist()
    sizes = [
        len(example(_bytes(record), record["label"], record["name"]))
        for record in read_ahead(source, sample, pool)
        if not isinstance(record, UnreadableRecord)
    ]
    mean = round(sum(sizes) / len(sizes)) if sizes else 1
    shards = -(-count // max(1, shard_mb * _MIB // mean))
    return SplitPlan(
        fingerprint=source.fingerprint,
        class_names=source.class_names,
        has_labels=source.labels is not None,
        record_bytes=mean,
        lengths=tuple(count // shards + (i < count % shards) for i in range(shards)),
    )


def _check_space(folder: Path, manifest: Manifest) -> None:
    needed = sum(sum(p.lengths) * (p.record_bytes + _FRAME) for p in manifest.splits.values())
    there = sum(file.stat().st_size for file in folder.glob(f"*{FORMAT}*"))
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise InputError(
            f"convert.to: about {_size(needed - there)} more are needed in {folder}; "
            f"{_size(free)} are free. Make room, or name a folder on another disk"
        )


def _make_shards(
    folder: Path, manifest: Manifest, sources: dict[str, Source], pool: ThreadPoolExecutor
) -> int:
    """Make every shard that is not there, or not what it was; give their number."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    made = 0
    total = sum(len(source) for source in sources.values())
    columns, lines = shutil.get_terminal_size()  # also where a terminal says that it has none
    bar = tqdm(total=total, unit="image", disable=None, ncols=columns, nrows=lines)
    package = logging.getLogger("nat_jax")
    shown = package if package.handlers else logging.getLogger()
    with bar, nullcontext() if bar.disable else logging_redirect_tqdm([shown]):
        for split, source in sources.items():
            start = 0
            lengths = manifest.splits[split].lengths
            for name, length in zip(manifest.shard_names(split), lengths, strict=True):
                if _is_good(folder / name, manifest.shards.get(name)):
                    bar.update(length)
                else:
                    rows = range(start, start + length)
                    _make_shard(folder / name, manifest, source, rows, bar, pool)
                    made += 1
                start += length
    return made


def _is_good(path: Path, noted: Finished | None) -> bool:
    if noted is None:
        return False
    problem = None
    if not path.exists():
        problem = "missing"
    elif sha256(path) != noted.sha256:
        problem = "damaged (its checksum differs)"
    if problem is not None:
        _log.warning("convert: %s is %s; it is made again", path, problem)
    return problem is None


def _make_shard(
    path: Path,
    manifest: Manifest,
    source: Source,
    rows: range,
    bar: Any,
    pool: ThreadPoolExecutor,
) -> None:
    """Write one shard, and note it in the manifest once it is whole."""
    begun = time.monotonic()
    before = manifest.shards.pop(path.name, None)
    partial = partial_path(path)
    finished = _write_shard(partial, manifest, source, rows, bar, pool)
    if before is not None and before.sha256 != finished.sha256:
        partial.unlink()
        raise ConversionError(
            f"{path} cannot be made again: {source.name} gives other bytes than it gave then. "
            "Bring the source back to what it was, or convert it into a new folder"
        )
    publish(partial, path)
    manifest.shards[path.name] = finished
    put(path.parent / MANIFEST, as_json(manifest.to_json()))
    if before is None:
        put(path.parent / SUMS, sums_text({k: v.sha256 for k, v in manifest.shards.items()}))
    _log.info(
        "convert: wrote %s: %s images, %s, %s images/s",
        path.name,
        f"{len(rows):,}",
        _size(path.stat().st_size),
        f"{len(rows) / (time.monotonic() - begun):,.0f}",
    )


def _write_shard(
    path: Path,
    manifest: Manifest,
    source: Source,
    rows: range,
    bar: Any,
    pool: ThreadPoolExecutor,
) -> Finished:
    labelled = any(plan.class_names is not None for plan in manifest.splits.values())
    unreadable: list[str] = []
    num_bytes = 0
    writer = RecordWriter(path)
    for record in read_ahead(source, rows, pool):
        if isinstance(record, UnreadableRecord):
            unreadable.append(record.name)
            _check_share(len(unreadable), manifest, source, str(record))
            image, label, name = b"", record.label, record.name
        else:
            image, label, name = _bytes(record), record["label"], record["name"]
        data = example(image, label if labelled else None, name)
        writer.write(data)
        num_bytes += len(data)
        bar.update()
    writer.close()
    if Shards([path]).lengths != (len(rows),):
        raise ConversionError(f"{path} does not hold the {len(rows)} records written to it")
    return Finished(sha256(path), num_bytes, tuple(unreadable))


def _check_share(here: int, manifest: Manifest, source: Source, reason: str) -> None:
    """Stop at as many unreadable records as training would stop at."""
    names = manifest.shard_names(source.split)
    done = [manifest.shards[name] for name in names if name in manifest.shards]
    allowed = max(1, len(source) // _BAD_SHARE)
    if here + sum(len(shard.unreadable) for shard in done) > allowed:
        raise ConversionError(
            f"convert: more than {allowed} of the {len(source)} records of {source.name} "
            f"({source.split}) cannot be read, the last because {reason}. At most 1 % may be: "
            "repair or delete these files. Finished shards are kept"
        )
    _log.warning("convert: unreadable, kept as an empty image: %s", reason)


def _write_metadata(folder: Path, manifest: Manifest, sources: dict[str, Source]) -> None:
    """Write what stands beside the shards, or what of it differs; dataset_info.json at last."""
    files = _features(sources)
    for split, source in sources.items():
        if source.labels is not None:
            file = io.BytesIO()
            np.save(file, np.asarray(source.labels))
            files[labels_file(folder, split).name] = file.getvalue()
    files[INFO] = as_json(manifest.to_dataset_info())
    for name, data in files.items():
        path = folder / name
        if path.exists() and path.read_bytes() != data:
            _log.warning("convert: %s is damaged or of another version; it is made again", path)
        put(path, data)
    files[MANIFEST] = (folder / MANIFEST).read_bytes()
    sums = {name: shard.sha256 for name, shard in manifest.shards.items()}
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    put(folder / SUMS, sums_text(sums))


def _features(sources: dict[str, Source]) -> dict[str, bytes]:
    """Give features.json and the list of classes as TFDS writes them, by name."""
    import tensorflow_datasets as tfds

    features: dict[str, Any] = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    classes = next((s.class_names for s in sources.values() if s.class_names is not None), None)
    if classes is not None:
        # TFDS keeps names as lines without space around them; the manifest has them as they are.
        plain = all(name == name.strip() and name.isprintable() for name in classes)
        names = {"names": classes} if plain else {"num_classes": len(classes)}
        features["label"] = tfds.features.ClassLabel(**names)
    with tempfile.TemporaryDirectory() as scratch:
        tfds.features.FeaturesDict(features).save_config(scratch)
        return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}


def _summarize(folder: Path, manifest: Manifest, made: int, seconds: float) -> None:
    shards = manifest.shards
    images = sum(sum(plan.lengths) for plan in manifest.splits.values())
    lost = [name for shard in shards.values() for name in shard.unreadable]
    if lost:
        more = f" and {len(lost) - _NAMES_SHOWN} more" if len(lost) > _NAMES_SHOWN else ""
        _log.warning(
            "convert: %d of %s records could not be read and are empty images: %s%s",
            len(lost),
            f"{images:,}",
            ", ".join(lost[:_NAMES_SHOWN]),
            more,
        )
    kept = len(shards) - made
    done = [f"{made} written"] if made else []
    done += [f"{kept} verified: every checksum holds"] if kept else []
    _log.info(
        "convert: %s images in %d shards (%s) in %.1f s. Read them with "
        "--config.data.source=arrayrecord:%s",
        f"{images:,}",
        len(shards),
        ", ".join(done),
        seconds,
        folder,
    )


def _bytes(record: Record) -> bytes:
    image = record["image"]
    if not isinstance(image, bytes):
        raise TypeError(f"{record['name']}: expected encoded bytes; got {type(image).__name__}")
    return image


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
