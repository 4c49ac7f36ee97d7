"""Open a folder of 200,000 images: how long it takes, what stays in memory, and what follows.

    python benchmarks/many_files.py --data DIR --scratch DIR --quick
    python benchmarks/many_files.py --data DIR --scratch DIR --output docs/results/many_files.json

ImageNet's layout without ImageNet: train/ and val/ with 1,000 class folders each and names of its
length, filled with small JPEG files made from cifar10.zip in ``--data`` (as they are, mirrored,
cropped, at several qualities, so that they differ). A fresh process each time opens the folder,
first without an index, then with the one that the first has kept; looks up the order of a whole
epoch, and checks that every record comes once; reads random records; and takes an epoch of batches,
checked in the same way. Memory is the process's resident memory, that of its own and that of files
mapped into it, which processes share. The files are in the page cache.
"""

import argparse
import datetime
import hashlib
import io
import json
import os
import pickle
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import hardware
from PIL import Image

_CLASSES = 1000
_VAL = 26  # one file in so many, as in ImageNet
_IMAGENET, _MANY = 1_281_167, 10**9
_DIM = 2048  # of the paper's features
_BATCH = 256
_SETTLE = 3  # seconds: what has just changed is not kept in an index


def write_files(archive: Path, folder: Path, count: int, seed: int) -> dict[str, int]:
    """Write the images; return how many there are, how many differ, and their bytes."""
    draw = random.Random(seed)
    digests, size = set(), 0
    for number, image in zip(range(count), _images(archive, draw), strict=False):
        label = f"n{1_440_764 + number % _CLASSES:08}"
        split = "val" if number // _CLASSES % _VAL == 0 else "train"
        path = folder / split / label / f"{label}_{10_000 + number // _CLASSES}.JPEG"
        if number < _CLASSES * (_VAL + 1):
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
        digests.add(hashlib.sha1(image).digest())
        size += len(image)
    return {"files": count, "different": len(digests), "bytes": size}


def _images(archive: Path, draw: random.Random) -> Iterator[bytes]:
    """Yield JPEG files without end: first those of the archive, then what is made of them."""
    with zipfile.ZipFile(archive) as opened:
        files = [opened.read(name) for name in opened.namelist() if name.endswith(".jpg")]
    draw.shuffle(files)
    yield from files
    while True:
        for data in files:
            image: Image.Image = Image.open(io.BytesIO(data))
            if draw.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            left, top = draw.randrange(5), draw.randrange(5)
            made = io.BytesIO()
            image.crop((left, top, left + 28, top + 28)).save(
                made, "JPEG", quality=draw.randrange(70, 95)
            )
            yield made.getvalue()


