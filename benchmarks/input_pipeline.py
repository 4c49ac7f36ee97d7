"""Time the input pipeline beside its limit and its rivals, on real photographs.

    python benchmarks/input_pipeline.py --data DIR --scratch DIR --quick
    python benchmarks/input_pipeline.py --data DIR --scratch DIR --torch PYTHON \
        --tensorflow PYTHON --output docs/results/input_pipeline.json

``--data`` is a folder with voc2007_subset.zip, imagenette_like.zip and cifar10.zip, ``--torch`` and
``--tensorflow`` the interpreters of environments with torch and torchvision, and with tensorflow.

The limit is the bare work, one process for each core, from bytes in memory: decode, scale with the
same filter the part that is cut out, throw it away (``input_contenders.py``); "naive" scales the
whole image, then crops. The pipeline decodes large files at half size or less where that suffices;
none of these photographs is large enough. The rivals are a PyTorch DataLoader over ImageFolder and
tf.data (``input_rivals.py``), with as many workers as cores. All take turns, A B C A B C, each in
processes of its own, on the same cores, and ratios are taken round by round.

Further sections: what the stages cost (``input_stages.py``), how long a loop waits for data whose
step sleeps for 50 ms, as a host does while its accelerator works, and what happens to memory over
many batches (``input_long.py``).
"""

import argparse
import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import hardware
import input_data
import input_long
import input_tables
from input_data import Photos
from input_turns import Contender, ratio, summary, take_turns

SECTIONS = ("whole", "variants", "stages", "waiting", "memory")
_PACKAGES = ("nat_jax", "numpy", "pillow", "simplejpeg", "grain", "array_record", "jax")
_OTHERS = ("torch", "torchvision", "tensorflow")
_STEP = 0.05  # seconds of the loop that may wait
_LOADS = (0.5, 0.7, 0.9)  # of what the pipeline can do
_FASTER = "simplejpeg"


def words(text: str) -> list[str]:
    """Split a list at commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--scratch", type=Path, required=True, help="for the images, laid out")
    parser.add_argument("--torch", help="Python interpreter with torch and torchvision")
    parser.add_argument("--tensorflow", help="Python interpreter with tensorflow")
    parser.add_argument("--sections", type=words, default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--copies", type=int, default=4, help="of each large photograph")
    parser.add_argument("--batches", type=int, default=20_000, help="of the memory section")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few programs, in under a minute")
    parser.add_argument("--output", type=Path, help="JSON; the tables go beside it as .md")
    arguments = parser.parse_args()
    unknown = set(arguments.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.batch = 2, 0.5, 64
        arguments.copies, arguments.batches = 1, 200
    return arguments


def use_cores(wanted: int | None) -> int:
    """Bind this process, and so all it starts, to some cores; return how many."""
    if not hasattr(os, "sched_setaffinity"):
        return wanted or os.cpu_count() or 1
    there = sorted(os.sched_getaffinity(0))
    if wanted:
        os.sched_setaffinity(0, there[:wanted])
    return len(os.sched_getaffinity(0))


class Programs:
    """Makes the contenders of one set of photographs.

    Args:
        photos: the images.
        cores: processes, threads or workers of each.
        arguments: the options.
    """

    def __init__(self, photos: Photos, cores: int, arguments: argparse.Namespace):
        self._photos, self._cores, self._arguments = photos, cores, arguments
        self._train = str(photos.folder / "train")

    def limit(self, decoder: str, crop: str = "random_crop", *, views: int = 1) -> Contender:
        """Return the bare loop."""
        name = f"limit, {decoder}"
        return self._limit(name, {"decoder": decoder, "crop": crop, "views": views})

    def naive(self, decoder: str) -> Contender:
        """Return the bare loop that scales the whole image, then crops."""
        naive = {"decoder": decoder, "crop": "random_crop", "views": 1, "naive": True}
        return self._limit(f"limit, naive, {decoder}", naive)

    def _limit(self, name: str, spec: dict[str, Any]) -> Contender:
        common = {"kind": "limit", "folder": self._train, **spec}
        seeds = (self._arguments.seed + i for i in range(self._cores))
        return Contender(name, "input_contenders.py", [{**common, "seed": s} for s in seeds])

    def ours(
        self,
        kind: str,
        decoder: str,
        crop: str = "random_crop",
        *,
        batch: int | None = None,
        views: int = 1,
        workers: bool = False,
    ) -> Contender | None:
        """Return nat_jax's pipeline, None where that kind of source is missing."""
        if kind not in self._photos.sources:
            return None
        spec = {
            "kind": "ours",
            "source": self._photos.sources[kind],
            "decoder": decoder,
            "crop": crop,
            "batch": batch or self._arguments.batch,
            "views": views,
            "threads": self._cores,
            "workers": self._cores if workers else 0,
            "seed": self._arguments.seed,
        }
        name = f"ours, {kind}, {decoder}" + (f", batches of {batch}" if batch else "")
        name += ", worker processes" if workers else ""
        return Contender(name, "input_contenders.py", [spec])

    def torch(self, crop: str = "random_crop") -> Contender | None:
        """Return PyTorch's DataLoader, None without its environment."""
        if not self._arguments.torch:
            return None
        spec = self._rival("torch", crop) | {"workers": self._cores}
        name = "PyTorch DataLoader, Pillow"
        return Contender(name, "input_rivals.py", [spec], python=self._arguments.torch)

    def tf_data(self, *, threads: int | None, fused: bool) -> Contender | None:
        """Return a tf.data pipeline, None without its environment."""
        if not self._arguments.tensorflow:
            return None
        spec = self._rival("tf.data", "random_crop") | {"threads": threads, "fused": fused}
        name = "tf.data, " + (f"{threads} threads" if threads else "AUTOTUNE")
        name += ", decode_and_crop" if fused else ""
        return Contender(name, "input_rivals.py", [spec], python=self._arguments.tensorflow)

    def _rival(self, name: str, crop: str) -> dict[str, Any]:
        common = {"rival": name, "folder": self._train, "crop": crop}
        return common | {"batch": self._arguments.batch, "seed": self._arguments.seed}


