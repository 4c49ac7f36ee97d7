"""What ``benchmarks/assign.py`` shows: tables, the targets and a chart."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from assign_problems import FEATURES, OTHERS

from nat_jax.report.charts import FAINT, GRID, INK, SERIES

Row = dict[str, Any]

_WRONG = 1e-6
# The solver that is timed, the shape, a rival, and how many times as fast the solver should be:
# what is asked, and what would be a triumph.
_TARGETS = (
    ("256", "scipy", 1.0, None),
    ("256", "optax", 4.0, None),
    ("256", "lapx lapjvr", None, 1.0),
    ("1024", "scipy", 2.0, None),
    ("1024", "optax", 10.0, None),
    ("1024", "lapx lapjvr", None, 1.0),
    ("4096", "scipy", 3.0, None),
    ("4096", "lapx lapjvr", None, 1.0),
    ("32x256", "lapx lapjvr_batch", 0.5, 1.0),
)
_WORST = 1 / 1.5  # of SciPy's speed, in any family at n = 256
_WARM = (3.0, 10.0)  # times as fast as from cold, on late costs
_COLOURS = {
    "auction": SERIES[0],
    "scipy": SERIES[1],
    "lapx lapjvr": SERIES[2],
    "lapx lapjvx": SERIES[5],
    "lapjv": SERIES[4],
    "pure_callback to lapx": SERIES[6],
    "optax": SERIES[3],
    "ott sinkhorn": SERIES[7],
}


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(results: Iterable[Row], shape: str, solver: str) -> dict[str, float]:
    """Return the CPU ms of a solver by family."""
    return {
        row["family"]: row["cpu_ms"]
        for row in results
        if (row["shape"], row["solver"]) == (shape, solver) and row["cpu_ms"] is not None
    }


def _geomean(times: dict[str, float], families: Iterable[str]) -> float | None:
    """Return the geometric mean over the families, None if one is missing."""
    values = [times.get(family) for family in families]
    return None if None in values or not values else statistics.geometric_mean(values)


def targets(results: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what was asked of the solver, and what it does.

    Means are over those of the five families that both solvers did.
    """
    found = []
    for shape, rival, asked, triumph in _TARGETS:
        mine, theirs = _times(results, shape, "auction"), _times(results, shape, rival)
        shared = [family for family in FEATURES if family in mine and family in theirs]
        if shared:
            what = f"{shape}, geometric mean of {len(shared)} families"
            times = _geomean(mine, shared), _geomean(theirs, shared)
            found.append(_target(what, "auction", times[0], rival, times[1], asked, triumph))
    mine, theirs = _times(results, "256", "auction"), _times(results, "256", "scipy")
    shared = [family for family in (*FEATURES, *OTHERS) if family in mine and family in theirs]
    if shared:
        worst = min(shared, key=lambda family: theirs[family] / mine[family])
        what = f"256, the worst family ({worst})"
        found.append(_target(what, "auction", mine[worst], "scipy", theirs[worst], _WORST, None))
    for shape in ("256", "1024"):
        cold = _times(results, shape, "auction")
        for start in ("auction, prices", "auction, rises", "auction, similar"):
            for family, warm in _times(results, shape, start).items():
                if family.endswith(" late"):
                    what = f"{shape}, {family}"
                    found.append(
                        _target(what, start, warm, "auction from cold", cold[family], *_WARM)
                    )
    return found


def _target(
    what: str,
    solver: str,
    mine: float,
    rival: str,
    theirs: float,
    asked: float | None,
    triumph: float | None,
) -> dict[str, Any]:
    times = float(f"{theirs / mine:.3g}")
    return {
        "what": what,
        "solver": solver,
        "ms": float(f"{mine:.4g}"),
        "rival": rival,
        "rival_ms": float(f"{theirs:.4g}"),
        "times_as_fast": times,
        "asked": asked,
        "met": None if asked is None else times >= asked,
        "hoped": triumph,
        "reached": None if triumph is None else times >= triumph,
    }


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _by_family(results: Sequence[Row], shape: str, families: Sequence[str], mean: bool) -> str:
    """Return the table of one shape: a line for each solver, a column for each family."""
    cells = {
        (row["solver"], row["family"]): row
        for row in results
        if row["shape"] == shape and row["family"] in families
    }
    solvers = list(dict.fromkeys(solver for solver, _ in cells))
    lines = []
    for solver in solvers:
        times = _times(results, shape, solver)
        line = [solver]
        if mean:
            value = _geomean(times, FEATURES)
            line.append("-" if value is None else f"**{_ms(value)}**")
        for family in families:
            row = cells.get((solver, family))
            if row is None:
                line.append("")
            elif row["cpu_ms"] is None:
                line.append("-")
            else:
                line.append(_ms(row["cpu_ms"]) + "*" * (row["gap"] > _WRONG))
        lines.append(line)
    return _markdown([shape, *["mean"] * mean, *families], lines)


