"""Charts of a run's metrics, as inline SVG that follows a page's colours."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nat_jax.report.tables import probe_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Rows of metrics.jsonl per run (seed), by the run's label.
Runs = Mapping[str, Sequence[Mapping[str, float]]]

INK, FAINT, GRID = "#1c2430", "#6b7480", "#e3e6ea"
SERIES = ("#2f6fb0", "#c8642b", "#3f8f5f", "#8a5aa8", "#b08a1e", "#4a9aa5", "#b0486a", "#7a7a7a")
_MOST_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Panel:
    """The contents of one small chart.

    Attributes:
        title: its heading.
        note: one sentence that explains it.
        series: legend text of each metric shown.
        level: a value to draw as a dashed line, and its name.
        low: the vertical axis starts here or lower; None: at the data.
        high: the vertical axis ends here or higher; None: at the data.
        percent: whether values are shares in [0, 1], labelled in percent.
        marked: whether the points are drawn too.
    """

    title: str
    note: str
    series: Mapping[str, str]
    level: tuple[float, str] | None = None
    low: float | None = None
    high: float | None = None
    percent: bool = False
    marked: bool = False


def panels(runs: Runs, *, chance: float | None = None, dim: int | None = None) -> list[Panel]:
    """Return the panels for which the runs hold at least one value.

    Args:
        runs: rows of metrics by run.
        chance: mean cosine that matching reaches without any learning, drawn as a line.
        dim: D, drawn as the highest effective rank.
    """
    known = [
        Panel(
            "Loss",
            "Half the squared distance to the targets; 1 is no relation, 0 a match. "
            "Lower after images are re-matched.",
            {"train/loss": ""},
            low=0.0,
        ),
        Panel(
            "Cosine to the targets",
            "Before and after matching; chance is what matching gives without learning.",
            {"assign/cosine_before": "before", "assign/cosine_after": "after"},
            level=None if chance is None else (chance, "chance"),
            low=0.0,
            marked=True,
        ),
        Panel(
            "Images that moved",
            "Share of the re-matched images that took another target.",
            {"assign/moved": ""},
            low=0.0,
            high=1.0,
            percent=True,
            marked=True,
        ),
        Panel(
            "Effective rank",
            "Dimensions that the features fill; a fall towards 1 is a collapse.",
            {"features/effective_rank": ""},
            level=None if dim is None else (dim, f"D = {dim}"),
            low=0.0,
            marked=True,
        ),
        Panel("Learning rate", "", {"train/learning_rate": ""}, low=0.0),
        Panel(
            "Accuracy during training",
            "Top-1 of the probes on the test records.",
            _accuracies(runs),
            percent=True,
            marked=True,
        ),
    ]
    return [panel for panel in known if any(_points(runs, name) for name in panel.series)]


def _accuracies(runs: Runs) -> dict[str, str]:
    """Return the legend of the metrics eval/LAYER/PROBE/LABELS.

    If there are more than four, those with few labels are left out.
    """
    names = dict.fromkeys(
        name for rows in runs.values() for row in rows for name in row if name.startswith("eval/")
    )
    chosen = [n for n in names if n.endswith("/all")] if len(names) > 4 else list(names)
    return {
        name: " ".join(probe_name(word) for word in name.split("/")[1:] if word != "all")
        for name in (chosen or list(names))[: len(SERIES)]
    }


def _points(runs: Runs, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (epochs, values) of a metric by run; long series are averaged to 400 points."""
    found = {}
    for label, rows in runs.items():
        pairs = [
            (row.get("epoch", row.get("step", 0)), row[name])
            for row in rows
            if row.get(name) is not None and math.isfinite(row[name])
        ]
        if pairs:
            parts = np.array_split(np.asarray(pairs, np.float64), min(len(pairs), _MOST_POINTS))
            x, y = np.asarray([part.mean(axis=0) for part in parts]).T
            found[label] = x, y
    return found


def _mean(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean curve of several runs at the epochs that all of them have."""
    curves = [dict(zip(x.tolist(), y, strict=True)) for x, y in points.values()]
    shared = sorted(set.intersection(*map(set, curves)))
    means = [float(np.mean([curve[epoch] for curve in curves])) for epoch in shared]
    return np.asarray(shared), np.asarray(means)


def _draw(axes: "Axes", panel: Panel, runs: Runs) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for color, (name, legend) in zip(SERIES, panel.series.items(), strict=False):
        points = _points(runs, name)
        if not points:
            continue
        several = len(points) > 1
        for x, y in points.values():
            few = len(x) == 1 or (panel.marked and len(x) <= 60 and not several)
            axes.plot(
                x,
                y,
                color=color,
                linewidth=0.8 if several else 1.6,
                alpha=0.45 if several else 1.0,
                marker="o" if few else None,
                markersize=2.8,
                label=None if several else legend or None,
            )
        if several:
            axes.plot(*_mean(points), color=color, linewidth=1.9, label=legend or None)
    if panel.level is not None:
        value, text = panel.level
        axes.axhline(value, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)), label=text)
    low, high = axes.get_ylim()
    if panel.low is not None:
        low = min(low, panel.low) if low < -0.05 * high else panel.low
    if panel.high is not None:
        high = max(high, panel.high)
    axes.set_ylim(low, high if high > low else low + 1)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axes.get_xlim()[1] > 3))
    if panel.percent:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
    axes.set_xlabel("epoch", color=FAINT, fontsize=9, loc="right", labelpad=1)
    axes.tick_params(labelsize=9)
    style_axes(axes)
    if shown := len(axes.get_legend_handles_labels()[1]):
        # Below the axes, where it never hides a curve.
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, -0.22),
            ncols=min(shown, 3 if panel.level else 2),
            frameon=False,
            fontsize=9,
            labelcolor=FAINT,
            handlelength=1.4,
            columnspacing=1.4,
            borderpad=0,
        )


def style_axes(axes: "Axes") -> None:
    """Reduce the frame of a chart to faint horizontal lines."""
    axes.tick_params(colors=FAINT, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def inline_svg(figure: "Figure", name: str) -> str:
    """Return a figure as an <svg> element for a page with report/style.css.

    INK, FAINT, GRID and SERIES become the CSS variables --ink, --faint, --grid and --series-<i>,
    and the style sheet sets the font and the size, so that the chart is readable in light and dark.

    Args:
        figure: drawn in those colours.
        name: differs between the charts of one page; it keeps their element ids apart.
    """
    import matplotlib

    file = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Text stays text, measured in one font; the salt makes ids reproducible.
    with matplotlib.rc_context(
        {"svg.hashsalt": name, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    ):
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg", '<svg role="img"', 1)
    text = text.replace('<g id="', f'<g id="{name.replace(" ", "-")}-')
    for color, variable in zip((INK, FAINT, GRID), ("--ink", "--faint", "--grid"), strict=True):
        text = text.replace(color, f"var({variable})")
    for i, color in enumerate(SERIES):
        text = text.replace(color, f"var(--series-{i}, {color})")
    return text


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def svg(panel: Panel, runs: Runs) -> str:
    """Return one panel as an inline <svg>; see ``inline_svg``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.25), layout="constrained")
    _draw(figure.add_subplot(), panel, runs)
    return inline_svg(figure, panel.title)