def whole(programs: Programs, cores: int, quick: bool) -> list[Contender | None]:
    """Return who takes part in the comparison of whole pipelines."""
    found = [programs.limit(_FASTER), programs.ours("folder", _FASTER)]
    found += [programs.ours("arrayrecord", _FASTER), programs.torch()]
    found += [programs.tf_data(threads=None, fused=False)]
    if quick:
        return found
    return [
        *found,
        programs.ours("zip", _FASTER),
        programs.ours("tfds", _FASTER),
        programs.tf_data(threads=cores, fused=False),
        programs.tf_data(threads=None, fused=True),
        programs.naive(_FASTER),
        programs.limit("Pillow"),
        programs.naive("Pillow"),
        programs.ours("folder", "Pillow"),
        programs.ours("arrayrecord", "Pillow"),
    ]


def variants(programs: Programs, kind: str) -> dict[str, list[Contender | None]]:
    """Return who takes part in the comparisons of other settings, by name."""
    inception = "random_resized_crop"
    return {
        "Inception-style crops": [
            programs.limit(_FASTER, inception),
            programs.ours(kind, _FASTER, inception),
            programs.torch(inception),
        ],
        "two views": [
            programs.limit(_FASTER, views=2),
            programs.ours(kind, _FASTER, views=2),
        ],
        "evaluation, middle crop": [
            programs.limit(_FASTER, "center_crop"),
            programs.ours(kind, _FASTER, "center_crop"),
        ],
        "other batches and workers": [
            programs.limit(_FASTER),
            programs.ours(kind, _FASTER),
            programs.ours(kind, _FASTER, batch=64),
            programs.ours(kind, _FASTER, workers=True),
        ],
    }


