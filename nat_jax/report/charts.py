"""Curves of a run, as one PNG or as single SVG panels that take their colours from a page."""

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nat_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Rows of metrics.jsonl per run (seed), by the run's label.
Runs = Mapping[str, Sequence[Mapping[str, float]]]

INK, FAINT, GRID = "#1c2430", "#6b7480", "#e3e6ea"
SERIES = ("#2f6fb0", "#c8642b", "#3f8f5f", "#8a5aa8", "#b08a1e", "#4a9aa5", "#b0486a", "#7a7a7a")
# The SVG panels name these instead, so that a page decides, also between light and dark.
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", GRID: "var(--grid)"} | {
    color: f"var(--series-{i})" for i, color in enumerate(SERIES)
}
_MOST_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Panel:
    """What one small chart shows.

    Attributes:
        title: its heading.
        note: one sentence for the reader.
        series: legend text of each metric shown.
        level: a value to draw as a dashed line, and its name.
        low: where the vertical axis starts at the latest; None: at the data.
        high: where it ends at the earliest; None: at the data.
        percent: whether values are shares.
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
        chance: cosine that matching reaches without any learning, drawn as a line.
        dim: D, drawn as the highest effective rank.
    """
    known = [
        Panel(
            "Loss",
            "Half the squared distance to the targets; 1 is no relation, 0 a match. "
            "Lower in epochs that re-match.",
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
            "Share of a re-matched batch that took another target.",
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
            _judged(runs),
            percent=True,
            marked=True,
        ),
    ]
    return [panel for panel in known if any(_points(runs, name) for name in panel.series)]


def _judged(runs: Runs) -> dict[str, str]:
    """Return the legend of evaluation metrics; of more than four, those with all labels."""
    names = dict.fromkeys(
        name for rows in runs.values() for row in rows for name in row if name.startswith("eval/")
    )
    chosen = [n for n in names if n.endswith("/all")] if len(names) > 4 else list(names)
    short = {"linear_probe": "linear", "mlp_probe": "MLP", "knn": "kNN"}
    legend = {}
    for name in (chosen or list(names))[: len(SERIES)]:
        words = [short.get(word, word) for word in name.split("/")[1:]]
        legend[name] = " ".join(words[:-1] if words[-1] == "all" else words)
    return legend


def _points(runs: Runs, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (epoch, value) of a metric for every run that has it, thinned to what shows."""
    found = {}
    for label, rows in runs.items():
        pairs = [
            (row.get("epoch", row.get("step", 0)), row[name])
            for row in rows
            if row.get(name) is not None and math.isfinite(row[name])
        ]
        if pairs:
            x, y = np.asarray(pairs, np.float64).T
            parts = min(len(x), _MOST_POINTS)
            found[label] = _thinned(x, parts), _thinned(y, parts)
    return found


def _thinned(values: np.ndarray, parts: int) -> np.ndarray:
    return np.asarray([part.mean() for part in np.array_split(values, parts)])


def _mean(points: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean curve of several runs at the epochs that all of them have."""
    shared = sorted(set.intersection(*(set(x.tolist()) for x, _ in points.values())))
    values = [
        [dict(zip(x.tolist(), y, strict=True))[e] for e in shared] for x, y in points.values()
    ]
    return np.asarray(shared), np.mean(values, axis=0) if shared else np.asarray([])


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
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
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


def svg(panel: Panel, runs: Runs) -> str:
    """Return one panel as an inline <svg> whose colours are CSS variables.

    The page defines --font, --ink, --faint, --grid and --series-0 .. --series-7.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6, 2.25), layout="constrained")
    _draw(figure.add_subplot(), panel, runs)
    # The salt makes ids equal between runs of the program and different between panels.
    with matplotlib.rc_context({"svg.hashsalt": panel.title, "svg.fonttype": "none"}):
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r'\1role="img"', text, count=1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text


def curves(
    runs: Runs | Sequence[Mapping[str, float]],
    *,
    chance: float | None = None,
    dim: int | None = None,
) -> bytes:
    """Draw every panel that the rows hold as one PNG.

    Args:
        runs: rows of ``metrics.jsonl``; of several runs (seeds) as {label: rows}, drawn as thin
            lines with their mean.
        chance: cosine that matching reaches without any learning, drawn as a line.
        dim: D, drawn as the highest effective rank.

    Returns:
        A PNG file.

    Raises:
        ValueError: the rows hold nothing to draw.
    """
    from matplotlib.figure import Figure

    labelled: Runs = runs if isinstance(runs, Mapping) else {"": runs}
    shown = panels(labelled, chance=chance, dim=dim)
    if not shown:
        raise InputError("curves: expected rows with train/, assign/ or eval/ metrics, got none")
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * lines), layout="constrained", dpi=150)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, panel in zip(grid, shown, strict=False):
        _draw(axes, panel, labelled)
        axes.set_title(panel.title, loc="left", fontsize=10.5, color=INK)
    for axes in grid[len(shown) :]:
        axes.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()
