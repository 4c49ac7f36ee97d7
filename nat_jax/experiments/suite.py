"""The task `suite`: train and judge every run of a plan, whatever happens to one, and report.

Each run is one of ``train.train_and_evaluate`` in a folder of its own, so that stopping and going
on are those of a single run. What it says goes to ``log.txt`` there.
"""

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate, train
from nat_jax.errors import InputError
from nat_jax.evaluate.probe_data import TEST, TRAIN
from nat_jax.experiments import findings, pages
from nat_jax.experiments.members import Planned, plan
from nat_jax.training import metrics
from nat_jax.training import workdir as workdirs
from nat_jax.training.setup import Sources, make_model, open_sources

# What became of a run: beside its other files.
_RECORD = "suite_run.json"

Record = dict[str, Any]


def run_suite(config: ConfigDict, workdir: Path) -> Path:
    """Run all of a suite that is not done, and write its tables after every run.

    Args:
        config: see configs/paper/suite.py.
        workdir: folder of the suite; each run has one below it.

    Returns:
        ``results/suite.json``; ``results/suite.md`` and ``report.html`` show the same.

    Raises:
        ValueError: a mistake in the config or the data, or other runs in the folder, before any
            device work.
        Preempted: stopped by Ctrl-C or SIGTERM, with the run's state saved.
    """
    workdir = Path(workdir)
    runs = plan(config)
    for run in runs:
        configs.validate(run.config, evaluate.PROBES)
        _check_folder(workdir / run.folder, run.config)
    sources = open_sources(runs[0].config)
    asked = [_asked(run.config, sources) for run in runs]
    records = [
        _known(workdir / run.folder, wanted) for run, wanted in zip(runs, asked, strict=True)
    ]
    clock = _Clock(runs, records)
    print(clock.plan(), flush=True)
    for number, run in enumerate(runs):
        place = workdir / run.folder
        known = records[number]
        if known is not None:
            _say(number, runs, f"{_outcome(known)} (done before)")
            continue
        record = _train(run, place, asked[number])
        records[number] = record
        workdirs.write_json(place / _RECORD, record)
        _publish(workdir, config, runs, records)
        _say(number, runs, f"{_outcome(record)} ({clock.after(number, records)})")
    result = _publish(workdir, config, runs, records)
    print(pages.text(result), flush=True)
    print(f"report: {workdir / 'report.html'}", flush=True)
    return pages.result_file(workdir)


def _check_folder(folder: Path, config: ConfigDict) -> None:
    """Check that a run's folder, if there is one, holds this very training, no shorter one."""
    saved = workdirs.read_json(folder / "config.json")
    if saved is None:
        return
    for key, old, new in workdirs.other_training(saved, config):
        raise InputError(
            f"{folder} holds a run with {key} = {old!r}; this suite has {new!r}. "
            "Choose another folder with --workdir=..., or set the key back"
        )


def _asked(config: ConfigDict, sources: Sources) -> dict[str, Any]:
    """Return all that a run's outcome depends on, as JSON has it."""
    return {
        "training": workdirs.training(config),
        "eval": configs.flatten(configs.to_dict(config.eval)),
        "train": sources.train.fingerprint,
        "test": sources.probe_test.fingerprint,
    }


def _known(folder: Path, asked: dict[str, Any]) -> Record | None:
    """Return the outcome of a finished run; a failed one is tried again."""
    record = workdirs.read_json(folder / _RECORD)
    if record is None or record["error"] is not None:
        return None
    return record if workdirs.answers(record["asked"], asked) else None


def _train(run: Planned, place: Path, asked: dict[str, Any]) -> Record:
    """Train and judge; a failure is part of the outcome, a stop by a signal is not."""
    began, resumed = time.perf_counter(), (place / "checkpoints").exists()
    found: Record = {"rows": [], "curve": []}
    error = None
    place.mkdir(parents=True, exist_ok=True)
    try:
        with _saying_into(place / "log.txt"):
            train.train_and_evaluate(run.config, place)
        found = _found(run.config, place)
    except Exception as failure:  # whatever it is, the other runs are worth their time
        error = f"{type(failure).__name__}: {failure}"
    return {
        "asked": asked,
        "error": error,
        "seconds": None if resumed else time.perf_counter() - began,
        **found,
    }


