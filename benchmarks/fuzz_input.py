"""Open very many folders, zips and array files as people have them; compare with a plain reading.

    python benchmarks/fuzz_input.py --cases 2000 --output docs/results/fuzz_input.json
    python benchmarks/fuzz_input.py --seed 1234 --cases 1

A case (``input_cases.py``) is a random tree, zip, array file or file under a wrong name: splits and
classes in many spellings, wrappers, flat folders, several splits, folders of systems, odd suffixes
and member names, labels of all kinds, broken images. ``plain_reading.py`` tells from "Layouts" in
docs/data.md which records, splits and classes it has. A start must read just these, with the pixels
that were written, and log what it leaves out; or end with one message where the page says so. Every
tenth case also trains two steps and is judged, at times with its workdir in the folder of images,
from which it is then started again.

A case that fails is printed with its seed and its files; `--seed SEED --cases 1` makes it again.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax starts
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure
import numpy as np
from input_cases import TRAINED, Case
from ml_collections import ConfigDict
from plain_reading import Reading

from nat_jax import config as configs
from nat_jax.errors import UserError
from nat_jax.evaluate.evaluator import Evaluator
from nat_jax.input.decode import BadImage, open_picture
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Source
from nat_jax.input.transforms import decode_and_crop, eval_transform
from nat_jax.train import train_and_evaluate
from nat_jax.training.setup import make_model, open_sources

BATCH, STEPS, SIZE = 8, 2, 8
TOLERANCE = 6  # grey levels, of JPEG
LOGGER = logging.getLogger("nat_jax")


class Log(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line."""
        self.text += record.getMessage() + "\n"


@contextlib.contextmanager
def started(case: Case) -> Iterator[Log]:
    """Keep the log, print nothing, and let no folder be listed that cannot be, even by root."""
    scandir, log = os.scandir, Log()
    locked = {str(case.root / folder) for folder in case.locked}

    def refusing(path: Any = ".") -> Any:
        if f"{path}".rstrip("/") in locked:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    out = contextlib.redirect_stdout(io.StringIO())
    err = contextlib.redirect_stderr(io.StringIO())
    level, LOGGER.propagate = LOGGER.level, False
    LOGGER.setLevel(logging.INFO)
    LOGGER.addHandler(log)
    try:
        with mock.patch("os.scandir", refusing), out, err:
            yield log
    finally:
        LOGGER.removeHandler(log)
        LOGGER.setLevel(level)
        LOGGER.propagate = True


def settings(case: Case, **changes: Any) -> ConfigDict:
    """Return the config of a short run."""
    c = configs.default()
    c.data.source, c.data.image_size = case.source, SIZE
    c.batch_size, c.epochs, c.steps = BATCH, 0.0, STEPS
    c.model.dim, c.model.options.widths, c.model.options.pools = 6, (4,), 1
    c.eval.probes = ("knn",) if case.scored else ()
    c.eval.knn_k, c.eval.labels_per_class = 1, (0,)
    c.eval.batch_size = BATCH
    c.update(changes)
    return c


def opened(config: ConfigDict) -> tuple[Source, Source]:
    """Return both splits, after what a start checks before it trains."""
    configs.validate(config, ("knn",))
    sources = open_sources(config)
    Evaluator(config, *sources[1:], make_model(config, "cpu"), seed=0, cache=ImageCache())
    return sources.train, sources.probe_test


def faults(case: Case, trains: bool, tally: Counter[str]) -> Iterator[str]:
    """Yield what is wrong with how a case is read, and count the outcome."""
    reading = None
    try:
        with started(case) as log:
            sources = opened(settings(case, batch_size=1))
    except UserError as error:
        tally["refused"] += 1
        if None not in case.allowed:
            yield f"refused: {error}"
        if not str(error) or "\n" in str(error):
            yield f"not one message: {error!r}"
    else:
        tally["read"] += 1
        wrong = []
        for reading in case.allowed:
            wrong = list(differences(reading, sources))
            if not wrong:
                break
        else:
            yield f"read otherwise than any of {len(case.allowed)} readings: {wrong[:3]}"
            return
        yield from contents(reading, sources, case.records)
        expected = case.stated | (
            {*reading.splits} if reading.splits != ("train", "test") else set()
        )
        expected |= {f"left out {reading.beside} image"} if reading.beside else set()
        yield from (f"not in the log: {text}" for text in expected if text not in log.text)
        trains = trains and len(sources[0]) >= BATCH
    if trains:
        tally["trained"] += reading is not None
        yield from run_faults(case, reading)


