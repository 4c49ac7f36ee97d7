"""The report: one self-contained HTML page about a run."""

import base64
import html
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nat_jax.report import charts, tables
from nat_jax.report.contents import Contents, read
from nat_jax.report.style import CSS
from nat_jax.training import metrics
from nat_jax.training.workdir import write_whole


def write_report(workdir: Path) -> Path:
    """Write ``report.html`` into a workdir from what lies there, and return its path.

    The page needs nothing else: pictures are inside, nothing is fetched. It reads config.json,
    metrics.jsonl, results/*.json and pictures/*.png, the latter of every ``seed-<s>`` folder if
    there are any. What is missing is left out with one sentence.

    Args:
        workdir: folder of a run.

    Raises:
        ValueError: no such folder, or a file in it that is not what its name says.
    """
    path = workdir / "report.html"
    write_whole(path, render(read(workdir)).encode())
    return path


def render(contents: Contents) -> str:
    """Return the page as HTML."""
    sections = (
        _header(contents),
        _results(contents),
        _curves(contents),
        _health(contents),
        _pictures(contents),
        _settings(contents),
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(contents.name)} · nat_jax</title><style>{CSS}</style></head>\n"
        "<body><main>\n"
        + "\n".join(part for section in sections for part in section)
        + "\n</main></body></html>\n"
    )


def _header(contents: Contents) -> Iterator[str]:
    source = contents.setting("data.source")
    yield f"<p class=over>Predicting noise{f' on {_text(source)}' if source else ''}</p>"
    yield f"<h1>{_text(contents.name)}</h1>"
    if contents.result is not None:
        yield f"<p class=outcome>{_text(tables.outcome(contents.result['table']))}</p>"
    facts = {name: value for name, value in _facts(contents) if value}
    if facts:
        pairs = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
        yield f"<dl class=facts>{''.join(pairs)}</dl>"


def _facts(contents: Contents) -> Iterator[tuple[str, str]]:
    run = (contents.result or {}).get("run", {})
    dim = contents.setting("model.dim")
    yield "data", contents.setting("data.source") or ""
    yield "images", f"{run['num_records']:,}" if "num_records" in run else ""
    yield "network", contents.setting("model.name") or ""
    yield "features", f"D = {dim}" if dim else ""
    rows = [rows[-1] for rows in contents.metrics.values()]
    if rows:
        last = max(rows, key=lambda row: row["step"])
        yield "trained", f"{last['epoch']:g} epochs, {last['step']:,} steps"
    seeds = contents.setting("seeds")
    yield "seeds", ", ".join(map(str, seeds)) if seeds else ""
    batch, block = contents.setting("batch_size"), contents.setting("assign.block")
    yield "matched together", f"{block or batch:,} images" if batch else ""
    yield "device", f"{run['devices']}" if "devices" in run else ""


def _health(contents: Contents) -> Iterator[str]:
    if not contents.health:
        return
    columns = []
    for label, sentences in contents.health.items():
        items = []
        for sentence in sentences:
            warns = sentence.startswith("warning:")
            words = sentence.removeprefix("warning:").strip()
            text = _text(words[:1].upper() + words[1:])
            items.append(f"<li{' class=warning' if warns else ''}>{text}</li>")
        head = f"<h3>{_text(label)}</h3>" if label else ""
        columns.append(f"<div>{head}<ul class=health>{''.join(items)}</ul></div>")
    yield f"<section><h2>Health</h2><div class=columns>{''.join(columns)}</div></section>"


def _results(contents: Contents) -> Iterator[str]:
    if contents.result is None:
        text = "No scores: the records have no labels, or nothing was judged yet."
        yield f"<section><h2>Results</h2><p class=note>{text}</p></section>"
    else:
        rows = contents.result["table"]
        yield (
            f"<section><h2>Results</h2><p class=note>{_text(_reading(contents, rows))}</p>"
            f"<div class=scroll>{tables.html_table(rows)}</div></section>"
        )
    if contents.others:
        steps = ((contents.result or {}).get("run") or {}).get("steps")
        lines = ((name, _in_words(other, steps)) for name, other in contents.others.items())
        more = "".join(
            f"<details><summary>{_text(name)}</summary><div class=scroll>"
            f"{tables.html_table(other['table'])}</div></details>"
            for name, other in contents.others.items()
            if other.get("table")
        )
        yield f"<section><h2>Further results</h2>{_pairs(lines)}{more}</section>"


