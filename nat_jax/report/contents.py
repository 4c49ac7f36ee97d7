"""Read a workdir for the report; every file may be missing."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.report.rows import TRAINED, UNTRAINED, current

MetricsRow = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Contents:
    """A run, or several runs that differ by their seed.

    Attributes:
        name: of the folder.
        config: config.json; empty if there is none.
        result: results/pretrain.json; None without labels.
        others: further results, by file name.
        metrics: rows of metrics.jsonl of each run, by the run's label ("" for a single run).
        pictures: PNG files of each run, by label and file stem.
        health: sentences about each run, by label.
    """

    name: str
    config: Mapping[str, Any]
    result: Mapping[str, Any] | None
    others: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Sequence[MetricsRow]]
    pictures: Mapping[str, Mapping[str, bytes]]
    health: Mapping[str, Sequence[str]]

    def setting(self, path: str) -> Any:
        """Return a value of the config by its dotted name; None if it has none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


def read(workdir: Path) -> Contents:
    """Read a workdir: its own files, and those of its ``seed-<s>`` folders if it has any.

    Raises:
        ValueError: no such folder, or a file that cannot be parsed.
    """
    if not workdir.is_dir():
        raise InputError(f"report: expected a workdir, got {workdir}, which is no folder")
    seeds = {
        int(match[1]): path
        for path in workdir.glob("seed-*")
        if path.is_dir() and (match := re.fullmatch(r"seed-(\d+)", path.name))
    }
    folders = {f"seed {seed}": seeds[seed] for seed in sorted(seeds)} or {"": workdir}
    results = {path.stem: read_result(path) for path in sorted(workdir.glob("results/*.json"))}
    result = results.pop("pretrain", None)
    table = (result or {}).get("table", ())
    metrics = {label: _metrics(folder / "metrics.jsonl") for label, folder in folders.items()}
    pictures = {label: _pictures(folder) for label, folder in folders.items()}
    health = {
        label: _json(folder / "results" / "health.json")
        for label, folder in {"": workdir, **folders}.items()
    }
    return Contents(
        name=workdir.resolve().name,
        config=_json(workdir / "config.json") or {},
        result=result,
        others={
            name: other
            for name, other in results.items()
            if isinstance(other, dict) and {"task", "value"} <= other.keys()
        },
        metrics={
            label: _with_first_and_last(rows, table, label)
            for label, rows in metrics.items()
            if rows
        },
        pictures={label: found for label, found in pictures.items() if found},
        health={label: sentences for label, sentences in health.items() if sentences},
    )


def read_result(path: Path) -> Any:
    """Return the contents of a result file, with the current keys in the rows of its table.

    Raises:
        ValueError: not JSON.
    """
    result = _json(path)
    if isinstance(result, dict) and "table" in result:
        result["table"] = current(result["table"])
    return result


def _json(path: Path) -> Any:
    """Return the contents of a JSON file; None if there is no file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}; delete or restore it") from error


def _metrics(path: Path) -> list[MetricsRow]:
    """Return the rows of a metrics.jsonl; an incomplete last line, left by a kill, is skipped."""
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}:{number}: expected a JSON object, got {error}") from error
    return rows


def _pictures(folder: Path) -> dict[str, bytes]:
    """Return a run's PNG files by stem: filters, neighbours in z, then by name."""
    first = ("filters", "neighbours_z")
    paths = sorted(folder.glob("pictures/*.png"), key=lambda p: (p.stem not in first, p.stem))
    return {path.stem: path.read_bytes() for path in paths}


def _with_first_and_last(
    rows: list[MetricsRow], table: Sequence[Mapping[str, Any]], label: str
) -> list[MetricsRow]:
    """Add the table's accuracies at the start and the end to those measured during training."""
    during = {name for row in rows for name in row if name.startswith("eval/")}
    if not during:
        return rows
    first: MetricsRow = {"step": 0, "epoch": 0.0}
    last: MetricsRow = {"step": rows[-1]["step"], "epoch": rows[-1]["epoch"]}
    for row in table:
        name = f"eval/{row['layer']}/{row['probe']}/{row['labels']}"
        labels = (f"seed {seed}" for seed in row.get("seeds", ()))
        by_seed = dict(zip(labels, row.get("values", ()), strict=False))
        value = by_seed.get(label) if label else row["mean"]
        if name not in during or value is None:
            continue
        if row["network"] == UNTRAINED:
            first[name] = value
        elif row["network"] in TRAINED:
            last[name] = value
    return [first, *rows, last]