def _found(config: ConfigDict, place: Path) -> Record:
    """Read a finished run's accuracies, and those along its training."""
    saved = workdirs.read_json(place / "judged.json")
    last_conv = make_model(config, jax.default_backend()).last_conv
    prefix = f"eval/{last_conv}/"
    curve = [
        [row["epoch"], {k.split("/")[2]: v for k, v in row.items() if k.startswith(prefix)}]
        for row in metrics.read_rows(place)
        if any(key.startswith(prefix) for key in row)
    ]
    data = {split: saved["protocol"][split] for split in (TRAIN, TEST)}
    return {"rows": saved["rows"], "curve": curve, "data": data, "last_conv": last_conv}


@contextlib.contextmanager
def _saying_into(path: Path) -> Iterator[None]:
    """Write what is logged and printed to a file; warnings are shown too."""
    package = logging.getLogger("nat_jax")
    levels = {handler: handler.level for handler in package.handlers}
    with path.open("a", encoding="utf-8") as file:
        log = logging.StreamHandler(file)
        for handler in levels:
            handler.setLevel(logging.WARNING)
        package.addHandler(log)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            package.removeHandler(log)
            for handler, level in levels.items():
                handler.setLevel(level)


def _outcome(record: Record) -> str:
    """Say in a few words what became of a run."""
    if record["error"] is not None:
        return f"FAILED: {record['error'].splitlines()[0]}"
    how, value, untrained = findings.headline(record)
    beside = "" if untrained is None else f", untrained {100 * untrained:.1f} %"
    return f"{how} {100 * value:.1f} %{beside}"


def _say(number: int, runs: Sequence[Planned], words: str) -> None:
    print(f"[{number + 1}/{len(runs)}] {runs[number].folder}: {words}", flush=True)


class _Clock:
    """Elapsed time, and what is left by the epochs that are left."""

    def __init__(self, runs: Sequence[Planned], records: Sequence[Record | None]):
        self._runs, self._began = runs, time.perf_counter()
        self._records = records

    def plan(self) -> str:
        """Say what there is to do, and how long it takes if anything is known of that."""
        total = sum(run.config.epochs for run in self._runs)
        done = sum(record is not None for record in self._records)
        left = self._left(self._records)
        return (
            f"suite: {len(self._runs)} runs, {total:g} epochs in all, {done} runs done before; "
            + (f"about {left} left" if left else "the first run tells how long they take")
        )

    def after(self, number: int, records: Sequence[Record | None]) -> str:
        """Say how long a run took, what has passed since the start, and what is left."""
        record = records[number]
        assert record is not None
        took = record["seconds"]
        elapsed = _time(time.perf_counter() - self._began)
        own = f"{took:.0f} s; " if took is not None else ""
        left = self._left(records)
        return f"{own}{elapsed} passed" + (f", about {left} left" if left else "")

    def _left(self, records: Sequence[Record | None]) -> str:
        seconds = epochs = left = 0.0
        for run, record in zip(self._runs, records, strict=True):
            if record is None:
                left += run.config.epochs
            elif record["error"] is None and record["seconds"] is not None:
                seconds += record["seconds"]
                epochs += run.config.epochs
        return _time(left * seconds / epochs) if epochs else ""


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


def _publish(
    workdir: Path, config: ConfigDict, runs: Sequence[Planned], records: Sequence[Record | None]
) -> findings.Result:
    """Write the tables of what is known so far."""
    done = [
        findings.Done(run, record)
        for run, record in zip(runs, records, strict=True)
        if record is not None
    ]
    result = findings.find(config, done, [run.folder for run in runs])
    workdirs.write_json(pages.result_file(workdir), result)
    pages.write(result, workdir)
    return result
