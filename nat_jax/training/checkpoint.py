"""Checkpoints: the only module that uses orbax.

A checkpoint is the training state and a JSON record. Orbax writes both in the background into a
temporary folder and renames it when all is on disk, so a killed save leaves the older checkpoints
as they were. Orbax does not notice a flipped bit in array data: the record therefore holds a digest
of every leaf, and a checkpoint that does not match is never restored. The state is hashed on the
host before its save continues in the background, and after it is restored. What grows with the data
set, the assignment and the features kept for it, is hashed shard by shard and never gathered, as
the assignment is proven to be a permutation (``nat_jax.training.assignment_state``).
"""

import hashlib
import json
import logging
import re
import shutil
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nat_jax.errors import InputError, UserError, some_of
from nat_jax.runtime import consistency, sharding
from nat_jax.training import assignment_state

PyTree = Any

logger = logging.getLogger(__name__)

# What file systems and tensorstore say of a full disk.
_FULL = re.compile(r"No space left|quota exceeded|RESOURCE_EXHAUSTED: .*writ", re.IGNORECASE)

# Version of the JSON record; raised when its meaning changes.
_FORMAT = 2

# Orbax's name for an incomplete checkpoint, which it removes at the next save only.
_LEFTOVERS = "*.orbax-checkpoint-tmp*"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint cannot be written, read, or used by this run."""


class _Damaged(CheckpointError):
    """The files on disk do not match what was saved; an older checkpoint may be good."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own query for preemption, which the training loop makes.

    Orbax queries JAX's runtime too, from its background thread with the steps of older saves. The
    runtime lets the processes stop at the step after the last one queried: at one that has passed,
    then, and none would stop (seen with two processes).
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, newest kept.

    Every process of a run makes the same calls in the same order.
    """

    def __init__(self, directory: Path, *, keep: int = 2, read_only: bool = False) -> None:
        """Open a folder of checkpoints; create it, and remove what killed saves left in it.

        Args:
            directory: of the checkpoints; made absolute here.
            keep: number of newest checkpoints to keep; an older one is removed only when a newer
                one is complete. From 2 on the run survives a damaged newest checkpoint.
            read_only: change nothing on disk: another process may be training here.

        Raises:
            InputError: if ``keep`` is less than 1.
            CheckpointError: if the folder cannot be used.
        """
        if keep < 1:
            raise InputError(f"checkpoint.keep: expected at least 1; got {keep}")
        self._directory = Path(directory).absolute()
        self._saving: int | None = None  # step of the last save, which may be under way
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep, create=not read_only
        )
        try:
            if not read_only:
                self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0 and not read_only:
                for leftover in self._directory.glob(_LEFTOVERS):
                    shutil.rmtree(leftover, ignore_errors=True)  # orbax tries again
            self._manager = _Manager(self._directory, options=options)
        except Exception as error:
            raise CheckpointError(
                f"cannot use {self._directory} for checkpoints: {error}"
            ) from error

    def latest_step(self) -> int | None:
        """Return the newest step that is saved or being saved; None when there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> None:
        """Start to save a state; returns as soon as the state is copied to the host.

        Saving the newest step again does nothing, so that a last save needs no check.

        Args:
            step: number of finished training steps; larger than any saved before.
            state: pytree of arrays; its top level holds ``assignment`` int32[N].
            meta: JSON values, returned by ``restore``.

        Raises:
            InputError: if ``state`` has no ``assignment``, or it is not a permutation.
            CheckpointError: if this save, or the one before it, fails.
        """
        if step == self.latest_step():
            return
        leaves = _named_leaves(state)
        if "assignment" not in leaves:
            raise InputError(
                f"state to save: expected a top-level leaf 'assignment'; got {sorted(leaves)}"
            )
        error = assignment_state.permutation_error(leaves["assignment"])
        if not consistency.all_true(error is None):
            raise InputError(
                f"state to save at step {step}: 'assignment' is not a permutation: "
                f"{error or 'in another process'}; nothing was saved"
            )
        record = {
            "format": _FORMAT,
            "meta": _as_json(meta),
            "num_records": int(leaves["assignment"].size),
            "leaves": {
                name: _describe(leaf) | {"digest": _digest(name, leaf)}
                for name, leaf in leaves.items()
            },
        }
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            record=ocp.args.JsonSave({"record": record, "sha256": _json_digest(record)}),
        )
        self.wait()  # as orbax does in save, where its error would seem to be that of this step
        self._saving = step
        try:
            saved = self._manager.save(step, args=items)
        except Exception as error:
            raise self._cannot_save(error) from error
        if not saved:
            raise self._error(
                step, f"was not saved: the newest one there is of step {self.latest_step()}"
            )

    def restore(
        self, abstract_state: PyTree, *, expect: Mapping[str, Any]
    ) -> tuple[PyTree, dict[str, Any]]:
        """Restore the newest good checkpoint, onto any number of devices.

        A damaged newer checkpoint is reported in a warning and renamed to ``<step>.damaged``, so
        that training can go on from the older one.

        Args:
            abstract_state: the state's pytree with a ``jax.ShapeDtypeStruct`` at every leaf,
                whose sharding the leaf gets.
            expect: entries that the checkpoint's ``meta`` must equal.

        Returns:
            The state and the ``meta`` it was saved with.

        Raises:
            CheckpointError: if there is no checkpoint, none is good, or the newest readable one
                differs from ``expect`` or from the shapes of ``abstract_state``.
        """
        self.wait()

        def read(step: int) -> tuple[PyTree, dict[str, Any]]:
            record = self._read_record(step)
            self._check_meta(step, record["meta"], expect)
            self._check_leaves(step, record["leaves"], _named_leaves(abstract_state))
            how = ocp.args.StandardRestore(abstract_state)
            state = self._read_state(step, record["leaves"], how)
            error = assignment_state.permutation_error(_named_leaves(state)["assignment"])
            self._raise_damaged(step, error and f"'assignment' is not a permutation: {error}")
            return state, record["meta"]

        (state, meta), step, damaged = self._newest_good(read)
        if damaged:
            self._set_aside(damaged)
            logger.warning("restored the older checkpoint of step %d instead", step)
        return state, meta

    def restore_parts(self, abstract: Mapping[str, PyTree]) -> tuple[Any, int, dict[str, Any]]:
        """Restore some parts of the newest good state, and change nothing on disk.

        Args:
            abstract: by their names at the state's top level, pytrees with a
                ``jax.ShapeDtypeStruct`` at every leaf, whose sharding it gets.

        Returns:
            The parts by name, the step they were saved at, and the ``meta`` saved with them.

        Raises:
            CheckpointError: there is no checkpoint, none is good, or the newest readable one has
                other shapes.
        """
        prefixes = tuple(f"{name}/" for name in abstract)

        def read(step: int) -> tuple[Any, dict[str, Any]]:
            record = self._read_record(step)
            saved = {n: leaf for n, leaf in record["leaves"].items() if n.startswith(prefixes)}
            self._check_leaves(step, saved, _named_leaves(abstract))
            places = ocp.checkpoint_utils.construct_restore_args(abstract)
            how = ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=True)
            return self._read_state(step, saved, how), record["meta"]

        (parts, meta), step, _ = self._newest_good(read)
        return parts, step, meta

    def _newest_good(self, read: Callable[[int], Any]) -> tuple[Any, int, list[int]]:
        """Return what ``read`` returns of the newest good checkpoint, its step, the damaged ones.

        Raises:
            CheckpointError: there is no checkpoint, none is good, or ``read`` raises it.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return read(step), step, list(damaged)
            except _Damaged as error:
                logger.warning("%s; trying an older one", error)
                damaged[step] = str(error)
        if not damaged:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        raise CheckpointError(
            "no usable checkpoint: " + "; ".join(damaged.values()) + ". Nothing was changed on "
            "disk; restore the files from a copy, or start again with another workdir"
        )

    def digests(self) -> dict[str, str]:
        """Return a digest of every leaf of the newest checkpoint, by the leaf's name.

        Raises:
            CheckpointError: there is no checkpoint, or its record is damaged.
        """
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"no checkpoint in {self._directory}")
        leaves = self._read_record(step)["leaves"]
        return {name: leaf["digest"] for name, leaf in leaves.items()}

    def wait(self) -> None:
        """Wait until a running save is on disk.

        Raises:
            CheckpointError: if it failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._cannot_save(error) from error

    def close(self) -> None:
        """Wait for a running save, then release the background threads.

        Raises:
            CheckpointError: the save failed.
        """
        self.wait()
        try:
            self._manager.close()
        except Exception as error:
            raise self._cannot_save(error) from error

    def _read_record(self, step: int) -> dict[str, Any]:
        reason = None
        try:
            item = self._manager.restore(
                step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
            ).record
            if item["sha256"] != _json_digest(item["record"]):
                reason = "its JSON record does not match its checksum"
        except Exception as error:
            reason = f"its JSON record is unreadable ({_first_line(error)})"
        self._raise_damaged(step, reason)
        if (there := item["record"].get("format", 1)) != _FORMAT:
            raise self._error(
                step,
                f"was written by another version of nat_jax (format {there}; this one reads "
                f"{_FORMAT}). Go on with that version, or use another workdir",
            )
        return item["record"]

    def _read_state(
        self, step: int, saved: Mapping[str, Any], how: ocp.args.CheckpointArgs
    ) -> PyTree:
        """Read arrays and compare them with the digests of the ``saved`` leaves."""
        state = reason = None
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=how)).state
        except Exception as error:
            reason = f"its arrays are unreadable ({_first_line(error)})"
        self._raise_damaged(step, reason)  # all processes must agree before the collectives below
        leaves = _named_leaves(state)
        for name, leaf in saved.items():
            if _digest(name, leaves[name]) != leaf["digest"]:
                reason = f"{name!r} does not match its checksum"
        self._raise_damaged(step, reason)
        return state

    def _raise_damaged(self, step: int, reason: str | None) -> None:
        if not consistency.all_true(reason is None):
            raise _Damaged(str(self._error(step, f"is damaged: {reason or 'in another process'}")))

    def _check_meta(self, step: int, meta: Mapping[str, Any], expect: Mapping[str, Any]) -> None:
        expected = _as_json(expect)
        wrong = [
            f"{key}: checkpoint {json.dumps(meta.get(key))}, this run {json.dumps(value)}"
            for key, value in expected.items()
            if key not in meta or meta[key] != value
        ]
        if wrong:
            raise self._error(
                step,
                f"belongs to another run ({'; '.join(wrong)}). "
                "Use the settings it was made with, or another workdir",
            )

    def _check_leaves(self, step: int, saved: Mapping[str, Any], wanted: dict[str, Any]) -> None:
        wrong = []
        for name in sorted(saved.keys() | wanted.keys()):
            there = _shape_text(saved[name]) if name in saved else "nothing"
            here = _shape_text(_describe(wanted[name])) if name in wanted else "nothing"
            if there != here:
                wrong.append(f"{name}: checkpoint {there}, this run {here}")
        if wrong:
            raise self._error(
                step,
                f"has another model or state ({some_of(wrong, 5, '; ')}). "
                "Use the settings it was made with, or another workdir",
            )

    def _set_aside(self, steps: list[int]) -> None:
        """Rename damaged checkpoints, so that their steps can be saved again."""
        if jax.process_index() == 0:
            for step in steps:
                target = self._directory / f"{step}.damaged"
                number = 1
                while target.exists():
                    number += 1
                    target = self._directory / f"{step}.damaged-{number}"
                (self._directory / str(step)).rename(target)
        consistency.wait_for_all("damaged checkpoints set aside")
        self._manager.reload()

    def _cannot_save(self, error: Exception) -> CheckpointError:
        full = _FULL.search(str(error))
        reason = "the disk is full" if full else _first_line(error)
        kept = self._manager.latest_step()
        from_there = f" from step {kept}, whose checkpoint is complete" if kept else ""
        return CheckpointError(
            f"checkpoint of step {self._saving} in {self._directory} cannot be saved: {reason}. "
            f"{'Make room' if full else 'Remove the cause'}, and the same command line goes on"
            f"{from_there}"
        )

    def _error(self, step: int, what: str) -> CheckpointError:
        return CheckpointError(f"checkpoint of step {step} in {self._directory} {what}")


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a record is more than an error that Orbax raises as well."""
    lines = traceback.format_exception(*record.exc_info) if record.exc_info else ()
    return not any("orbax" in line for line in lines)


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_is_news)


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> dict[str, Any]:
    return {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _digest(name: str, leaf: Any) -> str:
    if name in ("assignment", "features"):
        return f"{assignment_state.checksum(leaf):016x}"
    # reshape first: a uint8 view needs a last axis, which a scalar has not
    data = np.ascontiguousarray(sharding.to_host(leaf)).reshape(-1).view(np.uint8)
    return hashlib.sha256(data.data).hexdigest()


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` as they are when read back from JSON: lists for tuples, text for keys."""
    return json.loads(json.dumps(dict(values)))


def _json_digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _shape_text(described: Mapping[str, Any]) -> str:
    return f"{described['dtype']}{described['shape']}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
