"""The task `features`: the features of every image of a data set, as NumPy files.

Row i of each file is record i. Files grow batch by batch, so memory is that of a few batches, in a
folder that gets its name when it is whole; a run that was stopped goes on where it was.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from nat_jax import config as configs
from nat_jax import evaluate
from nat_jax.errors import InputError
from nat_jax.evaluate.features import computed
from nat_jax.evaluate.probe_data import Selection
from nat_jax.export import Bundle
from nat_jax.export.loading import network_of, task_config
from nat_jax.input import pipeline
from nat_jax.input.sources import Source, open_source
from nat_jax.models.frozen import resolve_layers
from nat_jax.runtime import atomic_files
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

_CARD, _PROGRESS, _NAMES = "features.json", "progress.json", "names.jsonl"
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
        ValueError: a mistake in the config, or the folder holds other features.
    """
    configs.validate(config, evaluate.PROBES)
    network = network_of(config, workdir, seed=config.seeds[0])
    settings = task_config(config, network)
    spec = settings.features.source or settings.data.source
    place = Path(settings.features.to or Path(workdir) / "features").expanduser()
    for split in settings.features.splits:
        few = settings.data.per_class if spec == settings.data.source else 0
        source = open_source(spec, split, per_class=few)
        asked = _protocol(settings, network, source)
        folder = place / split
        if (there := workdirs.read_json(folder / _CARD)) is None:
            _write(folder, asked, settings, network, source)
        elif any(there.get(key) != value for key, value in asked.items()):
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
        "batch_size": settings.eval.batch_size,
        "split": source.split,
        "records": len(source),
        "fingerprint": source.fingerprint,
    }


def _write(
    folder: Path,
    asked: Mapping[str, Any],
    settings: ConfigDict,
    network: Bundle,
    source: Source,
) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    with ExitStack() as stack:
        busy = f"another process is writing {partial}; wait for it, or choose another"
        stack.enter_context(atomic_files.kept_for_us(partial, "features.to", busy))
        progress = workdirs.read_json(partial / _PROGRESS)
        if progress is None or progress["asked"] != asked:
            for leftover in partial.iterdir():
                leftover.unlink()
            progress = {"done": 0, "names": 0}
        elif progress["done"]:
            logger.info("%s: goes on at record %d", folder, progress["done"])
        files = _Files(partial, len(source), progress, stack)
        bar = stack.enter_context(
            tqdm(total=len(source), initial=files.done, unit="image", disable=None)
        )
        saved = time.monotonic()
        for rows, names in _computed(settings, network, source, files.done):
            files.append(rows, names)
            bar.update(files.done - bar.n)
            if time.monotonic() - saved > _SAVE_EVERY:
                workdirs.write_json(partial / _PROGRESS, {**files.progress(), "asked": asked})
                saved = time.monotonic()
        files.progress()
        _publish(
            partial, folder, {**asked, "source": source.name, "class_names": source.class_names}
        )
    logger.info("%s: %s records", folder, f"{len(source):,}")


def _publish(partial: Path, folder: Path, card: Mapping[str, Any]) -> None:
    """Give the finished folder its name."""
    workdirs.write_json(partial / _CARD, card)
    (partial / _PROGRESS).unlink(missing_ok=True)
    partial.replace(folder)


def _computed(
    settings: ConfigDict, network: Bundle, source: Source, start: int
) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """Yield what comes of each batch from a record on: see ``_Files.append``."""
    rest = Selection(source, np.arange(start, len(source))) if start else source
    if not len(rest):
        return
    layers = resolve_layers(settings.eval.layers, network.model)
    extract = network.extractor(layers, settings.eval.max_features)
    batches = pipeline.eval_batches(
        rest,
        network.transform,
        batch_size=settings.eval.batch_size,
        threads=settings.data.threads,
        workers=settings.data.workers,
        prefetch=settings.data.prefetch,
        timeout=settings.data.timeout,
    )

    def finished(
        batch: Mapping[str, Any], output: Mapping[str, jax.Array]
    ) -> tuple[dict[str, np.ndarray], list[str]]:
        length = int(np.sum(batch["index"] >= 0))  # the last batch is padded
        rows = {"index": batch["index"][:length] + start, "label": batch["label"][:length]}
        bad = batch["weight"][:length] == 0
        for layer, x in output.items():
            rows[layer] = np.asarray(x[:length], np.float32).reshape(length, -1)
            rows[layer] = np.where(bad[:, None], np.float32(np.nan), rows[layer])
        return rows, batch["name"][:length]

    with closing(batches):
        for batch, output in computed(extract, batches):
            yield finished(batch, output)


class _Files:
    """The files of one split, which grow together."""

    def __init__(self, folder: Path, count: int, progress: Mapping[str, Any], stack: ExitStack):
        self._folder, self._count, self._stack = folder, count, stack
        self._columns: dict[str, _Column] = {}
        self.done: int = progress["done"]
        self._names = stack.enter_context(_opened(folder / _NAMES, progress["names"]))

    def append(self, rows: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        """Add some records: "index" and "label" int32[n], each layer float32[n, F]; their names."""
        for name, values in rows.items():
            if name not in self._columns:
                path, shape = self._folder / f"{name}.npy", (self._count, *values.shape[1:])
                column = _Column(path, shape, values.dtype, self.done)
                self._columns[name] = self._stack.enter_context(closing(column))
            self._columns[name].append(values)
        self._names.write("".join(json.dumps(name) + "\n" for name in names).encode())
        self.done += len(names)

    def progress(self) -> dict[str, Any]:
        """See that all is on disk, and return where a run that is killed now can go on."""
        for column in self._columns.values():
            column.sync()
        self._names.flush()
        os.fsync(self._names.fileno())
        return {"done": self.done, "names": self._names.tell()}


class _Column:
    """An .npy file that is written from its first row to its last."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, done: int):
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        with path.open("ab" if done else "wb") as file:
            if not done:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
        self._file = _opened(path, begin + done * int(np.prod(shape[1:])) * dtype.itemsize)

    def append(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows))

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _opened(path: Path, length: int) -> Any:
    """Open a file to append behind its first bytes; what comes after them is lost."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(length)
    file.seek(length)
    return file