def _yes(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "**no**"


def tables(measured: dict[str, Any]) -> str:
    """Return everything as one page of Markdown."""
    results = measured["results"]
    shapes = list(dict.fromkeys(row["shape"] for row in results))
    there = dict.fromkeys(row["family"] for row in results)
    families = [family for family in (*FEATURES, *OTHERS) if family in there]
    saved = [family for family in there if family not in families]
    versions = (f"{key} {value}" for key, value in measured.items() if key in _SHOWN)
    parts = [
        "# Assignment solvers\n",
        f"{measured['machine']}, {measured['date']}; {', '.join(versions)}. Median CPU "
        "milliseconds of one call, one thread, float32 costs; the geometric mean over problems. "
        "`mean` is that over sphere, near-collapsed, half-way, clustered and matched. -: not run, "
        "too slow. *: the total is more than 1e-6 above the optimum.\n",
        "## Targets\n",
        _markdown(
            ["what", "solver", "ms", "rival", "ms", "times as fast", "asked", "met", "hoped for"],
            (
                [
                    target["what"],
                    target["solver"],
                    _ms(target["ms"]),
                    target["rival"],
                    _ms(target["rival_ms"]),
                    f"{target['times_as_fast']:.3g}",
                    "" if target["asked"] is None else f"{target['asked']:.2g}",
                    _yes(target["met"]),
                    "" if target["hoped"] is None else f"{target['hoped']:.2g}",
                ]
                for target in measured["targets"]
            ),
        ),
    ]
    for title, group, mean in (
        ("Families", families, True),
        ("Costs of training", saved, False),
    ):
        if group:
            parts.append(f"## {title}\n")
        for shape in shapes:
            used = [
                family
                for family in group
                if any((row["shape"], row["family"]) == (shape, family) for row in results)
            ]
            if used:
                parts.append(_by_family(results, shape, used, mean and set(FEATURES) <= set(used)))
    compiled = {
        (row["solver"], row["shape"]): row["seconds"] for row in measured["compile_seconds"]
    }
    head = [shape for shape in shapes if any(shape == key for _, key in compiled)]
    lines = [
        [solver, *(f"{compiled[solver, s]:.2g}" if (solver, s) in compiled else "" for s in head)]
        for solver in dict.fromkeys(solver for solver, _ in compiled)
    ]
    parts += ["## Seconds to compile\n", _markdown(["solver", *head], lines)]
    overhead = measured["call_overhead_ms"].items()
    parts += [
        "## One call of the auction\n",
        _markdown(["how", "ms"], ((k, _ms(v)) for k, v in overhead)),
    ]
    return "\n".join(parts)


_SHOWN = ("python", "jax", "scipy", "lapx", "lapjv", "optax", "ott-jax")


def plot(results: Sequence[Row], path: Path) -> None:
    """Draw time against size, and the families side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.6), width_ratios=(1, 1.15), layout="constrained"
    )
    sizes = sorted({int(row["shape"]) for row in results if "x" not in row["shape"]})
    for solver, colour in _COLOURS.items():
        means = [_geomean(_times(results, str(n), solver), FEATURES) for n in sizes]
        known = [(n, value) for n, value in zip(sizes, means, strict=True) if value is not None]
        mine = solver == "auction"
        if known:
            left.plot(
                *zip(*known, strict=True),
                color=colour,
                linewidth=2.6 if mine else 1.4,
                marker="o",
                markersize=5 if mine else 3.5,
                zorder=3 if mine else 2,
                label=solver,
            )
    left.set(xscale="log", yscale="log", title="Time against size", xlabel="n")
    left.set_xticks(sizes, [str(n) for n in sizes])
    left.minorticks_off()

    shape = str(max((n for n in sizes if n <= 1024), default=sizes[-1]))
    there = dict.fromkeys(row["family"] for row in results if row["shape"] == shape)
    families = [f for f in there if f in FEATURES or f in OTHERS or f.endswith((" early", " late"))]
    for solver, colour in _COLOURS.items():
        times = _times(results, shape, solver)
        known = [(times[f], -i) for i, f in enumerate(families) if f in times]
        mine = solver == "auction"
        if known:
            x, y = zip(*known, strict=True)
            right.scatter(x, y, color=colour, s=64 if mine else 24, zorder=3 if mine else 2)
    right.set(xscale="log", title=f"n = {shape}, by kind of cost")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    left.yaxis.set_major_formatter(plain)
    right.xaxis.set_major_formatter(plain)
    right.set_yticks([-i for i in range(len(families))], [f.replace("_", "-") for f in families])
    for axes in (left, right):
        axes.set_title(axes.get_title(), loc="left", color=INK, fontsize=11)
        axes.set_title("")
        axes.tick_params(colors=FAINT, labelsize=9, length=0, which="both")
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.xaxis.label.set_color(FAINT)
        for spine in axes.spines.values():
            spine.set_color(GRID)
    left.set_ylabel("CPU milliseconds, one thread", color=FAINT)
    right.set_xlabel("CPU milliseconds, one thread", color=FAINT)
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
        labelcolor=FAINT,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