def _in_words(result: Mapping[str, Any], steps: int | None) -> str:
    """Say what a task found, on what, and whether the run has gone on since.

    Args:
        result: of the task.
        steps: those that the run has done now.
    """
    said = f"{result.get('metric', '')} {_number(result['value'])}".strip()
    if (before := result.get("untrained")) is not None:
        said += f" (untrained {_number(before)})"
    if test := (result.get("protocol") or {}).get("test"):
        said += f", on {test['source']}"
    networks = ((result.get("run") or {}).get("networks") or [{}])[0]
    judged = [n["step"] for n in networks.values() if "step" in n and "folder" not in n]
    if judged and steps is not None and max(judged) != steps:
        said += f"; of step {max(judged):,}, where the run has done {steps:,}"
    return said


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _reading(contents: Contents, rows: list[Mapping[str, Any]]) -> str:
    test = ((contents.result or {}).get("protocol") or {}).get("test") or {}
    where = f" on {test['records']:,} test records" if "records" in test else ""
    arranged = tables.arrange(rows)
    spread = (
        f", mean ± standard deviation over {arranged.seeds} {arranged.drawn}"
        if arranged.seeds > 1
        else ""
    )
    return (
        f"Top-1 accuracy in percent{where}{spread}. A star marks the best of each column in its "
        "group; the small signed number is the gain over the same features before training."
    )


def _curves(contents: Contents) -> Iterator[str]:
    dim, block = contents.setting("model.dim"), contents.setting("assign.block")
    matched = block or contents.setting("batch_size")
    # A row of the canonical basis is no random direction: its chance level is another.
    sphere = contents.setting("targets.kind") == "sphere"
    chance = metrics.chance_cosine(matched, dim) if sphere and matched and dim else None
    shown = charts.panels(contents.metrics, chance=chance, dim=dim)
    if not shown:
        text = "There is no metrics.jsonl with training metrics: no curves."
        yield f"<section><h2>Curves</h2><p class=note>{text}</p></section>"
        return
    several = len(contents.metrics) > 1
    names = _text(", ".join(contents.metrics))
    note = f"<p class=note>Thin lines: {names}; thick: their mean.</p>" if several else ""
    figures = (
        f"<figure><h3>{_text(panel.title)}</h3><p class=note>{_text(panel.note)}</p>"
        f"{charts.svg(panel, contents.metrics)}</figure>"
        for panel in shown
    )
    yield (f"<section><h2>Curves</h2>{note}<div class=charts>{''.join(figures)}</div></section>")


def _pictures(contents: Contents) -> Iterator[str]:
    if not contents.pictures:
        text = "There are no pictures/*.png: no filters, no neighbours."
        yield f"<section><h2>Pictures</h2><p class=note>{text}</p></section>"
        return
    (first, pictures), *rest = contents.pictures.items()
    named = f" ({_text(first)})" if first else ""
    more = "".join(
        f"<details><summary>{_text(label)}</summary>{_figures(found)}</details>"
        for label, found in rest
    )
    body = f"<h2>Filters and neighbours{named}</h2>{_figures(pictures)}{more}"
    yield f"<section class=pictures>{body}</section>"


def _figures(pictures: Mapping[str, bytes]) -> str:
    return "".join(
        f"<figure><h3>{_text(_caption(stem))}</h3>"
        f'<img alt="{_text(_caption(stem))}" style="max-width:{_png_width(data) // 2}px" '
        f'src="data:image/png;base64,'
        f'{base64.b64encode(data).decode()}"></figure>'
        for stem, data in pictures.items()
    )


def _png_width(data: bytes) -> int:
    """Return the width of a PNG file; its header holds it at a fixed place."""
    return int.from_bytes(data[16:20], "big")


def _caption(stem: str) -> str:
    kind, _, layer = stem.partition("_")
    if kind == "neighbours" and layer:
        return f"Nearest neighbours by cosine in {layer}"
    if kind == "retrieval" and layer:
        return f"Retrieval by cosine in {layer}"
    named = {
        "filters": "Filters of the first layer",
        "filters_composed": "Filters of the first layer, joined with the front end",
    }
    return named.get(stem, stem.replace("_", " "))


def _settings(contents: Contents) -> Iterator[str]:
    result = contents.result or {}
    parts = {
        "Config": contents.config,
        "Probe protocol": result.get("protocol"),
        "Run and versions": result.get("run"),
    }
    for title, values in parts.items():
        if values:
            body = _pairs(_flat(values))
            yield f"<details class=card><summary>{title}</summary>{body}</details>"
    if not contents.config:
        yield "<p class=note>There is no config.json.</p>"
    yield "<footer>Written by nat_jax from the files of this folder.</footer>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield prefix + key, ", ".join(map(str, value))
        else:
            yield prefix + key, str(value)


def _pairs(lines: Iterable[tuple[str, str]]) -> str:
    rows = (f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in lines)
    return f"<table class=pairs>{''.join(rows)}</table>"


def _text(value: Any) -> str:
    return html.escape(str(value))
