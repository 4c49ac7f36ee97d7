"""What ``benchmarks/step.py`` shows: the goals and the tables."""

from collections.abc import Iterable, Sequence
from typing import Any

_SHOWN = ("python", "jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _between(quartiles: Sequence[float]) -> str:
    return f"{quartiles[0]:.3f} to {quartiles[2]:.3f}"


def _what(pair: dict[str, Any]) -> str:
    if pair["what"] == "cycle":
        return f"three epochs, {pair['one']} / {pair['other']}"
    return f"{pair['one']} / {pair['other']}"


def _goal(goal: dict[str, Any]) -> list[str]:
    return [
        f"{goal['problem']}: {_what(goal)}",
        f"**{goal['quartiles'][1]:.3f}**",
        _between(goal["quartiles"]),
        f"{goal['cpu']:.3f}",
        f"{goal['asked']:.2f}",
        "yes" if goal["met"] else "**no**",
    ]


def _result(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"**{_number(row['ms'])}**",
        " to ".join(map(_number, row["quartiles"])),
        _number(row["cpu_ms"]),
        _number(row["images_per_second"]),
        _number(row["solver_ms"]) if "solver_ms" in row else "",
        f"{100 * row['solver_share']:.2g} %" if "solver_share" in row else "",
        _number(row["rounds"]) if "rounds" in row else "",
        f"{100 * row['share_of_peak']:.3g} %" if "share_of_peak" in row else "",
    ]


def _group(group: dict[str, Any]) -> str:
    head = [group["problem"]["name"], "ms a step", "quartiles", "CPU ms", "images/s"]
    head += ["host solves, ms", "of the step", "rounds", "of the peak"]
    pairs = [
        [_what(pair), f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{pair['cpu']:.3f}"]
        for pair in group["ratios"]
        for low, middle, high in [pair["quartiles"]]
    ]
    ratios = markdown(["times as long", "median", "quartiles", "by CPU time"], pairs)
    flops = group["flops_of_a_step"]
    counted = f"{flops / 1e9:,.0f} GFLOP a step; " if flops else ""
    turns = f"{counted}{group['steps_per_turn']} steps a turn.\n"
    return f"{markdown(head, map(_result, group['results']))}\n{turns}\n{ratios}"


def _starts(rows: Sequence[dict[str, Any]]) -> str:
    laps = list(rows[0]["seconds"])
    head = ["seconds of", *(f"{row['problem']}, programs {row['programs']}" for row in rows)]
    return markdown(head, ([lap, *(f"{row['seconds'][lap]:.2f}" for row in rows)] for lap in laps))


def _hosts(rows: Sequence[dict[str, Any]]) -> str:
    head = ["blocks of 256", "way", "ms", "of which solving", "bytes exchanged"]
    return markdown(
        head,
        (
            [
                str(row["blocks"]),
                row["way"],
                f"{row['ms']:.1f}",
                f"{row['solving_ms']:.1f}",
                f"{row['bytes_exchanged']:,}",
            ]
            for row in rows
        ),
    )


def tables(results: dict[str, Any]) -> str:
    """Return everything as one page of Markdown."""
    versions = ", ".join(f"{key} {results[key]}" for key in _SHOWN)
    settings = "".join(f"{name}={value} " for name, value in results["settings"].items())
    parts = [
        "# The train step\n",
        f"{results['machine']}; {results['device']}; {results['date']}; {versions}; seed "
        f"{results['seed']}. `{settings}{results['command']}`\n",
        f"Median over {results['rounds']} turns, A B C C B A, and quartiles; ratios are taken "
        "within rounds. What each step is stands in `benchmarks/step.py`.\n",
    ]
    head = ["goal", "ratio", "quartiles", "by CPU time", "at most", "met"]
    every = [goal for group in results["groups"] for goal in group["goals"]]
    parts += ["## Goals\n", markdown(head, map(_goal, every)), "## Steps\n"]
    parts += [_group(group) for group in results["groups"]]
    if results["start"]:
        parts += ["## First steps of a new process\n", _starts(results["start"])]
    if results["hosts"]:
        parts += ["## Two processes, a core each\n", _hosts(results["hosts"])]
    return "\n".join(parts)
