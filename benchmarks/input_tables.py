"""What ``benchmarks/input_pipeline.py`` shows: the goals and the tables."""

from collections.abc import Iterable, Sequence
from typing import Any

# What is asked: shares of the limit, times PyTorch's rate, a share of the loop's time.
_LIMIT, _TFDS, _TIMES, _WAITING = 0.9, 0.6, 2.0, 0.02
_BUSY = 0.95  # the bare loops have the cores to themselves where they get as much of them
_KINDS = ("folder", "arrayrecord")
_SHOWN = ("python", "nat_jax", "numpy", "pillow", "simplejpeg", "grain", "torch", "torchvision")


def goals(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what was asked of the pipeline, and what it does."""
    found = []
    for group in results["groups"]:
        for pair in group["ratios"]:
            low, median, high = pair["quartiles"]
            asked = _asked(pair["one"], pair["other"])
            if asked is None:
                continue
            what = f"{group['name']}: {pair['one']} / {pair['other']}"
            goal = {"what": what, "value": median, "quartiles": [low, high], "cpu": pair["cpu"]}
            found.append(goal | {"asked": asked, "met": median >= asked})
    for row in results.get("waiting", ()):
        if "share" not in row:
            continue
        asked = _WAITING if row["load"] <= 0.75 else None
        found.append(
            {
                "what": f"share of a loop spent waiting, {row['kind']}, {row['step_ms']:.0f} ms a "
                f"step, batches of {row['batch']} (load {row['load']:.2f})",
                "value": row["share"],
                "asked": asked,
                "met": None if asked is None else row["share"] < asked,
            }
        )
    for photos, shares in results.get("parsing", {}).items():
        for who, share in shares.items():
            what = f"{photos}: share of parsing in a batch from tfds, {who}"
            found.append({"what": what, "value": share, "asked": None, "met": None})
    return found


def _asked(one: str, other: str) -> float | None:
    """Return the least ratio that is asked for, None where none is."""
    _, kind, decoder, *_ = one.split(", ")
    if other.startswith("PyTorch"):
        return _TIMES if decoder == "simplejpeg" and kind in _KINDS else None
    if other == f"limit, {decoder}" and "worker" not in one:
        return _LIMIT if kind in _KINDS else _TFDS if kind == "tfds" else None
    return None


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _goal(goal: dict[str, Any]) -> list[str]:
    value, asked = goal["value"], goal["asked"]
    between = "{:.3g} to {:.3g}".format(*goal["quartiles"]) if "quartiles" in goal else ""
    cpu = f"{goal['cpu']:.3g}" if goal.get("cpu") else ""
    met = "" if goal["met"] is None else "yes" if goal["met"] else "**no**"
    asked = "" if asked is None else f"{asked:.3g}"
    return [goal["what"], f"{value:.3g}", between, cpu, asked, met]


def _group(group: dict[str, Any]) -> str:
    rows = [
        [
            row["name"],
            row.get("decoder", ""),
            f"**{_number(row['images_per_second_per_core'])}**",
            " to ".join(map(_number, row["quartiles"])),
            _number(row["cpu_us_per_image"]),
            f"{100 * row['share_of_cores']:.0f} %",
        ]
        for row in group["results"]
    ]
    table = markdown(
        [group["name"], "decoder", "images/s per core", "quartiles", "CPU us an image", "of cores"],
        rows,
    )
    skipped = "".join(f"\nSkipped: {line}\n" for line in group["skipped"])
    return f"{table}{skipped}\n{_beside(group['ratios'])}"


def _beside(ratios: Sequence[dict[str, Any]]) -> str:
    """Return how many times as fast as the others ours is: a line for each of ours."""
    others = list(dict.fromkeys(pair["other"] for pair in ratios))
    cells = {(pair["one"], pair["other"]): f"{pair['quartiles'][1]:.3g}" for pair in ratios}
    rows = [
        [one, *(cells.get((one, other), "") for other in others)]
        for one in dict.fromkeys(pair["one"] for pair in ratios)
    ]
    return markdown(["times as fast as", *others], rows)


def _stages(photos: str, stages: dict[str, dict[str, float]]) -> str:
    rows: list[list[str]] = []
    for group, times in stages.items():
        rows += [[f"{group}: {name}", f"{value:.3g}"] for name, value in times.items()]
    return markdown([f"{photos}, one thread", "CPU us an image"], rows)


def _memory(row: dict[str, Any]) -> list[str]:
    first, last = row["rows"][0], row["rows"][-1]
    return [
        row["mode"],
        f"{last['batches']:,}",
        f"{row['images_per_second']:,}",
        f"{first['main_mb']:.0f} to {last['main_mb']:.0f}",
        f"{row.get('main_mb_for_1000_batches', float('nan')):.3g}",
        f"{first['workers_mb']:.0f} to {last['workers_mb']:.0f}",
        f"{row.get('workers_mb_for_1000_batches', float('nan')):.3g}",
    ]


def tables(results: dict[str, Any]) -> str:
    """Return everything as one page of Markdown."""
    versions = (f"{key} {results[key]}" for key in _SHOWN if key in results)
    parts = [
        "# Input pipeline\n",
        f"{results['machine']}, {results['date']}; {', '.join(versions)}; seed {results['seed']}. "
        f"`{results['command']}`\n",
        "Images per second and core: the median over turns of some seconds, A B C A B C, and the "
        "quartiles; every program in processes of its own, the files in the page cache. Shorter "
        "side 256, random crops of 224, mirror images, uint8, unless said otherwise.\n",
    ]
    shares = [
        row["share_of_cores"]
        for group in results["groups"]
        for row in group["results"]
        if row["name"].startswith("limit")
    ]
    if shares and min(shares) < _BUSY:
        parts.append(
            f"**The machine was busy with something else**: the bare loops got {min(shares):.0%} "
            "of the cores. Only the ratios by CPU time mean anything.\n"
        )
    if results["goals"]:
        head = ["goal: median of the ratios within rounds", "value", "quartiles"]
        head += ["by CPU time", "asked", "met"]
        parts += ["## Goals\n", markdown(head, map(_goal, results["goals"]))]
    if results["groups"]:
        parts.append("## Whole pipelines\n")
        parts += [_group(group) for group in results["groups"]]
    if results.get("stages"):
        parts.append("## Stages\n")
        parts += [_stages(photos, stages) for photos, stages in results["stages"].items()]
    measured = [row for row in results.get("memory", ()) if row.get("rows")]
    if measured:
        head = ["memory", "batches", "images/s", "main MB", "MB per 1,000 batches"]
        head += ["workers' MB", "MB per 1,000 batches"]
        parts += ["## Memory\n", markdown(head, map(_memory, measured))]
    return "\n".join(parts)
