"""A suite's result as Markdown, as one self-contained HTML page, and as plots."""

import base64
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nat_jax import report
from nat_jax.report.charts import FAINT, GRID, INK, SERIES
from nat_jax.report.style import CSS
from nat_jax.report.tables import html_table, probe_name
from nat_jax.training.workdir import write_whole

Result = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

_TITLES = {
    "fig2_period": "Re-matching every so many epochs (figure 2, left)",
    "discrete_targets": "Discrete targets (text)",
    "curve": "Along training (figure 2, right)",
    "layers": "Layers (table 3)",
}
_HEADS = {"fig2_period": "epochs between re-matching", "discrete_targets": "k one-hot targets"}


def result_file(workdir: Path) -> Path:
    """Return where a suite keeps its result."""
    return workdir / "results" / "suite.json"


def write(result: Result, workdir: Path) -> Path:
    """Write ``results/suite.md``, ``pictures/suite_*.png`` and ``report.html`` into a workdir.

    Returns:
        The path of the last.
    """
    drawn = dict(_plots(result))
    for name, data in drawn.items():
        write_whole(workdir / "pictures" / f"suite_{name}.png", data)
    write_whole(workdir / "results" / "suite.md", markdown(result).encode())
    write_whole(workdir / "report.html", _page(result, drawn).encode())
    return workdir / "report.html"


def text(result: Result) -> str:
    """Return one line for each claim, for a terminal."""
    lines = [f"{one['verdict']:14} {one['place']}: {one['claim']}" for one in result["claims"]]
    failed = sum(run["error"] is not None for run in result["runs"])
    wrong = [f"{failed} of {len(result['runs'])} runs have no result, see the report"]
    return "\n".join([*lines, *(wrong if failed else [])])


def markdown(result: Result) -> str:
    """Return the whole result as Markdown."""
    parts = [f"# {_title(result)}", result["protocol"]["rule"], "## Claims"]
    parts.append(_markdown(_claims(result)))
    parts += [f"{n}. {line}" for n, line in enumerate(_protocols(result), 1)]
    for name, table in _plotted(result):
        parts += [f"## {_TITLES[name]}", _markdown(table)]
    if result["layers"]:
        parts += [f"## {_TITLES['layers']}", report.markdown_table(result["layers"])]
    parts += ["## Runs", _markdown(_runs(result))]
    return "\n\n".join(parts) + "\n"


def _title(result: Result) -> str:
    scale = result["protocol"]["config"]["suite"]["scale"]
    return f"The paper's experiments at a small scale: {scale}"


def _claims(result: Result) -> Table:
    head = ("", "claim", "paper", "ours", "difference", "verdict")
    rows = [
        (
            str(number),
            f"{one['claim']} ({one['place']})",
            one["paper"],
            "; ".join(f"{name} {_spread(found)}" for name, found in one["ours"].items()) or "–",
            "; ".join(
                f"{d['of']}: {100 * d['mean']:+.1f} ± {100 * d['noise']:.1f}"
                for d in one["differences"]
            )
            or "–",
            one["verdict"],
        )
        for number, one in enumerate(result["claims"], 1)
    ]
    return head, rows


def _protocols(result: Result) -> Iterator[str]:
    for one in result["claims"]:
        seeds = sorted({s for found in one["ours"].values() for s in found["seeds"]})
        yield f"{one['protocol']}; seeds {', '.join(map(str, seeds))}" if seeds else "no runs"


def _plotted(result: Result) -> Iterator[tuple[str, Table]]:
    """Yield name and table of what is drawn too."""
    for name, sweep in result["sweeps"].items():
        if sweep:
            yield name, _sweep(name, sweep)
    if result["curve"]:
        yield "curve", _curve(result["curve"])


def _sweep(name: str, sweep: Mapping[str, Mapping[str, Any]]) -> Table:
    probes = next(iter(sweep.values()))
    head = (_HEADS[name], *map(probe_name, probes))
    rows = [
        (_value(name, value), *(_spread(found[probe]) for probe in probes))
        for value, found in sweep.items()
    ]
    return head, rows


def _value(name: str, value: str) -> str:
    return "never" if (name, value) == ("fig2_period", "0") else f"{int(value):,}"