def compare(
    name: str, contenders: list[Contender | None], cores: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Let programs take turns; return their results and ratios."""
    there = [contender for contender in contenders if contender is not None]
    multiple = cores * arguments.batch
    running, skipped = take_turns(
        there, rounds=arguments.rounds, seconds=arguments.seconds, multiple=multiple
    )
    for line in skipped:
        print(f"{name}: skipped: {line}", file=sys.stderr)
    mine = [contender for contender in running if contender.name.startswith("ours")]
    ratios = []
    for one in mine:
        for other in running:
            same = one.about["decoder"] == other.about.get("decoder")
            is_limit = other.name.startswith("limit")
            if other in mine or (is_limit and not same):
                continue
            ratios.append(ratio(one, other))
    results = [summary(contender, cores) for contender in running]
    return {"name": name, "results": results, "ratios": ratios, "skipped": skipped}


def wait(groups: list[dict], photos: Photos, cores: int, options: argparse.Namespace) -> list[dict]:
    """Measure how long a loop waits, with batches that are a share of what the pipeline can do."""
    found = []
    rows = [row for group in groups if group["name"] == photos.name for row in group["results"]]
    for kind in ("folder", "arrayrecord"):
        rates = [
            row["images_per_second_per_core"]
            for row in rows
            if row["name"] == f"ours, {kind}, {_FASTER}"
        ]
        for load in _LOADS if rates else ():
            batch = max(1, int(load * rates[0] * cores * _STEP) // 2 * 2)
            spec = {"source": photos.sources[kind], "batch": batch, "threads": cores}
            spec |= {"what": "waiting", "step_seconds": _STEP, "seed": options.seed}
            spec["steps"] = 40 if options.quick else 400
            actual = batch / (rates[0] * cores * _STEP)
            row = {"kind": kind, "photos": photos.name, "batch": batch, "step_ms": 1000 * _STEP}
            found.append(row | {"load": round(actual, 3)} | input_long.start(spec))
            if options.quick:
                break
    return found


def remember(cores: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Watch the memory over many batches of small images, with threads and with processes."""
    archive = options.data / "cifar10.zip"
    if not archive.exists():
        return [{"skipped": f"{archive.name} is not in the data"}]
    found = []
    for mode, workers in (("threads", 0), ("worker processes", cores)):
        spec = {"what": "memory", "source": f"folder:{archive}", "batch": 64, "threads": cores}
        spec |= {"workers": workers, "batches": options.batches, "seed": options.seed}
        print(f"memory, {mode}", file=sys.stderr)
        found.append({"mode": mode, **input_long.start(spec)})
        if options.quick:
            break
    return found


def environment(cores: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the numbers depend on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    command = "python benchmarks/input_pipeline.py --data DIR --scratch DIR"
    command += " --torch PYTHON" if options.torch else ""
    command += " --tensorflow PYTHON" if options.tensorflow else ""
    used = {"rounds": options.rounds, "seconds": options.seconds, "batch": options.batch}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {cores} cores of {hardware.cpu()}",
        "cores": cores,
        "python": platform.python_version(),
        **versions,
        "seed": options.seed,
        "command": command,
        "options": {**used, "copies": options.copies, "sections": options.sections},
    }


def main() -> None:
    """Measure, and show the goals and the tables."""
    options = parse()
    cores = use_cores(options.cores)
    options.scratch = options.scratch.resolve()
    sets = input_data.prepare(options.data, options.scratch, copies=options.copies)
    sets = sets[:1] if options.quick else sets
    results: dict[str, Any] = {"benchmark": "input_pipeline", **environment(cores, options)}
    groups: list[dict[str, Any]] = []
    results |= {"goals": [], "groups": groups}
    results["missing"] = {photos.name: photos.skipped for photos in sets if photos.skipped}
    if "whole" in options.sections:
        for photos in sets:
            there = whole(Programs(photos, cores, options), cores, options.quick)
            groups.append(compare(photos.name, there, cores, options))
            save(results, options.output)
    if "waiting" in options.sections:
        results["waiting"] = wait(groups, sets[0], cores, options)
    if "variants" in options.sections and not options.quick:
        kind = "arrayrecord" if "arrayrecord" in sets[0].sources else "folder"
        for name, contenders in variants(Programs(sets[0], cores, options), kind).items():
            groups.append(compare(f"{sets[0].name}, {name}", contenders, cores, options))
        save(results, options.output)
    if "memory" in options.sections:
        results["memory"] = remember(cores, options)
        save(results, options.output)
    if "stages" in options.sections:
        import input_stages  # imports JAX and grain, which the programs above should not wait for

        results["stages"] = stages = {
            photos.name: input_stages.measure(
                photos.sources, rounds=options.rounds, seed=options.seed
            )
            for photos in sets
        }
        results["parsing"] = {name: input_stages.parsing(of) for name, of in stages.items()}
    print(save(results, options.output))


def save(results: dict[str, Any], output: Path | None) -> str:
    """Write what is there so far, and return it as Markdown."""
    for group in results["groups"]:
        for row in group["results"]:
            results |= {package: row[package] for package in _OTHERS if package in row}
    results["goals"] = input_tables.goals(results)
    text = input_tables.tables(results)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
        output.with_suffix(".md").write_text(text)
    return text


if __name__ == "__main__":
    main()
