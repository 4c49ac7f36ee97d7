"""The images of ``benchmarks/input_pipeline.py``, laid out in every way that nat_jax reads.

From two archives of real photographs in a folder:

    voc2007_subset.zip   700 JPEG files of about 500 x 375 pixels, ImageNet's usual size
    imagenette_like.zip  2,370 JPEG files of 224 x 224 pixels

Each becomes a tree of class folders with train/ and val/, the same as a .zip, as array_record
files (converted by nat_jax's own command) and as a data set that TFDS prepared. What exists is used
again.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_CLASSES = 20
_VERSION = "1.0.0"

_BUILDER = '''
import pathlib
import sys
import tensorflow_datasets as tfds

ROOT = pathlib.Path(sys.argv[1])


class Builder(tfds.core.GeneratorBasedBuilder):
    """{name}, as a data set of TFDS."""

    VERSION = tfds.core.Version("{version}")

    def _info(self):
        names = sorted(path.name for path in (ROOT / "train").iterdir())
        features = {{
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=names),
            "file_name": tfds.features.Text(),
        }}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {{"train": self._files("train"), "validation": self._files("val")}}

    def _files(self, split):
        for path in sorted((ROOT / split).glob("*/*")):
            name = f"{{path.parent.name}}/{{path.name}}"
            yield name, {{"image": str(path), "label": path.parent.name, "file_name": path.name}}

    def _generate_examples(self):
        raise NotImplementedError
'''

_PREPARE = """
import sys
from {name}.{name}_dataset_builder import Builder
Builder(data_dir=sys.argv[2], file_format="array_record").download_and_prepare()
"""


class Photos(NamedTuple):
    """One set of photographs.

    Attributes:
        name: "photos500" or "photos224".
        folder: with train/ and val/, of class folders.
        sources: what nat_jax opens, by kind.
        skipped: for each kind that is missing, why.
    """

    name: str
    folder: Path
    sources: dict[str, str]
    skipped: dict[str, str]

    @property
    def train_files(self) -> list[Path]:
        """The training files, in the order of their names."""
        return sorted((self.folder / "train").glob("*/*"))


def prepare(data: Path, scratch: Path, *, copies: int) -> list[Photos]:
    """Lay out both sets.

    Args:
        data: the folder of the archives.
        scratch: where to put them.
        copies: of each large photograph, so that they do not all fit into a processor's cache.
    """
    os.environ["TFDS_DATA_DIR"] = str(scratch / "tfds")
    os.environ["NAT_JAX_CACHE"] = str(scratch / "cache")
    found = []
    for name, archive, extract in (
        ("photos500", "voc2007_subset.zip", lambda z, to: _extract_voc(z, to, copies)),
        ("photos224", "imagenette_like.zip", _extract_tree),
    ):
        folder = scratch / (f"{name}x{copies}" if name == "photos500" else name)
        if not folder.exists():
            half = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(half, ignore_errors=True)
            with zipfile.ZipFile(data / archive) as opened:
                extract(opened, half)
            half.rename(folder)
        found.append(_lay_out(name, folder, scratch))
    return found


def tfds_directory(source: str) -> Path:
    """Return the folder of the shards of "tfds:NAME"."""
    return Path(os.environ["TFDS_DATA_DIR"], source.partition(":")[2], _VERSION)


def _write(files: Iterable[tuple[str, bytes]], folder: Path) -> None:
    for name, image in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)


def _extract_voc(archive: zipfile.ZipFile, folder: Path, copies: int) -> None:
    """Write the photographs of a VOC archive into made-up classes, one in ten into val/."""
    names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
    for number, name in enumerate(names):
        image, stem = archive.read(name), Path(name).stem
        split = "val" if number // _CLASSES % 10 == 0 else "train"
        place = f"{split}/class{number % _CLASSES:02}"
        _write(((f"{place}/{stem}_{copy}.jpg", image) for copy in range(copies)), folder)


def _extract_tree(archive: zipfile.ZipFile, folder: Path) -> None:
    names = [name for name in archive.namelist() if name.endswith(".JPEG")]
    _write(((name, archive.read(name)) for name in names), folder)


def _lay_out(name: str, folder: Path, scratch: Path) -> Photos:
    sources, skipped = {"folder": f"folder:{folder}"}, {}
    archive = folder.with_suffix(".zip")
    if not archive.exists():
        half = archive.with_suffix(".part")
        with zipfile.ZipFile(half, "w", zipfile.ZIP_STORED) as opened:
            for path in sorted(folder.glob("*/*/*")):
                opened.write(path, path.relative_to(folder))
        half.rename(archive)
    sources["zip"] = f"folder:{archive}"
    for kind, make in (("arrayrecord", _convert), ("tfds", _prepare_tfds)):
        source, fault = make(folder, scratch)
        if fault:
            skipped[kind] = fault
            print(f"{name} without {kind}: {fault}", file=sys.stderr)
        else:
            sources[kind] = source
    return Photos(name, folder, sources, skipped)


def _convert(folder: Path, scratch: Path) -> tuple[str, str]:
    """Convert with nat_jax's command; return the source, and what went wrong."""
    to = scratch / f"{folder.name}_array_record"
    if not to.exists():
        half = to.with_name(f"{to.name}.part")
        shutil.rmtree(half, ignore_errors=True)
        arguments = (
            f"--config={ROOT / 'configs' / 'alexnet.py'}",
            f"--workdir={scratch / 'convert'}",
            "--config.task=convert",
            f"--config.data.source=folder:{folder}",
            f"--config.convert.to={half}",
        )
        fault = _run([sys.executable, "-m", "nat_jax.main", *arguments])
        if fault:
            return "", fault
        half.rename(to)
    return f"arrayrecord:{to}", ""


def _prepare_tfds(folder: Path, scratch: Path) -> tuple[str, str]:
    """Let TFDS prepare the images, without TensorFlow; return the source, and what went wrong."""
    name, to = folder.name, scratch / "tfds"
    if not (to / name / _VERSION).exists():
        code = scratch / "tfds_code"
        (code / name).mkdir(parents=True, exist_ok=True)
        (code / name / "__init__.py").touch()
        (code / name / f"{name}_dataset_builder.py").write_text(
            _BUILDER.format(name=name, version=_VERSION)
        )
        command = [sys.executable, "-c", _PREPARE.format(name=name), str(folder), str(to)]
        fault = _run(command, code)
        if fault:
            return "", fault
    return f"tfds:{name}", ""


def _run(command: list[str], code: Path = ROOT) -> str:
    """Run a program; return the last line it said if it failed."""
    environment = {**os.environ, "PYTHONPATH": str(code), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=code)
    if not done.returncode:
        return ""
    said = (done.stderr or done.stdout).strip().splitlines()
    return said[-1] if said else f"exit code {done.returncode}"
