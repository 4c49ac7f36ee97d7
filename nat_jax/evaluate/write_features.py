"""The task `features`: the features of every image of a data set, as NumPy files.

Row i of each file is record i. Files grow batch by batch, so memory is that of a few batches, in a
folder that gets its name when it is complete; a run that was stopped continues where it was.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate
from nat_jax.errors import InputError
from nat_jax.evaluate.features import INDEX, Columns, extracted
from nat_jax.evaluate.networks import data_of
from nat_jax.evaluate.store import FeatureFiles, check_room
from nat_jax.export import Bundle
from nat_jax.export.loading import network_of, task_config
from nat_jax.input import pipeline
from nat_jax.input.sources import Source, open_source
from nat_jax.input.sources.subset import Subset
from nat_jax.models.frozen import resolve_layers
from nat_jax.runtime import atomic_files
from nat_jax.training import metrics
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

_CARD, _PROGRESS, _NAMES = "features.json", "progress.json", "names.jsonl"
_LESS = (
    "Lower eval.max_features, name fewer eval.layers, or name a folder on a larger disk with "
    "--config.features.to=DIR"
)
_SAVE_EVERY = 10.0  # seconds of work that a killed run may lose


def write_features(config: ConfigDict, workdir: Path) -> Path:
    """Write the features of a network's layers for every record of a data set.

    For each split, a folder with ``<layer>.npy`` float32[N, F] (feature maps flattened, pooled to
    ``eval.max_features`` values), ``index.npy`` int32[N], ``label.npy`` int32[N] (-1: none),
    ``names.jsonl`` (a JSON string a line) and ``features.json``, the protocol. The features of a
    record that cannot be read are NaN.

    Args:
        config: ``features``, ``eval.layers``, ``eval.max_features`` and ``eval.batch_size`` are
            read, and ``network``; of ``seeds`` the first is taken.
        workdir: the run's folder.

    Returns:
        The folder of the splits' folders.

    Raises:
        InputError: a mistake in the config, the folder holds other features, or the disk has no
            room for these.
    """
    configs.validate(config, evaluate.PROBES)
    network = network_of(config, workdir, seed=config.seeds[0])
    settings = task_config(config, network)
    spec, own = settings.features.source, settings.data.source
    if not spec:
        spec = own = data_of(network, config, open_source)
    place = Path(settings.features.to or Path(workdir) / "features").expanduser()
    for split in settings.features.splits:
        few = settings.data.per_class if spec == own else 0
        source = open_source(spec, split, per_class=few)
        protocol = _protocol(settings, network, source)
        folder = place / split
        if (there := workdirs.read_json(folder / _CARD)) is None:
            _write(folder, protocol, settings, network, source)
        elif any(there.get(key) != value for key, value in protocol.items()):
            raise InputError(
                f"features.to: {folder} holds features of another network, data set or protocol; "
                "delete it, or name another folder with --config.features.to=DIR"
            )
        else:
            logger.info("%s: already there, of the same network and data", folder)
    return place


def _protocol(settings: ConfigDict, network: Bundle, source: Source) -> dict[str, Any]:
    """Return all that the features depend on."""
    layers = resolve_layers(settings.eval.layers, network.model)
    return {
        "network": network.fingerprint(),
        "run": dict(network.run),
        "layers": list(layers),
        "max_features": settings.eval.max_features,
        "image_size": network.model.image_size,
        "resize": network.resize,
        "white": network.white or None,  # as in files of versions without it
        "batch_size": settings.eval.batch_size,
        "split": source.split,
        "records": len(source),
        "fingerprint": source.fingerprint,
    }


def _write(
    folder: Path,
    protocol: Mapping[str, Any],
    settings: ConfigDict,
    network: Bundle,
    source: Source,
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    busy = f"another process is writing {partial}; wait for it, or choose another"
    with atomic_files.locked_folder(partial, "features.to", busy):
        progress = workdirs.read_json(partial / _PROGRESS)
        if progress is None or progress["asked"] != protocol:
            for leftover in partial.iterdir():
                leftover.unlink()
            progress = {"done": 0, "names": 0}
        elif progress["done"]:
            logger.info("%s: continues at record %d", folder, progress["done"])
        computed = _computed(settings, network, source, progress["done"])
        _append(partial, progress, protocol, computed)
        card = {**protocol, "source": source.name, "class_names": source.class_names}
        workdirs.write_json(partial / _CARD, card)
        (partial / _PROGRESS).unlink(missing_ok=True)
        partial.replace(folder)
    logger.info("%s: %s records", folder, f"{len(source):,}")


def _append(
    partial: Path,
    progress: Mapping[str, Any],
    protocol: Mapping[str, Any],
    computed: Iterator[tuple[Columns, list[str]]],
) -> None:
    """Write the records that are not done yet, and from time to time how many are."""
    done, records = progress["done"], protocol["records"]
    names = (partial / _NAMES).open("r+b" if progress["names"] else "w+b")
    names.truncate(progress["names"])
    names.seek(progress["names"])
    title = f"features, {protocol['split']}"
    display = metrics.Progress(
        start=done, total=records, unit="image", title=title, every=metrics.SECONDS
    )
    saved = time.monotonic()
    with names, closing(display), FeatureFiles(partial, done) as files:
        for columns, batch_names in computed:
            if files.rows == done:
                row_bytes = sum(v[0].nbytes for v in columns.values())
                check_room(partial, row_bytes * (records - done), _LESS)
            files.append(columns)
            names.write("".join(json.dumps(name) + "\n" for name in batch_names).encode())
            display.show(files.rows)
            if time.monotonic() - saved > _SAVE_EVERY:
                files.sync()
                names.flush()
                os.fsync(names.fileno())
                state = {"done": files.rows, "names": names.tell(), "asked": protocol}
                workdirs.write_json(partial / _PROGRESS, state)
                saved = time.monotonic()
        files.finish()
        names.flush()
        os.fsync(names.fileno())


def _computed(
    settings: ConfigDict, network: Bundle, source: Source, start: int
) -> Iterator[tuple[Columns, list[str]]]:
    """Yield the columns of each batch from a record on, and the names of its records."""
    rest = Subset(source, np.arange(start, len(source))) if start else source
    if not len(rest):
        return
    layers = resolve_layers(settings.eval.layers, network.model)
    extract = network.extractor(layers, settings.eval.max_features)
    batches = pipeline.eval_batches(
        rest,
        network.transform,
        batch_size=settings.eval.batch_size,
        **configs.reading(settings),
    )
    with closing(batches):
        for batch, columns in extracted(extract, batches, unreadable=np.nan):
            columns[INDEX] += start
            yield columns, batch["name"][: len(columns[INDEX])]
