"""A suite's result as Markdown, as one self-contained HTML page, and as plots."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nat_jax import report
from nat_jax.report import charts, tables
from nat_jax.report.page import render
from nat_jax.report.tables import probe_name
from nat_jax.runtime import atomic_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
# {"mean", "std"} of accuracies in [0, 1]; std is None for one seed.
Spread = Mapping[str, Any]

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


class Measured(NamedTuple):
    """Accuracies over a sweep or over epochs, shown as a table and as a plot.

    Attributes:
        name: of the plot's file.
        title: of the section.
        x_label: what ``x`` is.
        x: values of a sweep as text, or epochs.
        accuracies: one for each x, by probe; None where a probe was not run.
    """

    name: str
    title: str
    x_label: str
    x: Sequence[str] | Sequence[float]
    accuracies: Mapping[str, Sequence[Spread | None]]

    def table(self) -> Table:
        """Return the accuracies in percent, a column for each probe."""
        first = (x if isinstance(x, str) else f"{x:g}" for x in self.x)
        columns = [map(_spread, found) for found in self.accuracies.values()]
        head = (self.x_label, *map(probe_name, self.accuracies))
        return Table(head, list(zip(first, *columns, strict=True)))

    def figure(self) -> "Figure":
        """Draw a line for each probe, with the standard deviation over the seeds."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for color, (probe, found) in zip(charts.SERIES, self.accuracies.items(), strict=False):
            deviations = [100 * (one["std"] or 0.0) if one else 0.0 for one in found]
            axes.errorbar(
                self.x,
                [100 * one["mean"] if one else math.nan for one in found],
                yerr=deviations if any(deviations) else None,
                color=color,
                marker="o",
                capsize=3,
                linewidth=1.2,
                label=probe_name(probe),
            )
        axes.set_xlabel(self.x_label, color=charts.INK)
        axes.set_ylabel("top-1 accuracy, %", color=charts.INK)
        charts.style_axes(axes)
        axes.legend(frameon=False, labelcolor=charts.FAINT)
        return figure


def result_file(workdir: Path) -> Path:
    """Return the path of a suite's result."""
    return workdir / "results" / "suite.json"


def write(result: Result, workdir: Path) -> Path:
    """Write ``results/suite.md``, ``pictures/suite_*.png`` and ``report.html`` into a workdir.

    Returns:
        The path of the last.
    """
    sections = []
    for measured in _measured(result):
        svg = ""
        if len(measured.x) > 1:
            figure = measured.figure()
            png = workdir / "pictures" / f"suite_{measured.name}.png"
            atomic_files.write(png, charts.png(figure))
            svg = charts.inline_svg(figure, measured.name)
        sections.append((measured.title, measured.table(), svg))
    atomic_files.write(workdir / "results" / "suite.md", markdown(result).encode())
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
    atomic_files.write(workdir / "report.html", page.encode())
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
    for measured in _measured(result):
        parts += [f"## {measured.title}", tables.markdown(*measured.table())]
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


def _measured(result: Result) -> Iterator[Measured]:
    for name, sweep in result["sweeps"].items():
        if sweep:
            values = [
                "never" if (name, value) == ("fig2_period", "0") else f"{int(value):,}"
                for value in sweep
            ]
            probes = next(iter(sweep.values()))
            found = {probe: [of_value[probe] for of_value in sweep.values()] for probe in probes}
            yield Measured(name, *_SWEEPS[name], values, found)
    if curve := result["curve"]:
        found = {
            probe: [{"mean": p[probe], "std": None} if probe in p else None for p in curve]
            for probe in curve[-1]
            if probe != "epoch"
        }
        epochs = [point["epoch"] for point in curve]
        yield Measured("curve", "Along training (figure 2, right)", "epoch", epochs, found)


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


def _spread(found: Spread | None) -> str:
    """Return mean ± standard deviation in percent."""
    if found is None:
        return "–"
    deviation = "" if found["std"] is None else f" ± {100 * found['std']:.1f}"
    return f"{100 * found['mean']:.1f}{deviation}"
