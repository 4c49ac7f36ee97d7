"""The task `suite`: train and evaluate every run of a plan and report; a failure stops no other.

Each run is one ``train.train_and_evaluate`` in a folder of its own, so stopping and resuming work
as for a single run. Its output goes to ``log.txt`` there.
"""

import contextlib
import datetime
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate, train
from nat_jax.errors import InputError
from nat_jax.evaluate.probe_data import TEST, TRAIN
from nat_jax.experiments import findings, pages
from nat_jax.experiments.findings import Record
from nat_jax.experiments.members import Planned, plan
from nat_jax.report.rows import KEYS, current
from nat_jax.training import lock, metrics
from nat_jax.training import workdir as workdirs
from nat_jax.training.setup import Sources, make_model, open_sources

# The outcome of a run, in its folder.
_RECORD = "suite_run.json"


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
        WorkdirInUse: another suite uses the folder.
        Preempted: stopped by Ctrl-C or SIGTERM, with the run's state saved.
    """
    workdir = Path(workdir)
    runs = plan(config)
    for run in runs:
        configs.validate(run.config, evaluate.PROBES)
        _check_folder(workdir / run.folder, run.config)
    sources = open_sources(runs[0].config)
    inputs = [_inputs(run.config, sources) for run in runs]
    with lock.held(workdir) as check_lock:
        records = [_saved(workdir / run.folder, i) for run, i in zip(runs, inputs, strict=True)]
        print(_plan_text(runs, records), flush=True)
        began = time.perf_counter()
        for number, run in enumerate(runs):
            record, note = records[number], "done before"
            if record is None:
                record = records[number] = _train(run, workdir / run.folder, inputs[number])
                check_lock()
                workdirs.write_json(workdir / run.folder / _RECORD, record)
                _publish(workdir, config, runs, records)
                note = _progress_text(record, time.perf_counter() - began, _left(runs, records))
            summary = findings.summary(record)
            print(f"[{number + 1}/{len(runs)}] {run.folder}: {summary} ({note})", flush=True)
        result = _publish(workdir, config, runs, records)
    print(pages.text(result), flush=True)
    print(f"report: {workdir / 'report.html'}", flush=True)
    return pages.result_file(workdir)


def _check_folder(folder: Path, config: ConfigDict) -> None:
    """Check that a run's folder, if it exists, holds exactly this training, not a shorter one."""
    saved = workdirs.read_json(folder / "config.json")
    if saved is None:
        return
    for key, old, new in workdirs.other_training(saved, config):
        raise InputError(
            f"{folder} holds a run with {key} = {old!r}; this suite has {new!r}. "
            "Choose another folder with --workdir=..., or set the key back"
        )


def _inputs(config: ConfigDict, sources: Sources) -> dict[str, Any]:
    """Return everything that a run's outcome depends on, as JSON has it."""
    settings = configs.flatten(configs.to_dict(config.eval))
    return {
        "training": workdirs.training(config),
        "eval": {key: value for key, value in settings.items() if key != "to"},
        "train": sources.train.fingerprint,
        "test": sources.probe_test.fingerprint,
    }


def _saved(folder: Path, inputs: Mapping[str, Any]) -> Record | None:
    """Return the outcome of a finished run; None for a failed one, which is tried again."""
    record = workdirs.read_json(folder / _RECORD)
    if record is None or record["error"] or not workdirs.answers(record["asked"], inputs):
        return None
    return {**record, "rows": current(record["rows"])}


def _train(run: Planned, folder: Path, inputs: Mapping[str, Any]) -> Record:
    """Train and evaluate; an exception becomes part of the outcome, a stop by a signal does not."""
    began, resumed = time.perf_counter(), (folder / "checkpoints").exists()
    measured: dict[str, Any] = {"rows": [], "curve": []}
    error = None
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _output_to(folder / "log.txt"):
            train.train_and_evaluate(run.config, folder)
        measured = _measured(run.config, folder)
    except Exception as failure:  # of any kind: the other runs are independent of it
        error = f"{type(failure).__name__}: {failure}"
    return {
        "asked": inputs,
        "error": error,
        "seconds": None if resumed else time.perf_counter() - began,
        **measured,
    }


def _measured(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Read a finished run's accuracies, and those on the last convolution during training."""
    result = workdirs.read_json(folder / "results" / "pretrain.json")
    last_conv = make_model(config, jax.default_backend()).last_conv
    prefix = f"eval/{last_conv}/"
    curve = [
        [row["epoch"], {k.split("/")[2]: v for k, v in row.items() if k.startswith(prefix)}]
        for row in metrics.read_rows(folder)
        if any(key.startswith(prefix) for key in row)
    ]
    data = {split: result["protocol"][split] for split in (TRAIN, TEST)}
    rows = [
        {**{key: row[key] for key in KEYS}, "value": row["mean"]}
        for row in current(result["table"])
    ]
    return {"rows": rows, "curve": curve, "data": data, "last_conv": last_conv}


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Write log and printed text to a file; warnings go to the terminal too."""
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


def _plan_text(runs: Sequence[Planned], records: Sequence[Record | None]) -> str:
    total, done = sum(run.config.epochs for run in runs), len(runs) - records.count(None)
    left = _left(runs, records)
    estimate = f"about {left} left" if left else "the first run tells how long they take"
    return f"suite: {len(runs)} runs, {total:g} epochs in all, {done} runs done before; {estimate}"


def _progress_text(record: Record, elapsed: float, left: str) -> str:
    own = "" if record["seconds"] is None else f"{record['seconds']:.0f} s; "
    return f"{own}{_time(elapsed)} passed" + (f", about {left} left" if left else "")


def _left(runs: Sequence[Planned], records: Sequence[Record | None]) -> str:
    """Estimate the remaining time from the epochs of the runs that were timed; "" if none was."""
    seconds = epochs = left = 0.0
    for run, record in zip(runs, records, strict=True):
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
) -> dict[str, Any]:
    """Write and return the result of the runs so far."""
    result = findings.find(config, runs, records)
    workdirs.write_json(pages.result_file(workdir), result)
    pages.write(result, workdir)
    return result
