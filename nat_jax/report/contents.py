"""What a workdir holds, read for the report; every piece may be missing."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nat_jax.errors import InputError
from nat_jax.report.tables import TRAINED

MetricsRow = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Contents:
    """A run, or several runs that differ by their seed.

    Attributes:
        name: of the folder.
        config: config.json; empty when there is none.
        result: results/pretrain.json; None without labels.
        others: further results, by file name.
        metrics: rows of metrics.jsonl of each run, by label.
        pictures: PNG files of each run, by label and stem.
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
        """Return a value of the config by its dotted name; None where there is none."""
        value: Any = self.config
        for key in path.split("."):
            if not isinstance(value, Mapping):
                return None
            value = value.get(key)
        return value


def read(workdir: Path) -> Contents:
    """Read a workdir: its own files, and those of its ``seed-<s>`` folders if it has any.

    Raises:
        ValueError: no such folder, or a file in it that is not what its name says.
    """
    if not workdir.is_dir():
        raise InputError(f"report: expected a workdir, got {workdir}, which is no folder")
    config = _json(workdir / "config.json") or {}
    results = {path.stem: _json(path) for path in sorted(workdir.glob("results/*.json"))}
    result = results.pop("pretrain", None)
    others = {
        k: v for k, v in results.items() if isinstance(v, dict) and {"task", "value"} <= v.keys()
    }
    folders = _runs(workdir)
    metrics = {}
    for label, folder in folders.items():
        if rows := _metrics(folder / "metrics.jsonl"):
            metrics[label] = _with_ends(rows, (result or {}).get("table", ()), label)
    pictures = {
        label: {
            path.stem: path.read_bytes()
            for path in sorted(folder.glob("pictures/*.png"), key=_place)
        }
        for label, folder in folders.items()
    }
    health = {
        label: sentences
        for label, folder in {"": workdir, **folders}.items()
        if (sentences := _json(folder / "results" / "health.json"))
    }
    return Contents(
        name=workdir.resolve().name,
        config=config,
        result=result,
        others=others,
        metrics=metrics,
        pictures={label: found for label, found in pictures.items() if found},
        health=health,
    )


def _runs(workdir: Path) -> dict[str, Path]:
    """Return the folder of every run by its label, "" for a single one."""
    seeds = {
        int(match[1]): path
        for path in workdir.glob("seed-*")
        if path.is_dir() and (match := re.fullmatch(r"seed-(\d+)", path.name))
    }
    return {f"seed {seed}": seeds[seed] for seed in sorted(seeds)} or {"": workdir}


def _place(picture: Path) -> tuple[bool, bool, str]:
    return picture.stem != "filters", picture.stem != "neighbours_z", picture.stem


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected JSON, got {error}; delete or restore it") from error


def _metrics(path: Path) -> list[MetricsRow]:
    """Read metrics.jsonl; a torn last line, left by a killed run, is no row yet."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise InputError(f"{path}:{number}: expected a JSON object, got {error}") from error
    return rows


def _with_ends(
    rows: list[MetricsRow], table: Sequence[Mapping[str, Any]], label: str
) -> list[MetricsRow]:
    """Add what the table knows of the first and the last epoch to accuracies over epochs."""
    judged = {name for row in rows for name in row if name.startswith("eval/")}
    ends: dict[str, MetricsRow] = {
        "untrained": {"step": 0, "epoch": 0.0},
        "trained": {"step": rows[-1]["step"], "epoch": rows[-1]["epoch"]},
    }
    for row in table:
        name = f"eval/{row['features']}/{row['probe']}/{row['labels']}"
        end = "trained" if row["network"] in TRAINED else row["network"]
        if end not in ends or name not in judged:
            continue
        by_seed = {
            f"seed {seed}": value
            for seed, value in zip(row.get("seeds", ()), row.get("values", ()), strict=False)
        }
        value = by_seed.get(label) if label else row["mean"]
        if value is not None:
            ends[end][name] = value
    return [ends["untrained"], *rows, ends["trained"]] if judged else rows
