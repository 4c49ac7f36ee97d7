"""A run's folder: what may change when it is used again, and its JSON files."""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import schema
from nat_jax.errors import InputError
from nat_jax.runtime import atomic_files

logger = logging.getLogger(__name__)

# Lengths may grow: "more epochs" extends a finished run.
LENGTHS = ("epochs", "steps")
_WRITTEN_TO = ("checkpoints", "results", "pictures")  # folders of a run


def training(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Return the flat keys of a config, or of a saved one, that decide what is trained."""
    flat = configs.flatten_saved(config)
    return {key: value for key, value in flat.items() if schema.kind_of(key) == schema.TRAINING}


def of_run(saved: Mapping[str, Any], asked: ConfigDict) -> ConfigDict:
    """Return the config of a task that uses a run.

    Args:
        saved: the run's config, as JSON has it; model, targets and data are taken from it.
        asked: the task's config; keys of evaluation, and how data is read, are taken from it.

    Raises:
        InputError: the run has a key that this version does not know.
    """
    config = configs.default()
    for key, value in configs.flatten_saved(saved).items():
        if not _from_command_line(key):
            configs.put(config, key, value)
    for key, value in configs.flatten(asked).items():
        if _from_command_line(key):
            configs.put(config, key, value)
    return config


def _from_command_line(key: str) -> bool:
    """Return whether a task that uses a run takes a key from its own command line.

    Where the run's data lies is in its config; a task may be told another place, see ``evaluate``.
    """
    return schema.kind_of(key) in (schema.EVALUATION, schema.PER_HOST) and key != "data.source"


def seed_folder(config: ConfigDict, workdir: Path, seed: int) -> Path:
    """Return the folder of a seed's run: the workdir itself if there is one seed only."""
    return workdir if len(config.seeds) == 1 else workdir / f"seed-{seed}"


def check(workdir: Path, config: ConfigDict) -> None:
    """Check that a workdir can be written to and that what it holds, if anything, is this run.

    A folder in which no checkpoint was ever saved has nothing to lose and is taken over.

    Raises:
        InputError: see ``check_same_run``; or the folder cannot be used.
    """
    if address := re.match(r"[a-z][a-z0-9+.-]+:/", str(workdir)):
        raise InputError(
            f"--workdir: expected a folder; got {address[0]}/... To keep a run in a bucket, mount "
            "it (Cloud Storage FUSE, for instance) and give the path of the mount"
        )
    check_writable(workdir, "--workdir", "Choose another")
    for place in (workdir, *sorted(workdir.glob("seed-*"))):
        for name in _WRITTEN_TO:
            check_writable(place / name, "--workdir", "Choose another")
    workdir.mkdir(parents=True, exist_ok=True)
    saved = read_json(workdir / "config.json")
    if saved is None or not any(workdir.glob("**/checkpoints/[0-9]*")):
        return
    check_same_run(saved, config, workdir)
    old, new = training(saved), training(config)
    for key in LENGTHS:
        if new[key] != old[key] and config.optim.schedule == "cosine":
            logger.warning(
                "%s: %s grows from %s to %s, and the cosine schedule with it: the learning rate "
                "jumps up, and the run equals neither a short nor a long one",
                workdir,
                key,
                old[key],
                new[key],
            )


def check_writable(folder: Path, key: str, advice: str) -> None:
    """Check that a folder can be written to, or be made; nothing is changed.

    Raises:
        InputError: it cannot; the message begins with the key and ends with the advice.
    """
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(f"{there} is a file")
        if not os.access(there, os.W_OK):
            raise PermissionError(f"{there} is not writable")
    except OSError as error:
        raise InputError(f"{key}: cannot use {folder}: {error}. {advice}") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if there is no file.

    Raises:
        InputError: it cannot be read, or is damaged.
    """
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}. Restore or delete this file") from error


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    atomic_files.write(path, atomic_files.as_json(value))


def check_same_run(saved: Mapping[str, Any], config: ConfigDict, workdir: Path) -> None:
    """Check that a workdir's config and this one describe the same training.

    Only keys of kind "training" must be equal, and the run may become longer. The checkpoint, which
    holds the data's fingerprint, shows whether the data is the same.

    Raises:
        InputError: naming the first other key, both values, and the way out.
    """
    for key, old, new in other_training(saved, config):
        if key in LENGTHS and 0 < (old or 0) < new:
            continue
        raise InputError(
            f"{workdir} holds a run with {key} = {old!r}; this one has {new!r}. "
            "Choose another folder with --workdir=..., or set the key back"
        )


def answers(saved: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> bool:
    """Return whether a saved result was computed for the same inputs.

    Args:
        saved: the inputs that were saved with the result; None if there is no result.
        asked: the inputs now; "training" as the function ``training`` returns it.
    """
    if saved is None:
        return False
    older = {**saved, "training": _with_defaults(saved.get("training", {}))}
    return all(older.get(key) == value for key, value in asked.items())


def _with_defaults(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved training keys, with the defaults of keys that did not exist yet."""
    return {**training(configs.default()), **training(flat)}


def other_training(saved: Mapping[str, Any], config: ConfigDict) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, saved value, this value) of the training keys in which two configs differ."""
    old, new = _with_defaults(training(saved)), training(config)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)
