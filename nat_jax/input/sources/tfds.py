"""Data sets prepared by TensorFlow Datasets as array_record files, read without TensorFlow."""

import difflib
import os
from pathlib import Path

from nat_jax.errors import InputError
from nat_jax.input.sources.array_record import ArrayRecordSource, open_prepared
from nat_jax.input.sources.metadata import FEATURES, FORMAT, INFO, read_info


def open_tfds(argument: str, split: str) -> ArrayRecordSource:
    """Open `tfds:NAME[/CONFIG][:VERSION]`, already prepared as array_record.

    Looks in the folder that the environment variable TFDS_DATA_DIR names, or in
    ~/tensorflow_datasets. Never downloads and never imports TensorFlow.

    Raises:
        ValueError: the data set is unknown, not prepared, prepared as another format, or has no
            images; the message holds the command that prepares it.
    """
    name, _, version = argument.partition(":")
    data_dir = (
        Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser().absolute()
    )
    prepared = [
        path.parent
        for pattern in (f"*/{INFO}", f"*/*/{INFO}")
        for path in (data_dir / name).glob(pattern)
    ]
    if not prepared:
        raise InputError(_not_prepared(name, data_dir))
    parents = sorted({p.parent for p in prepared})
    if len(parents) > 1:
        configs = ", ".join(f"tfds:{p.relative_to(data_dir).as_posix()}" for p in parents)
        raise InputError(f"tfds: {name} is prepared in several configurations; name one: {configs}")
    if version:
        matching = [p for p in prepared if p.name == version]
        if not matching:
            found = ", ".join(sorted(p.name for p in prepared))
            raise InputError(
                f"tfds: {name} is not prepared in version {version}; prepared: {found}"
            )
        prepared = matching
    directory = max(prepared, key=_version_number)
    return _open_directory(directory, name, data_dir, f"tfds:{argument}", split)


def _open_directory(
    directory: Path, data_set: str, data_dir: Path, name: str, split: str
) -> ArrayRecordSource:
    info = read_info(directory)
    main_format = info.file_format or "tfrecord"
    formats = {main_format, *info.alternative_file_formats}
    if FORMAT not in formats or not (directory / FEATURES).exists():
        what = "by an old TFDS, without features.json" if FORMAT in formats else f"as {main_format}"
        why = "" if FORMAT in formats else ", which only TensorFlow reads"
        raise InputError(
            f"tfds: {directory} is prepared {what}{why}; "
            f"prepare it once more as {FORMAT}: {_command(data_set, data_dir)}"
        )
    return open_prepared(directory, split, name)


def _version_number(directory: Path) -> tuple[int, ...]:
    return tuple(int(n) if n.isdigit() else -1 for n in directory.name.split("."))


def _not_prepared(name: str, data_dir: Path) -> str:
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    base = name.partition("/")[0]
    if base not in known:
        close = ", ".join(difflib.get_close_matches(base, known)) or "none with a similar name"
        return (
            f"tfds: no data set {name!r} in {data_dir}, and TFDS does not know that name "
            f"(known: {close}); set TFDS_DATA_DIR if it is prepared in another folder"
        )
    return (
        f"tfds: {name} is not prepared in {data_dir} (set TFDS_DATA_DIR if it is elsewhere); "
        f"nothing is downloaded unasked. Prepare it once: {_command(name, data_dir)}. Or read the "
        "images from a folder or a zip, --config.data.source=folder:PATH (or arrays:PATH); or try "
        "the embedded demo, --config=configs/digits.py"
    )


def _command(name: str, data_dir: Path) -> str:
    by_hand = (
        f"put ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {data_dir}/downloads/manual,"
        " then "
    )
    return (by_hand if name.startswith("imagenet2012") else "") + (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{data_dir}', file_format='{FORMAT}')"
        '.download_and_prepare()" (some data sets need TensorFlow installed for this step, never '
        "for training)"
    )