def _curve(curve: Sequence[Mapping[str, float]]) -> Table:
    probes = [key for key in curve[-1] if key != "epoch"]
    rows = [
        (f"{p['epoch']:g}", *(f"{100 * p[k]:.1f}" if k in p else "–" for k in probes))
        for p in curve
    ]
    return ("epoch", *map(probe_name, probes)), rows


def _runs(result: Result) -> Table:
    rows = [
        (
            run["run"],
            "–" if run["seconds"] is None else f"{run['seconds']:.0f}",
            "done" if run["error"] is None else run["error"].splitlines()[0],
        )
        for run in result["runs"]
    ]
    return ("run", "seconds", "outcome"), rows


def _spread(found: Mapping[str, Any]) -> str:
    """Return mean ± standard deviation in percent, and over how many seeds."""
    if found["std"] is None:
        return f"{100 * found['mean']:.1f}"
    return f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"


def _markdown(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _html(table: Table) -> str:
    head, rows = table
    top = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f"<div class=scroll><table class=results><thead><tr>{top}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


# Long sentences stand in these tables, unlike in those of a run.
_WRAP = ".claims .results td { white-space: normal; vertical-align: top; }"


def _page(result: Result, drawn: Mapping[str, bytes]) -> str:
    title = html.escape(_title(result))
    rule = html.escape(result["protocol"]["rule"])
    notes = "".join(f"<li>{html.escape(line)}</li>" for line in _protocols(result))
    sections = [
        f"<section class=claims><h2>Claims</h2><p class=note>{rule}</p>"
        f"{_html(_claims(result))}<ol class=note>{notes}</ol></section>"
    ]
    for name, table in _plotted(result):
        sections.append(_section(_TITLES[name], _html(table), drawn.get(name)))
    if result["layers"]:
        body = f"<div class=scroll>{html_table(result['layers'])}</div>"
        sections.append(_section(_TITLES["layers"], body, None))
    sections.append(_section("Runs", _html(_runs(result)), None))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title} · nat_jax</title><style>{CSS}{_WRAP}</style></head>\n<body><main>"
        f"<p class=over>Predicting noise</p><h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</main></body></html>\n"
    )


def _section(title: str, body: str, picture: bytes | None) -> str:
    shown = ""
    if picture is not None:
        data = base64.b64encode(picture).decode()
        shown = (
            f'<figure><img alt="{html.escape(title)}" style="max-width:560px" '
            f'src="data:image/png;base64,{data}"></figure>'
        )
    return f"<section><h2>{html.escape(title)}</h2>{shown}{body}</section>"


def _plots(result: Result) -> Iterator[tuple[str, bytes]]:
    for name, sweep in result["sweeps"].items():
        if len(sweep) > 1:
            labels = [_value(name, value) for value in sweep]
            yield name, _plot(_HEADS[name], partial(_points, sweep=sweep, labels=labels))
    if len(result["curve"]) > 1:
        yield "curve", _plot("epoch", partial(_lines, curve=result["curve"]))


def _plot(words: str, draw: Callable[[Any], None]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_xlabel(words, color=INK)
    axes.set_ylabel("top-1 accuracy, %", color=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=FAINT, length=0)
    axes.legend(frameon=False, labelcolor=FAINT)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _points(axes: Any, sweep: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Draw mean and standard deviation of each probe over the values of a sweep."""
    for color, probe in zip(SERIES, next(iter(sweep.values())), strict=False):
        spreads = [found[probe] for found in sweep.values()]
        axes.errorbar(
            range(len(spreads)),
            [100 * spread["mean"] for spread in spreads],
            yerr=[100 * (spread["std"] or 0.0) for spread in spreads],
            color=color,
            marker="o",
            capsize=3,
            linewidth=1.2,
            label=probe_name(probe),
        )
    axes.set_xticks(range(len(labels)), labels)


def _lines(axes: Any, curve: Sequence[Mapping[str, float]]) -> None:
    for color, probe in zip(SERIES, (key for key in curve[-1] if key != "epoch"), strict=False):
        points = [(p["epoch"], 100 * p[probe]) for p in curve if probe in p]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", label=probe_name(probe))
