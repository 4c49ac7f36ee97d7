"""Time the input pipeline, its limit and its rivals in turn, on real photographs.

    python benchmarks/input_pipeline.py --data DIR --scratch DIR --quick
    python benchmarks/input_pipeline.py --data DIR --scratch DIR --torch PYTHON \
        --tensorflow PYTHON --output docs/results/input_pipeline.json
    python benchmarks/input_pipeline.py --files 200000 --data DIR --scratch DIR \
        --output docs/results/many_files.json

``--data`` is a folder with voc2007_subset.zip (or cifar10.zip for ``--files``), ``--torch`` and
``--tensorflow`` the interpreters of environments with torch and torchvision, and with tensorflow.

The limit is the bare work, one process for each core, from bytes in memory: decode, scale with the
same filter the part that is cut out, throw it away; "naive" scales the complete image, then crops.
The rivals are a PyTorch DataLoader over ImageFolder and tf.data, with as many workers as cores
(``input_programs.py``). Programs take turns, A B C C B A, each in processes of its own, on the same
cores, and ratios are taken round by round.

``--files`` measures start-up and use of a folder of that many small images instead, ImageNet's
layout without ImageNet: in a new process without an index, in another one with the index that the
first has kept, then in ``--starts`` processes that only open it.

Files are in the page cache.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import input_data
import measure
from measure import number

PACKAGES = ("nat_jax", "numpy", "pillow", "simplejpeg", "grain", "array_record", "jax")
OTHERS = ("torch", "torchvision", "tensorflow")
KINDS = ("folder", "arrayrecord")
FASTER = "simplejpeg"
_BUSY = 0.95  # below this share of the cores for the limit, other work disturbed the turns
_END = 60  # seconds that a program may take to end
_BATCH = 256  # of a folder's images


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the archives")
    parser.add_argument("--scratch", type=Path, required=True, help="for the images, laid out")
    parser.add_argument("--torch", help="Python interpreter with torch and torchvision")
    parser.add_argument("--tensorflow", help="Python interpreter with tensorflow")
    parser.add_argument("--cores", type=int, help="how many to use; all by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3, help="of each turn")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--copies", type=int, default=4, help="of each large photograph")
    parser.add_argument("--files", type=int, help="measure a folder of that many images instead")
    parser.add_argument("--starts", type=int, default=7, help="processes that open them again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few programs, in about a minute")
    parser.add_argument("--output", type=Path, help="JSON; the tables go to a .md file next to it")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seconds, arguments.batch = 2, 0.5, 64
        arguments.copies, arguments.starts = 1, 2
    return arguments


@dataclasses.dataclass
class Contender:
    """A program of ``input_programs.py``, or several at once, and the turns it has done.

    Attributes:
        name: as in the tables.
        specs: JSON arguments, one for each process; all work at the same time.
        python: the interpreter of its environment.
        about: decoder and versions, as the program reports them.
        turns: images, seconds and processor seconds of each turn.
        images: in each turn, over all processes.
    """

    name: str
    specs: Sequence[dict[str, Any]]
    python: str = sys.executable
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    turns: list[dict[str, float]] = dataclasses.field(default_factory=list)
    images: int = 0

    def start(self) -> None:
        """Start the processes and wait until they can take turns."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the processes
        program = str(Path(__file__).with_name("input_programs.py"))
        self._processes = [
            subprocess.Popen(
                [self.python, program, json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=measure.child_environment(),
            )
            for spec in self.specs
        ]
        for process in self._processes:
            self.about.update(self._answer(process))

    def turn(self, images: int) -> dict[str, float]:
        """Let each process do a share of the images."""
        share = math.ceil(images / len(self._processes))
        for process in self._processes:
            assert process.stdin is not None
            print(share, file=process.stdin, flush=True)
        answers = [self._answer(process) for process in self._processes]
        return {
            "images": sum(answer["images"] for answer in answers),
            "seconds": max(answer["seconds"] for answer in answers),
            "cpu": sum(answer["cpu"] for answer in answers),
        }

    def warm_up(self, seconds: float, multiple: int) -> None:
        """Choose the number of images of a turn that takes so many seconds."""
        self.images = multiple
        for _ in range(2):  # the first turn is slower than those that follow
            done = self.turn(self.images)
            rate = done["images"] / done["seconds"]
            self.images = max(1, round(rate * seconds / multiple)) * multiple

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        assert process.stdout is not None
        if line := process.stdout.readline():
            return json.loads(line)
        process.wait(timeout=_END)
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raise SystemExit(f"{self.name}: {lines[-1] if lines else 'ended without output'}")

    def stop(self) -> None:
        """End the processes."""
        for process in getattr(self, "_processes", ()):
            if process.stdin is not None:
                process.stdin.close()
        for process in getattr(self, "_processes", ()):
            try:
                process.wait(timeout=_END)
            except subprocess.TimeoutExpired:
                process.kill()

    def rates(self) -> list[float]:
        """Return the images per second of each turn."""
        return [turn["images"] / turn["seconds"] for turn in self.turns]

    def costs(self) -> list[float]:
        """Return the processor seconds of an image in each turn."""
        return [turn["cpu"] / turn["images"] for turn in self.turns]


def contenders(
    folder: Path, kinds: dict[str, str], cores: int, options: argparse.Namespace
) -> list[Contender]:
    """Return the programs that are compared; those of other environments if these are given."""
    common = {"batch": options.batch, "seed": options.seed, "folder": str(folder / "train")}

    def limit(decoder: str, *, naive: bool = False) -> Contender:
        spec = {**common, "program": "limit", "decoder": decoder, "naive": naive}
        specs = [spec | {"seed": options.seed + k} for k in range(cores)]
        return Contender(f"limit, {'naive, ' * naive}{decoder}", specs)

    def ours(kind: str, decoder: str) -> Contender:
        spec = {**common, "program": "ours", "source": kinds[kind], "decoder": decoder}
        return Contender(f"ours, {kind}, {decoder}", [spec | {"threads": cores}])

    found = [limit(FASTER), *(ours(kind, FASTER) for kind in KINDS)]
    if options.torch:
        spec = {**common, "program": "torch", "workers": cores}
        found.append(Contender("PyTorch DataLoader, Pillow", [spec], python=options.torch))
    if options.tensorflow:
        for fused in (False, True):
            name = "tf.data, AUTOTUNE" + ", decode_and_crop" * fused
            spec = {**common, "program": "tf.data", "fused": fused}
            found.append(Contender(name, [spec], python=options.tensorflow))
    if not options.quick:
        found += [ours("zip", FASTER), limit(FASTER, naive=True), limit("Pillow")]
        found += [limit("Pillow", naive=True), *(ours(kind, "Pillow") for kind in KINDS)]
    return found


def compare(
    name: str, running: Sequence[Contender], cores: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Let programs take turns; return their results and ratios."""
    try:
        for contender in running:
            contender.start()
            # A multiple of all threads' batches: none is idle while another makes the last.
            contender.warm_up(options.seconds, cores * options.batch)
        for contender in measure.interleave(running, options.rounds):
            contender.turns.append(contender.turn(contender.images))
    finally:
        for contender in running:
            contender.stop()
    mine = [contender for contender in running if contender.name.startswith("ours")]
    ratios = []
    for one in mine:
        for other in running:
            same = one.about["decoder"] == other.about.get("decoder")
            if other in mine or (other.name.startswith("limit") and not same):
                continue
            faster = measure.ratios(one.rates(), other.rates())
            cpu = measure.ratios(other.costs(), one.costs())[1]
            ratios.append({"one": one.name, "other": other.name, "quartiles": faster, "cpu": cpu})
    results = [summary(contender, cores) for contender in running]
    return {"name": name, "results": results, "ratios": ratios}


def summary(contender: Contender, cores: int) -> dict[str, Any]:
    """Return the medians of a contender's turns."""
    low, median, high = measure.quartiles([rate / cores for rate in contender.rates()])
    busy = statistics.median(turn["cpu"] / turn["seconds"] for turn in contender.turns)
    return {
        "name": contender.name,
        "images_per_second_per_core": median,
        "quartiles": [low, high],
        "cpu_us_per_image": round(1e6 * statistics.median(contender.costs()), 1),
        "share_of_cores": round(busy / cores, 3),
        "images_per_turn": contender.images,
        "turns": len(contender.turns),
        **contender.about,
    }


def loop(program: str, **spec: Any) -> dict[str, Any]:
    """Run a program in a new process and return its result."""
    (found,) = measure.run_child("input_programs.py", json.dumps({"program": program, **spec}))
    return found


def start_up(cores: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure start-up and use of a folder of many small images."""
    archive = options.data / "cifar10.zip"
    folder, data = input_data.many_files(archive, options.scratch, options.files, options.seed)
    cache = Path(tempfile.mkdtemp(prefix="index_", dir=options.scratch))
    os.environ["NAT_JAX_CACHE"] = str(cache)
    spec = {"source": f"folder:{folder}", "seed": options.seed}
    spec |= {"threads": cores, "batch": _BATCH}
    try:
        found = {"data": data, "first": loop("using", **spec), "again": loop("using", **spec)}
        opened = [loop("opening", source=spec["source"]) for _ in range(options.starts)]
        kept = [path.stat().st_size for path in cache.rglob("*") if path.is_file()]
    finally:
        shutil.rmtree(cache)
    seconds = [round(one["open_seconds"], 4) for one in opened]
    return found | {"starts": seconds, "index_bytes": sum(kept)}


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


def main() -> None:
    """Measure, and show the tables."""
    options = parse()
    cores = measure.use_cores(options.cores or len(measure.core_numbers()))
    options.scratch = options.scratch.resolve()
    options.scratch.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "benchmark": "input_pipeline",
        **measure.environment(*PACKAGES),
        "cores": cores,
        "seed": options.seed,
        "command": " ".join(["python", "benchmarks/input_pipeline.py", *sys.argv[1:]]),
        "groups": [],
    }
    faults = []
    if options.files:
        results |= start_up(cores, options)
        checks = {**results["first"]["checks"], **results["again"]["checks"]}
        faults = [f"not so: {what}" for what, good in checks.items() if not good]
    else:
        folder, kinds = input_data.photographs(options.data, options.scratch, copies=options.copies)
        chosen = contenders(folder, kinds, cores, options)
        results["groups"].append(compare("photos500", chosen, cores, options))
        for row in results["groups"][0]["results"]:
            results |= {package: row[package] for package in OTHERS if package in row}
    text = tables(results)
    print(text)
    measure.write(options.output, results, text)
    measure.finish(faults)


if __name__ == "__main__":
    main()
