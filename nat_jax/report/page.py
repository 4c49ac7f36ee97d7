"""Render HTML pages that are one self-contained file, and the report of a run as one of them."""

import base64
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from nat_jax.report import charts, tables
from nat_jax.report.contents import Contents, read
from nat_jax.runtime import atomic_files
from nat_jax.training import health


def write_report(workdir: Path) -> Path:
    """Write ``report.html`` into a workdir from the files in it, and return its path.

    The page is self-contained: pictures are embedded and nothing is fetched. It shows config.json,
    metrics.jsonl, results/*.json and pictures/*.png, the latter of every ``seed-<s>`` folder if
    there are any. A missing file is replaced by one sentence.

    Args:
        workdir: folder of a run.

    Raises:
        ValueError: no such folder, or a file that cannot be parsed.
    """
    contents = read(workdir)
    result = contents.result or {}
    steps = (result.get("run") or {}).get("steps")
    chance = _chance(contents)
    panels = charts.panels(contents.metrics, chance=chance, dim=contents.setting("model.dim"))
    page = render(
        "report/run.html",
        title=contents.name,
        source=contents.setting("data.source"),
        contents=contents,
        facts=dict(_facts(contents)),
        outcome=tables.outcome(result["table"]) if result else "",
        table=tables.arrange(result["table"]) if result else None,
        others={name: _summary(other, steps) for name, other in contents.others.items()},
        charts=[(panel, charts.svg(panel, contents.metrics)) for panel in panels],
        details={
            "Config": contents.config,
            "Probe protocol": result.get("protocol"),
            "Run and versions": result.get("run"),
        },
    )
    path = workdir / "report.html"
    atomic_files.write(path, page.encode())
    return path


def render(template: str, **values: Any) -> str:
    """Return a page as HTML.

    Args:
        template: path below nat_jax; it extends report/page.html, the frame of every page.
        **values: its variables; text is escaped.
    """
    return _environment().get_template(template).render(values)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nat_jax", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "arrange": tables.arrange,
        "caption": _caption,
        "data_uri": _data_uri,
        "flat": _flat,
        "labels_title": tables.labels_title,
        "layer_name": tables.layer_name,
        "network_name": tables.network_name,
        "png_width": _png_width,
        "probe_name": tables.probe_name,
    }
    return environment


def _facts(contents: Contents) -> Iterator[tuple[str, Any]]:
    """Yield the heads and values of the line below the title; empty values are not shown."""
    run = (contents.result or {}).get("run", {})
    yield "data", contents.setting("data.source")
    yield "images", f"{run['num_records']:,}" if "num_records" in run else ""
    yield "network", contents.setting("model.name")
    dim = contents.setting("model.dim")
    yield "features", f"D = {dim}" if dim else ""
    last = max(
        (rows[-1] for rows in contents.metrics.values()), key=lambda r: r["step"], default=None
    )
    yield "trained", f"{last['epoch']:g} epochs, {last['step']:,} steps" if last else ""
    yield "seeds", ", ".join(map(str, contents.setting("seeds") or ()))
    matched = _matched_together(contents)
    yield "matched together", f"{matched:,} images" if matched else ""
    yield "device", run.get("devices")


def _matched_together(contents: Contents) -> int | None:
    """Return how many images are matched together; None if it is not known."""
    if contents.setting("assign.scope") == "dataset":
        return (contents.result or {}).get("run", {}).get("num_records")
    return contents.setting("assign.block") or contents.setting("batch_size")


def _chance(contents: Contents) -> float | None:
    """Return the cosine that matching reaches without learning; None if it is not known."""
    matched = _matched_together(contents)
    dim = contents.setting("model.dim")
    # The formula is for random directions; rows of the canonical basis are none.
    if contents.setting("targets.kind") != "sphere" or not matched or not dim:
        return None
    return health.chance_cosine(matched, dim)


def _summary(result: Mapping[str, Any], steps: int | None) -> str:
    """Return a task's number in one line, and whether the run has trained further since.

    Args:
        result: of the task.
        steps: number of steps that the run has now.
    """
    text = f"{result.get('metric', '')} {_number(result['value'])}".strip()
    if (untrained := result.get("untrained")) is not None:
        text += f" (untrained {_number(untrained)})"
    if test := (result.get("protocol") or {}).get("test"):
        text += f", on {test['source']}"
    networks = ((result.get("run") or {}).get("networks") or [{}])[0]
    evaluated = [n["step"] for n in networks.values() if "step" in n and "folder" not in n]
    if evaluated and steps is not None and max(evaluated) != steps:
        text += f"; of step {max(evaluated):,}, where the run has done {steps:,}"
    return text


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _png_width(png: bytes) -> int:
    """Return the width of a PNG file in pixels; its header has it at a fixed offset."""
    return int.from_bytes(png[16:20], "big")


def _caption(stem: str) -> str:
    """Return the caption of a picture by its file's stem."""
    kind, _, layer = stem.partition("_")
    titles = {"neighbours": "Nearest neighbours", "retrieval": "Retrieval"}
    if kind in titles and layer:
        return f"{titles[kind]} by cosine in {layer}"
    filters = {
        "filters": "Filters of the first layer",
        "filters_composed": "Filters of the first layer, joined with the front end",
    }
    return filters.get(stem, stem.replace("_", " "))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values of nested dicts by their dotted names."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield prefix + key, ", ".join(map(str, value))
        else:
            yield prefix + key, str(value)
