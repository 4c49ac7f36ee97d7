"""The tables of benchmarks/collectives.py."""

import math
from collections.abc import Iterable

from collectives_read import (
    BYTES,
    CHANNELS,
    FEATURES,
    GRADIENT,
    INTEGERS,
    SCALARS,
    SOLUTION,
    WEIGHTS,
)

COLUMNS = {
    "gradients": (GRADIENT,),
    "sums over channels": (CHANNELS,),
    "features, target rows": (FEATURES,),
    "indices, rows, solutions, weights": (INTEGERS, SOLUTION, WEIGHTS),
    "single numbers": (SCALARS,),
}


def carried(row: dict, names: Iterable[str]) -> tuple[int, int]:
    """Return how many arrays of some sorts a step exchanges, and their bytes."""
    sizes = [
        math.prod(shape) * BYTES.get(dtype, 4)
        for each in row["collectives"]
        for name, dtype, shape in each["parts"]
        if name in names
    ]
    return len(sizes), sum(sizes)


def memory(row: dict) -> int:
    """Return the bytes that a device needs, in the program that needs most."""
    return max(program["bytes"]["all"] for program in row["programs"])


def line(row: dict) -> str:
    """Return what to print of a step."""
    seconds = sum(program["seconds"] for program in row["programs"])
    count = sum(program["collectives"] for program in row["programs"])
    return (
        f"{row['target']:14} {row['records']:>13,} images, {row['batch']:7,} a batch, "
        f"{row['variant']:16} {count:3} collectives, {_size(row['sent']):>9} sent, "
        f"{_size(memory(row)):>9} a device, compiled in {seconds:.0f} s"
        + (f", {len(row['faults'])} FAULTS" if row["faults"] else "")
    )


def page(rows: list[dict]) -> str:
    """Return the page of all steps."""
    head = ["devices", "images", "batch", "block", "step", "collectives", *COLUMNS]
    head += ["sent by each device", "memory of a device"]
    lines = [
        "# What the devices of a pod exchange",
        "",
        "Read from compiled programs by `python benchmarks/collectives.py --output",
        "docs/results/collectives.json`; nothing ran. The step is that of `configs/alexnet.py`. A",
        'cell is "arrays x: bytes of them as wholes". "Sent" is by each device and step, if every',
        "exchange is a ring; memory includes parameters, the batch and temporary arrays. A step",
        "that matches on the hosts is two programs: its collectives are those of both, its memory",
        "that of the larger one. [`collectives.json`](collectives.json) has every collective.",
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * 3 + "---|" + "---:|" * (len(head) - 5),
    ]
    for row in rows:
        cells = [row["target"], f"{row['records']:,}", f"{row['batch']:,}", f"{row['block']:,}"]
        cells += [row["variant"], str(sum(p["collectives"] for p in row["programs"]))]
        for names in COLUMNS.values():
            count, size = carried(row, names)
            cells.append(f"{count} x: {_size(size)}" if count else "")
        cells += [_size(row["sent"]), _size(memory(row))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"