def memory() -> dict[str, float]:
    """Return the resident MB of this process: its own, those of mapped files, and the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {key: int(rest.split()[0]) for key, _, rest in map(_parted, lines) if "kB" in rest}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    known = {"own": kilobytes["RssAnon"], "mapped": kilobytes["RssFile"], "peak": peak}
    return {key: round(value / 1000, 1) for key, value in known.items()}


def _parted(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def opening(spec: dict[str, Any]) -> dict[str, Any]:
    """Open the folder and do nothing else."""
    from nat_jax.input.sources import open_source

    begin = time.perf_counter()
    source = open_source(spec["source"], "train")
    opened = time.perf_counter() - begin
    source[0]
    return {"open_seconds": opened, "first_record_seconds": time.perf_counter() - begin}


def using(spec: dict[str, Any]) -> dict[str, Any]:
    """Open the folder and use it as training does; note time and memory at every point."""
    begin = time.perf_counter()
    import grain  # noqa: F401 (batches need it, and should not pay for it)
    import numpy as np

    from nat_jax.input import counter_random, pipeline, transforms
    from nat_jax.input.sources import open_source

    points: dict[str, dict[str, float]] = {}

    def point(name: str, **more: float) -> None:
        nonlocal begin
        points[name] = {"seconds": round(time.perf_counter() - begin, 4), **more, **memory()}
        begin = time.perf_counter()

    point("libraries imported")
    source = open_source(spec["source"], "train")
    point("opened", records=len(source))
    count = len(source)
    digest = source.fingerprint
    point("fingerprint")

    order = counter_random.stream(spec["seed"], 0)
    seen = np.zeros(count, np.uint8)
    for start in range(0, count, _BATCH):
        positions = np.arange(start, min(start + _BATCH, count))
        seen[counter_random.shuffled(positions, count, order)] += 1
    whole = bool((seen == 1).all())
    point("an epoch's order")

    chosen = np.random.default_rng(spec["seed"]).integers(0, count, spec["reads"]).tolist()
    size = sum(len(source[i]["image"]) for i in chosen)
    point("random records read", records=len(chosen), bytes=size)

    seen[:] = 0
    steps = pipeline.steps_per_epoch(count, _BATCH)
    batches: Any = pipeline.train_batches(
        source,
        transforms.train_transform(image_size=32),
        batch_size=_BATCH,
        seed=spec["seed"],
        start_step=0,
        num_steps=steps,
        threads=spec["threads"],
    )
    for batch in batches:
        seen[batch["index"]] += 1
    once = bool(seen.max() == 1 and seen.sum() == steps * _BATCH)
    point("an epoch of batches", images=steps * _BATCH)

    pickled = pickle.dumps(source)
    point("pickled for a worker", bytes=len(pickled))
    again = pickle.loads(pickled)
    same = again.fingerprint == digest and again[count - 1] == source[count - 1]
    point("unpickled")
    checks = {"order visits every record once": whole, "batches visit no record twice": once}
    return {"points": points, "checks": {**checks, "pickling keeps the records": same}}


def start(spec: dict[str, Any], cache: Path) -> dict[str, Any]:
    """Do something in a fresh process with its index kept in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(spec)],
        env={**environment, "NAT_JAX_CACHE": str(cache), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{spec['what']}: exit code {done.returncode}")
    return json.loads(done.stdout)


def bytes_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def projection(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what more records would take, with the arithmetic."""
    files = results["data"]["files"]
    index = results["index_bytes"] / files
    listing = results["first"]["points"]["opened"]["seconds"] / files
    found = []
    for count in (_IMAGENET, _MANY):
        lines = {
            "index of a folder": (index, f"{index:.1f} B x N, measured, on disk and mapped"),
            "index of array_record files": (0, "a number for each shard"),
            "order of an epoch": (0, "looked up, nothing is kept"),
            "assignment": (4, "int32: 4 B x N, over all devices"),
            "table of targets": (4 * _DIM, f"float32: 4 B x {_DIM} x N, over all devices"),
            "virtual targets": (0, "computed when they are looked up"),
        }
        for what, (each, how) in lines.items():
            found.append({"records": count, "what": what, "bytes": round(each * count), "how": how})
        how = f"{1e6 * listing:.1f} us x N, measured on this disk"
        row = {"records": count, "what": "first open of a folder", "how": how}
        found.append(row | {"seconds": round(listing * count, 1)})
    return found


def table(results: dict[str, Any]) -> str:
    """Return what was measured as Markdown."""
    first, again = results["first"]["points"], results["again"]["points"]
    data = results["data"]
    lines = [
        f"# A folder of {data['files']:,} images\n",
        f"{results['machine']}, {results['date']}; python {results['python']}, numpy "
        f"{results['numpy']}; seed {results['seed']}. {data['different']:,} different files of "
        f"{data['bytes'] / data['files']:,.0f} bytes on average; {results['index_bytes']:,} bytes "
        "of index. `own MB` and `mapped MB`: resident memory after that point.\n",
        "| point | first s | own MB | mapped MB | again s | own MB | mapped MB |",
        "|---|" + "---:|" * 6,
    ]
    for name in first:
        cells = [
            f"{points[name]['seconds']:.3g} | {points[name]['own']:.0f} | "
            f"{points[name]['mapped']:.0f}"
            for points in (first, again)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    starts = results["starts"]
    lines += [
        f"\nOpened again, in {len(starts)} fresh processes: median "
        f"{1000 * statistics.median(starts):.0f} ms ({1000 * min(starts):.0f} to "
        f"{1000 * max(starts):.0f}).\n",
        "| records | what | needed | how |",
        "|---:|---|---:|---|",
    ]
    for row in results["projection"]:
        needed = f"{row['seconds']:,.0f} s" if "seconds" in row else f"{row['bytes'] / 1e6:,.0f} MB"
        lines.append(f"| {row['records']:,} | {row['what']} | {needed} | {row['how']} |")
    checks = {**results["first"]["checks"], **results["again"]["checks"]}
    lines += ["", *(f"- {what}: {'yes' if good else 'NO'}" for what, good in checks.items()), ""]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of cifar10.zip")
    parser.add_argument("--scratch", type=Path, help="for the images; used again where they are")
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--reads", type=int, default=5_000)
    parser.add_argument("--starts", type=int, default=7, help="fresh processes that open it again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="12,000 files, in under a minute")
    parser.add_argument("--output", type=Path, help="JSON; the tables go beside it as .md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and not (arguments.data and arguments.scratch):
        parser.error("--data and --scratch are needed")
    if arguments.quick:
        arguments.files, arguments.reads, arguments.starts = 12_000, 500, 2
    return arguments


def make_data(arguments: argparse.Namespace) -> tuple[Path, dict[str, int]]:
    """Return the folder of the images and what is in it; make it where it is not there."""
    folder = arguments.scratch.resolve() / f"many_files_{arguments.files}"
    notes = folder.with_suffix(".json")
    if not notes.exists():
        shutil.rmtree(folder, ignore_errors=True)
        begin = time.monotonic()
        archive = arguments.data / "cifar10.zip"
        written = write_files(archive, folder, arguments.files, arguments.seed)
        notes.write_text(json.dumps(written))
        print(f"{arguments.files} files written in {time.monotonic() - begin:.0f} s", flush=True)
        time.sleep(_SETTLE)
    return folder, json.loads(notes.read_text())


def main() -> None:
    """Make the files, measure, and print the tables."""
    arguments = parse()
    if arguments.child:
        spec = json.loads(arguments.child)
        print(json.dumps({"opening": opening, "using": using}[spec["what"]](spec)))
        return
    folder, data = make_data(arguments)
    cache = Path(tempfile.mkdtemp(prefix="index_", dir=arguments.scratch))
    spec = {"source": f"folder:{folder}", "seed": arguments.seed, "reads": arguments.reads}
    spec["threads"] = os.cpu_count() or 1
    results: dict[str, Any] = {
        "benchmark": "many_files",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores of "
        f"{hardware.cpu()}",
        "python": platform.python_version(),
        "numpy": metadata.version("numpy"),
        "seed": arguments.seed,
        "data": data,
    }
    try:
        results["first"] = start({"what": "using", **spec}, cache)
        results["again"] = start({"what": "using", **spec}, cache)
        starts = [start({"what": "opening", **spec}, cache) for _ in range(arguments.starts)]
        results["starts"] = [round(one["open_seconds"], 4) for one in starts]
        results["index_bytes"] = bytes_of(cache)
    finally:
        shutil.rmtree(cache)
    results["projection"] = projection(results)
    text = table(results)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)
    checks = [good for run in ("first", "again") for good in results[run]["checks"].values()]
    sys.exit(not all(checks))


if __name__ == "__main__":
    main()
