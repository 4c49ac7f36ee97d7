"""The tables of ``input_pipeline.py``."""

import statistics
from typing import Any

import measure
from measure import number

PACKAGES = ("nat_jax", "numpy", "pillow", "simplejpeg", "grain", "array_record", "jax")
OTHERS = ("torch", "torchvision", "tensorflow")
KINDS = ("folder", "arrayrecord")
FASTER = "simplejpeg"
_BUSY = 0.95  # below this share of the cores for the limit, other work disturbed the turns


def tables(results: dict[str, Any]) -> str:
    """Return everything as one page of Markdown."""
    parts = [
        "# Input pipeline\n",
        f"{measure.described(results, *PACKAGES, *OTHERS)}; seed {results['seed']}. "
        f"`{results['command']}`\n",
        *_pipelines(results),
    ]
    return "\n".join([*parts, *_files(results)])


def _pipelines(results: dict[str, Any]) -> list[str]:
    parts = []
    if results["groups"]:
        parts.append(
            "Images per second and core: the median over turns of some seconds and the quartiles; "
            "every program in processes of its own, the files in the page cache. Shorter side 256, "
            "random crops of 224, mirror images, uint8, unless stated otherwise.\n"
        )
    rows = [row for group in results["groups"] for row in group["results"]]
    shares = [row["share_of_cores"] for row in rows if row["name"].startswith("limit")]
    if shares and min(shares) < _BUSY:
        parts.append(
            f"**The machine was busy with something else**: the bare loops got {min(shares):.0%} "
            "of the cores. Only the ratios by CPU time mean anything.\n"
        )
    for group in results["groups"]:
        cells = [
            [
                *(row["name"], row.get("decoder", "")),
                f"**{number(row['images_per_second_per_core'])}**",
                " to ".join(map(number, row["quartiles"])),
                number(row["cpu_us_per_image"]),
                f"{100 * row['share_of_cores']:.0f} %",
            ]
            for row in group["results"]
        ]
        head = [group["name"], "decoder", "images/s per core", "quartiles", "CPU us an image"]
        parts.append(measure.table([*head, "of cores"], cells))
        pairs = {(r["one"], r["other"]): f"{r['quartiles'][1]:.3g}" for r in group["ratios"]}
        parts.append(measure.pivot("times as fast as", pairs))
    return parts


def _files(results: dict[str, Any]) -> list[str]:
    if "first" not in results:
        return []
    data, starts = results["data"], results["starts"]
    first, again = results["first"]["points"], results["again"]["points"]
    rows = [
        [
            name,
            *(
                f"{points[name][key]:{form}}"
                for points in (first, again)
                for key, form in (("seconds", ".3g"), ("own", ".0f"), ("mapped", ".0f"))
            ),
        ]
        for name in first
    ]
    head = ["point", "first s", "own MB", "mapped MB", "again s", "own MB", "mapped MB"]
    checks = {**results["first"]["checks"], **results["again"]["checks"]}
    return [
        f"## A folder of {data['files']:,} images\n",
        f"{data['different']:,} different files of {data['bytes'] / data['files']:,.0f} bytes on "
        f"average; {results['index_bytes']:,} bytes of index. `own MB` and `mapped MB`: resident "
        "memory after that point.\n",
        measure.table(head, rows),
        f"Opened again, in {len(starts)} new processes: median "
        f"{1000 * statistics.median(starts):.0f} ms ({1000 * min(starts):.0f} to "
        f"{1000 * max(starts):.0f}).\n",
        *(f"- {what}: {'yes' if good else 'NO'}" for what, good in checks.items()),
        "",
    ]
