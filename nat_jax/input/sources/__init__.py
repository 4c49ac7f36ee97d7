"""Where images come from: the embedded digits, folders, arrays, array_record files and TFDS."""

import os

from nat_jax.errors import InputError
from nat_jax.input.sources.array_record import open_array_record
from nat_jax.input.sources.arrays import open_arrays
from nat_jax.input.sources.digits import open_digits
from nat_jax.input.sources.folder import open_folder
from nat_jax.input.sources.source import SPLITS, Opener, Record, Source, UnreadableRecord
from nat_jax.input.sources.subset import first_of_class
from nat_jax.input.sources.tfds import open_tfds

__all__ = ["SOURCES", "Record", "Source", "UnreadableRecord", "open_source"]

SOURCES: dict[str, Opener] = {
    "digits": open_digits,
    "folder": open_folder,
    "arrays": open_arrays,
    "tfds": open_tfds,
    "arrayrecord": open_array_record,
}
_ARGUMENTS = {"digits": "", "tfds": "NAME", "arrayrecord": "GLOB"}  # PATH for the others


def open_source(spec: str, split: str = "train", *, per_class: int = 0) -> Source:
    """Open a source of images.

    Args:
        spec: "digits" (embedded), "folder:PATH" (a tree of image files or a .zip),
            "arrays:PATH" (.npz, or a folder of idx files), "tfds:NAME[:VERSION]" (prepared) or
            "arrayrecord:GLOB" (shards by a pattern, a file, or a folder of them).
        split: "train" or "test".
        per_class: of the training split only the first so many records of each class; 0: all.

    Returns:
        A `Source` of that split.

    Raises:
        ValueError: the source is unknown, missing or malformed; the message tells how to fix it.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    kind, _, argument = spec.partition(":")
    if kind not in SOURCES:
        forms = {k: _ARGUMENTS.get(k, "PATH") for k in SOURCES}
        known = ", ".join(f"{k}:{what}" if what else k for k, what in forms.items())
        hint = ""
        if os.path.exists(os.path.expanduser(spec)):
            hint = f"; did you mean folder:{spec} or arrays:{spec}?"
        elif kind in ("tar", "zip"):
            hint = "; a .zip is read by folder:PATH; unpack a .tar, and name the folder"
        elif "/" in spec:
            hint = f"; there is no {spec}, and what it is stands before a path, as in folder:PATH"
        raise InputError(f"unknown source {spec!r}; known: {known}{hint}")
    if not argument and kind != "digits":
        wanted = _ARGUMENTS.get(kind, "PATH")
        raise InputError(f"source {spec!r} lacks its {wanted}: write {kind}:{wanted}")
    source = SOURCES[kind](argument, split)
    return first_of_class(source, per_class) if per_class and split == "train" else source