def differences(reading: Reading | None, sources: tuple[Source, Source]) -> Iterator[str]:
    """Yield how the records and classes of two splits differ from a reading."""
    if reading is None:
        yield "to be refused"
        return
    for source, part in zip(sources, reading[:2], strict=True):
        names = [source.record_name(i) for i in range(len(source))]
        if len(names) != len(part) or (isinstance(source[0]["image"], bytes) and names != [*part]):
            yield f"{source.split}: {len(names)} records {names[:3]}, not {len(part)} {[*part][:3]}"
            continue
        if source.split == "test" and not any(reading.train.values()):
            continue
        for index, (name, wanted) in enumerate(part.items()):
            label = source[index]["label"]
            known = source.class_names is not None and label >= 0
            got = unicodedata.normalize("NFC", source.class_names[label]) if known else None
            if got != wanted:
                yield f"{source.split}: {name} is of class {got}, not {wanted}"


def contents(
    reading: Reading, sources: tuple[Source, Source], records: Mapping[str, Any]
) -> Iterator[str]:
    """Yield which records have other bytes or pixels than were written."""
    for source, part in zip(sources, reading[:2], strict=True):
        for index, name in enumerate(part):
            image, item = source[index]["image"], records[name]
            if not isinstance(image, bytes):
                if not np.array_equal(image, item):
                    yield f"{name} has other pixels"
                continue
            if image != item.data:
                yield f"{name} has the bytes of another file"
                continue
            out = np.empty((1, SIZE, SIZE, 3), np.uint8)
            try:
                decode_and_crop(open_picture(image), eval_transform(image_size=SIZE), [()], out)
            except BadImage as error:
                if item.colour is not None:
                    yield f"{name} is refused: {error}"
            else:
                if item.colour is None or np.abs(out - np.int64(item.colour)).max() > TOLERANCE:
                    yield f"{name} is {out[0, 0, 0]}, not {item.colour}"


def run_faults(case: Case, reading: Reading | None) -> Iterator[str]:
    """Yield what is wrong with a run of two steps, and with a second start in the data."""
    inside = case.root.is_dir() and case.rng.random() < 0.5
    workdir = case.root / "runs" / "a" if inside else case.root.with_name("workdir")
    for _ in range(1 + inside):
        try:
            with started(case) as log:
                state = train_and_evaluate(settings(case), workdir)
        except UserError as error:
            if reading is None and (workdir / "metrics.jsonl").exists():
                yield f"refused after training: {error}"
            if reading is not None and not too_many_broken(case, reading):
                yield f"refused to train: {error}"
            return
        if reading is None or int(state.step) != STEPS:
            yield f"{int(state.step)} steps were trained"
            return
    labels = [case.scored * sum(map(bool, part.values())) for part in reading[:2]]
    try:
        protocol = json.loads((workdir / "results" / "pretrain.json").read_text())["protocol"]
        judged = [protocol[split]["records"] for split in ("train", "test")]
    except FileNotFoundError:
        judged = [0, 0]
        if case.scored and "no labels" not in log.text:
            yield "not in the log: no labels"
    if judged != (labels if all(labels) else [0, 0]):
        yield f"{judged} records were judged, of which {labels} have labels"


def too_many_broken(case: Case, reading: Reading) -> bool:
    """Return whether more than one record of a split is broken, which ends a small run."""
    items = ([case.records[name] for name in part] for part in reading[:2])
    return any(sum(getattr(item, "colour", 1) is None for item in part) > 1 for part in items)


def fuzz(seeds: Iterable[int], trains: bool = True) -> tuple[Counter[str], Counter[str], list[str]]:
    """Return how many cases were read, refused and trained, of which kinds, and all faults."""
    tally, kinds, found = Counter[str](), Counter[str](), list[str]()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(seed, Path(folder, "data"))
            kinds.update({*case.kinds})
            try:
                wrong = list(faults(case, trains and seed % TRAINED == 0, tally))
            except Exception:  # of which a user would see the traceback
                wrong = [traceback.format_exc()]
        if wrong:
            found += [f"seed {seed}: {fault}" for fault in wrong]
            print(f"FAILED {found[-1]}\n{case}", flush=True)
        if kinds.total() and seed % 100 == 99:
            print(f"seed {seed}: {dict(tally)}, {len(found)} faults", flush=True)
    return tally, kinds, found


def main() -> None:
    """Open all cases, and show what was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; then one more each")
    parser.add_argument("--output", type=Path, help="JSON")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")
    begin = time.monotonic()
    tally, kinds, found = fuzz(range(arguments.seed, arguments.seed + arguments.cases))
    seconds = round(time.monotonic() - begin)
    print(f"{arguments.cases} cases in {seconds} s: {dict(tally)}, {len(found)} faults")
    result = {
        "benchmark": "fuzz_input",
        **measure.environment("jax", "numpy", "pillow", "simplejpeg"),
        "seed": arguments.seed,
        "cases": arguments.cases,
        "seconds": seconds,
        **tally,
        "faults": found,
        "kinds": dict(kinds.most_common()),
    }
    measure.write(arguments.output, result)
    measure.finish(found)


if __name__ == "__main__":
    main()
