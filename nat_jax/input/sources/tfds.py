"""Data sets prepared by TensorFlow Datasets as array_record files, read without TensorFlow."""

import difflib
import os
import re
from pathlib import Path

from nat_jax.errors import InputError
from nat_jax.input.sources.array_record import ArrayRecordSource, open_split
from nat_jax.input.sources.metadata import INFO, read_json, read_metadata

_FORMAT = "array_record"


def open_tfds(argument: str, split: str) -> ArrayRecordSource:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, already prepared as array_record.

    Looks in the folder that the environment variable TFDS_DATA_DIR names, or in
    ~/tensorflow_datasets. Never downloads and never imports TensorFlow.

    Raises:
        ValueError: the data set is unknown, not prepared, prepared as another format, or has no
            images; the message holds the command that prepares it.
    """
    data_set, _, version = argument.partition(":")
    data_dir = (
        Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser().absolute()
    )
    found = [
        path.parent
        for pattern in (f"*/{INFO}", f"*/*/{INFO}")
        for path in (data_dir / data_set).glob(pattern)
    ]
    prepared = [path for path in found if version in ("", path.name)]
    if not prepared:
        there = ", ".join(sorted(path.name for path in found))
        why = f" in version {version}; prepared: {there}" if found else _unknown(data_set)
        raise _not_prepared(f"{data_set} is not prepared in {data_dir}{why}", data_set, data_dir)
    parents = sorted({path.parent for path in prepared})
    if len(parents) > 1:
        configs = ", ".join(f"tfds:{p.relative_to(data_dir).as_posix()}" for p in parents)
        raise InputError(
            f"tfds: {data_set} is prepared in several configurations; name one: {configs}"
        )
    directory = max(prepared, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
    name = f"tfds:{argument}"
    info = read_json(directory / INFO)
    main_format = info.get("fileFormat") or "tfrecord"
    formats = [main_format, *info.get("alternativeFileFormats", ())]
    metadata = read_metadata(directory, name) if _FORMAT in formats else None
    if metadata is None:
        what = "without features.json" if _FORMAT in formats else f"as {main_format}"
        raise _not_prepared(f"{directory} is prepared {what}", data_set, data_dir)
    fields, splits = metadata
    return open_split(name, split, splits, fields, may_hold_out=False)


def _unknown(data_set: str) -> str:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = data_set.partition("/")[0]
    if base in known:
        return ""
    close = ", ".join(difflib.get_close_matches(base, known)) or "none with a similar name"
    return f", and TFDS does not know that name (known: {close})"


def _not_prepared(reason: str, data_set: str, data_dir: Path) -> InputError:
    by_hand = ""
    if data_set.startswith("imagenet2012"):
        archives = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
        by_hand = f"put {archives} into {data_dir}/downloads/manual, then "
    return InputError(
        f"tfds: {reason} (set TFDS_DATA_DIR if it is elsewhere); nothing is downloaded unasked. "
        f'Prepare it once as {_FORMAT}: {by_hand}python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{data_set}', data_dir='{data_dir}', file_format='{_FORMAT}')"
        '.download_and_prepare()" (some data sets need TensorFlow for this step, never for '
        "training). Or read images with --config.data.source=folder:PATH or arrays:PATH, or try "
        "the embedded demo, --config=configs/digits.py"
    )
