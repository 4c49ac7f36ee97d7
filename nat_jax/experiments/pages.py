"""A suite's result as Markdown, as one self-contained HTML page, and as plots."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nat_jax import report
from nat_jax.report import charts, tables
from nat_jax.report.page import render
from nat_jax.report.tables import probe_name
from nat_jax.training.workdir import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]

_SWEEPS = {
    "fig2_period": (
        "Re-matching every so many epochs (figure 2, left)",
        "epochs between re-matching",
    ),
    "discrete_targets": ("Discrete targets (text)", "k one-hot targets"),
}
_LAYERS = "Layers (table 3)"


class Table(NamedTuple):
    """A table of text."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def result_file(workdir: Path) -> Path:
    """Return the path of a suite's result."""
    return workdir / "results" / "suite.json"


def write(result: Result, workdir: Path) -> Path:
    """Write ``results/suite.md``, ``pictures/suite_*.png`` and ``report.html`` into a workdir.

    Returns:
        The path of the last.
    """
    sections = []
    for name, title, table, figure in _measured(result):
        svg = ""
        if figure is not None:
            write_whole(workdir / "pictures" / f"suite_{name}.png", charts.png(figure))
            svg = charts.inline_svg(figure, name)
        sections.append((title, table, svg))
    write_whole(workdir / "results" / "suite.md", markdown(result).encode())
    page = render(
        "experiments/suite.html",
        title=_title(result),
        source="",
        rule=result["protocol"]["rule"],
        claims=_claims(result),
        protocols=_protocols(result),
        sections=sections,
        layers_title=_LAYERS,
        layers=tables.arrange(result["layers"]),
        runs=_runs(result),
    )
    write_whole(workdir / "report.html", page.encode())
    return workdir / "report.html"


def text(result: Result) -> str:
    """Return one line for each claim, for a terminal."""
    lines = [f"{one['verdict']:14} {one['place']}: {one['claim']}" for one in result["claims"]]
    failed = sum(run["error"] is not None for run in result["runs"])
    if failed:
        lines.append(f"{failed} of {len(result['runs'])} runs have no result, see the report")
    return "\n".join(lines)


def markdown(result: Result) -> str:
    """Return the complete result as Markdown."""
    parts = [f"# {_title(result)}", result["protocol"]["rule"]]
    parts += ["## Claims", tables.markdown(*_claims(result))]
    parts += [f"{number}. {line}" for number, line in enumerate(_protocols(result), 1)]
    for _, title, table, _ in _measured(result):
        parts += [f"## {title}", tables.markdown(*table)]
    if result["layers"]:
        parts += [f"## {_LAYERS}", report.markdown_table(result["layers"])]
    parts += ["## Runs", tables.markdown(*_runs(result))]
    return "\n\n".join(parts) + "\n"


def _title(result: Result) -> str:
    scale = result["protocol"]["config"]["suite"]["scale"]
    return f"The paper's experiments at a small scale: {scale}"


def _claims(result: Result) -> Table:
    rows = []
    for number, one in enumerate(result["claims"], 1):
        ours = [f"{name} {_spread(found)}" for name, found in one["ours"].items()]
        differences = [
            f"{d['of']}: {100 * d['mean']:+.1f} ± {100 * d['noise']:.1f}"
            for d in one["differences"]
        ]
        cells = (f"{one['claim']} ({one['place']})", one["paper"], "; ".join(ours) or "–")
        rows.append((str(number), *cells, "; ".join(differences) or "–", one["verdict"]))
    return Table(("", "claim", "paper", "ours", "difference", "verdict"), rows)


def _protocols(result: Result) -> list[str]:
    """Return how each claim's numbers were measured, one line each."""
    lines = []
    for one in result["claims"]:
        seeds = sorted({seed for found in one["ours"].values() for seed in found["seeds"]})
        seeds_text = ", ".join(map(str, seeds))
        lines.append(f"{one['protocol']}; seeds {seeds_text}" if seeds else "no runs")
    return lines


def _measured(result: Result) -> Iterator[tuple[str, str, Table, "Figure | None"]]:
    """Yield name, title, table and plot of the sweeps and of the curve; one point has no plot."""
    for name, sweep in result["sweeps"].items():
        if not sweep:
            continue
        title, x_label = _SWEEPS[name]
        probes = list(next(iter(sweep.values())))
        values = [
            "never" if (name, value) == ("fig2_period", "0") else f"{int(value):,}"
            for value in sweep
        ]
        lines = [
            (value, *(_spread(found[probe]) for probe in probes))
            for value, found in zip(values, sweep.values(), strict=True)
        ]
        series = {
            probe: [(i, found[probe]) for i, found in enumerate(sweep.values())] for probe in probes
        }
        figure = _plot(x_label, series, values) if len(sweep) > 1 else None
        yield name, title, Table((x_label, *map(probe_name, probes)), lines), figure
    if curve := result["curve"]:
        probes = [key for key in curve[-1] if key != "epoch"]
        lines = [
            (f"{p['epoch']:g}", *(f"{100 * p[k]:.1f}" if k in p else "–" for k in probes))
            for p in curve
        ]
        series = {
            probe: [(p["epoch"], {"mean": p[probe], "std": None}) for p in curve if probe in p]
            for probe in probes
        }
        figure = _plot("epoch", series) if len(curve) > 1 else None
        table = Table(("epoch", *map(probe_name, probes)), lines)
        yield "curve", "Along training (figure 2, right)", table, figure


def _runs(result: Result) -> Table:
    rows = [
        (
            run["run"],
            "–" if run["seconds"] is None else f"{run['seconds']:.0f}",
            "done" if run["error"] is None else run["error"].splitlines()[0],
        )
        for run in result["runs"]
    ]
    return Table(("run", "seconds", "outcome"), rows)


def _spread(found: Mapping[str, Any]) -> str:
    """Return mean ± standard deviation in percent."""
    deviation = "" if found["std"] is None else f" ± {100 * found['std']:.1f}"
    return f"{100 * found['mean']:.1f}{deviation}"


def _plot(
    x_label: str,
    series: Mapping[str, Sequence[tuple[float, Mapping[str, Any]]]],
    ticks: Sequence[str] = (),
) -> "Figure":
    """Draw accuracies in percent.

    Args:
        x_label: of the horizontal axis.
        series: (position, {"mean", "std"}) of every point, by probe.
        ticks: labels of positions 0, 1, ...; empty for an axis of numbers.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for color, (probe, points) in zip(charts.SERIES, series.items(), strict=False):
        axes.errorbar(
            [position for position, _ in points],
            [100 * spread["mean"] for _, spread in points],
            yerr=[100 * (spread["std"] or 0.0) for _, spread in points] if ticks else None,
            color=color,
            marker="o",
            capsize=3,
            linewidth=1.2,
            label=probe_name(probe),
        )
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel(x_label, color=charts.INK)
    axes.set_ylabel("top-1 accuracy, %", color=charts.INK)
    charts.style_axes(axes)
    axes.legend(frameon=False, labelcolor=charts.FAINT)
    return figure
