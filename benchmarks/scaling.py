"""Project the time of a step on machines that nobody has run it on.

    python benchmarks/scaling.py

Prints the tables of docs/scaling.md: arithmetic over docs/results (collectives.json, assign.json,
billion.json, input_pipeline.json), over what vendors publish of their machines, and over the
assumptions below, which nobody has measured. Nothing runs but the arithmetic.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from collectives_read import GRADIENT, INTEGERS
from collectives_table import carried, memory
from scaling_machines import MACHINES, Machine

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"

IMAGENET = 1_281_167
BILLION = 10**9
BLOCK = 256
PIXELS = 224 * 224 * 3
COSTS = 4 * BLOCK * BLOCK
VARIANTS = ("plain", "match on devices", "match on hosts")

KEEPING = ("standing_still", "to_save", "to_restore")

# Assumed: what a step reaches of a chip's peak, of its memory's bandwidth, and of its wires'.
SHARE_OF_PEAK = 0.35
SHARE_OF_MEMORY = 0.7
SHARE_OF_WIRES = 0.7
# Assumed: seconds until an exchange between devices has begun.
BEGIN = 20e-6
# Assumed: bytes per second between a host and each of its devices, and between it and the storage.
HOST_LINK = 10e9
STORAGE = 1e9
# Assumed: bytes of an image's file; ImageNet's training images fill an archive of 148 GB.
FILE = 115e3


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the projections rest on.

    Attributes:
        rows: those of collectives.json by target, data set, images on a device, and variant.
        operations: floating-point operations of an image, forward and back.
        solver: seconds of one core for a block of 256, late in training.
        decoded: images that a core decodes in a second.
        runs: the rows of billion.json.
    """

    rows: dict[tuple[str, int, int, str], dict]
    operations: float
    solver: float
    decoded: float
    runs: Sequence[dict]

    @property
    def large(self) -> dict:
        """The run on a billion images."""
        (large,) = [row for row in self.runs if row["records"] == BILLION]
        return large

    def of(self, machine: Machine, variant: str) -> dict:
        """Return what was compiled for a machine."""
        return self.rows[machine.compiled, IMAGENET, machine.images, variant]


def load(folder: Path) -> Measured:
    """Read the results."""
    collectives, solvers, billion, pipeline = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("collectives", "assign", "billion", "input_pipeline")
    )
    rows = {
        (row["target"], row["records"], row["batch"] // row["devices"], row["variant"]): row
        for row in collectives["rows"]
    }
    late = [
        row["wall_ms"]
        for row in solvers["results"]
        if (row["shape"], row["solver"]) == ("256", "auction") and row["family"].endswith(" late")
    ]
    plain = rows["cpu:8", IMAGENET, BLOCK, "plain"]
    return Measured(
        rows,
        operations=plain["programs"][0]["operations"] / plain["batch"],
        solver=max(late) / 1e3,
        decoded=_decoded_in(pipeline),
        runs=billion["rows"],
    )


def _decoded_in(pipeline: dict) -> float:
    """Return the images per second and core of the whole input pipeline."""
    (photos,) = [group for group in pipeline["groups"] if group["name"] == "photos500"]
    (ours,) = [row for row in photos["results"] if row["name"] == "ours, arrayrecord, simplejpeg"]
    return 1e6 / ours["cpu_us_per_image"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """Seconds of a step on one device.

    Attributes:
        compute: all operations at peak.
        traffic: all bytes to and from memory at full bandwidth.
        wires: all bytes to other devices at full bandwidth.
        exchanges: how many there are.
        pixels: the batch from the host, which goes on beside the step.
        match: what a step that matches takes longer, its blocks solved one by one on each host.
        match_at_once: the same with a core for each block.
        decoded: images that all hosts decode in a second.
    """

    machine: Machine
    compute: float
    traffic: float
    wires: float
    exchanges: int
    pixels: float
    match: float
    match_at_once: float
    decoded: float

    @property
    def limit(self) -> float:
        """No step is faster than this."""
        return max(self.compute, self.wires)

    @property
    def expected(self) -> float:
        """The assumed shares, and no exchange hidden behind anything."""
        alone = max(self.compute / SHARE_OF_PEAK, self.traffic / SHARE_OF_MEMORY, self.pixels)
        return alone + self.wires / SHARE_OF_WIRES + self.exchanges * BEGIN

    @property
    def cycle(self) -> float:
        """The mean step of three epochs, one of which matches."""
        return self.expected + self.match / 3

    @property
    def trained(self) -> float:
        """Images per second, if they were there in time."""
        return self.machine.batch / self.cycle

    @property
    def images(self) -> float:
        """Images per second."""
        return min(self.trained, self.decoded)


def project(machine: Machine, measured: Measured) -> Projection:
    """Project a machine's step."""
    plain, host = (measured.of(machine, name) for name in ("plain", "match on hosts"))
    payload, other = (sum(each["bytes"] for each in row["collectives"]) for row in (plain, host))
    touched, again = (sum(each["touched"] for each in row["programs"]) for row in (plain, host))
    blocks = max(1, machine.batch // BLOCK // machine.hosts)
    moved = (
        COSTS / HOST_LINK
        + max(0, again - touched) / machine.memory / SHARE_OF_MEMORY
        + machine.exchange(other - payload) / SHARE_OF_WIRES
        + (_exchanges(host) - _exchanges(plain)) * BEGIN
    )
    return Projection(
        machine,
        compute=machine.images * measured.operations / machine.operations,
        traffic=touched / machine.memory,
        wires=machine.exchange(payload),
        exchanges=_exchanges(plain),
        pixels=machine.images * PIXELS / HOST_LINK,
        match=moved + blocks * measured.solver,
        match_at_once=moved + measured.solver,
        decoded=machine.hosts * machine.cores * measured.decoded,
    )


def _exchanges(row: dict) -> int:
    return sum(program["collectives"] for program in row["programs"])


def tables(measured: Measured) -> Iterator[str]:
    """Yield the lines of the tables."""
    projections = [project(machine, measured) for machine in MACHINES]
    yield from _of_memory(measured)
    yield ""
    yield from _of_runs(measured)
    yield ""
    yield from _of_inputs(measured)
    yield ""
    yield from _of_machines(measured)
    yield ""
    yield from _of_steps(projections)
    yield ""
    yield from _of_epochs(projections, measured)
    yield ""
    yield from _of_a_billion(
        [each for each in projections if each.machine.devices == 256], measured
    )


def _of_memory(measured: Measured) -> Iterator[str]:
    compiled = [key[:3] for key in measured.rows if key[3] == "plain"]
    yield from table(
        ("compiled for", "data set", "images a device", *VARIANTS),
        [
            (
                target,
                f"{records:,}",
                f"{images}",
                *(
                    f"{memory(measured.rows[target, records, images, variant]) / 1e9:.2f} GB"
                    for variant in VARIANTS
                ),
            )
            for target, records, images in compiled
        ],
    )


def _of_runs(measured: Measured) -> Iterator[str]:
    head = ("images", "a plain step", "a matching step", "most memory", "proof", "needs")
    head += ("checkpoint", "standing still", "saved after", "restored in")
    rows = []
    for run in measured.runs:
        kept = run["checkpoint"]
        rows.append((
            f"{run['records']:,}",
            f"{run['step_ms']['plain']['median']:.1f} ms",
            f"{run['step_ms']['match']['median']:.1f} ms",
            f"{max(run['peak_bytes'].values()) / 1e9:.2f} GB",
            f"{run['check']['seconds']:.3g} s",
            f"{run['check']['bytes'] / 1e6:.0f} MB",
            f"{kept['bytes'] / 1e9:.2f} GB",
            *(f"{kept[f'seconds_{what}']:.3g} s" for what in KEEPING),
        ))  # fmt: skip
    yield from table(head, rows)


def _of_inputs(measured: Measured) -> Iterator[str]:
    large = measured.large
    yield from table(
        ("what", "how much", "from"),
        [
            (
                "operations of an image, forward and back",
                f"{measured.operations / 1e9:.2f} billion",
                "`collectives.json`: the compiler's count",
            ),
            (
                "a block of 256, solved on one core",
                _ms(measured.solver),
                "`assign.json`: the slower of two data sets, late in training",
            ),
            (
                "photographs decoded by one core",
                f"{measured.decoded:,.0f} a second",
                "`input_pipeline.json`: CPU time of the whole pipeline, 500 pixels a side",
            ),
            (
                "proof and checksum of a billion rows, one core",
                f"{large['check']['seconds'] + large['checksum']['seconds']:.1f} s",
                "`billion.json`",
            ),
            (
                "standing still while a billion rows are saved",
                f"{large['checkpoint']['seconds_standing_still']:.1f} s",
                "`billion.json`",
            ),
        ],
    )


def _of_machines(measured: Measured) -> Iterator[str]:
    yield from table(
        ("", "devices", "images a device", "peak", "memory", "sent in the host", "sent beyond")
        + ("needed of a device", "of"),
        [
            (
                each.name,
                f"{each.devices}",
                f"{each.images}",
                f"{each.operations / 1e12:.0f} T/s",
                f"{each.memory / 1e9:,.0f} GB/s",
                f"{each.inner / 1e9:.0f} GB/s",
                f"{each.outer / 1e9:.0f} GB/s" if each.outer else "the same",
                f"{max(memory(measured.of(each, name)) for name in VARIANTS) / 1e9:.2f} GB",
                f"{each.capacity / 1e9:.0f} GB",
            )
            for each in MACHINES
        ],
    )


def _of_steps(projections: Sequence[Projection]) -> Iterator[str]:
    yield from table(
        ("", "operations", "memory", "wires", "exchanges", "pixels", "no faster than", "expected")
        + ("matching adds", "with a core a block", "mean of a cycle"),
        [
            (
                each.machine.name,
                *map(_ms, (each.compute, each.traffic, each.wires, each.exchanges * BEGIN)),
                *map(_ms, (each.pixels, each.limit, each.expected)),
                *map(_ms, (each.match, each.match_at_once, each.cycle)),
            )
            for each in projections
        ],
    )


def _of_epochs(projections: Sequence[Projection], measured: Measured) -> Iterator[str]:
    yield from table(
        ("", "batch", "trained", "cores a host that this takes", "decoded by those there are")
        + ("steps an epoch", "an epoch", "100 epochs", "read by a host"),
        [
            (
                each.machine.name,
                f"{each.machine.batch:,}",
                f"{each.trained:,.0f}/s",
                f"{each.trained / each.machine.hosts / measured.decoded:,.0f}",
                f"{each.decoded:,.0f}/s",
                f"{IMAGENET // each.machine.batch:,}",
                _time(IMAGENET / each.images),
                _time(100 * IMAGENET / each.images),
                f"{each.images / each.machine.hosts * FILE / 1e9:.1f} GB/s",
            )
            for each in projections
        ],
    )


def _of_a_billion(projections: Sequence[Projection], measured: Measured) -> Iterator[str]:
    columns = [_billion(each, measured) for each in projections]
    head = ("", *(each.machine.name for each in projections))
    yield from table(head, [(name, *(column[name] for column in columns)) for name in columns[0]])


def _billion(each: Projection, measured: Measured) -> dict[str, str]:
    """Return what a data set of a billion images costs a machine."""
    machine, large = each.machine, measured.large
    row = measured.rows["cpu:512", BILLION, BLOCK, "match on devices"]
    rows = carried(row, (INTEGERS,))[1] * machine.batch // row["batch"]
    weights = carried(row, (GRADIENT,))[1]
    share = 4 * BILLION / machine.hosts  # bytes of the permutation, of one host
    standing = large["checkpoint"]["seconds_standing_still"] / machine.hosts + weights / HOST_LINK
    proof = (large["check"]["seconds"] + large["checksum"]["seconds"]) / machine.hosts
    bits = machine.exchange(BILLION / 8) / SHARE_OF_WIRES
    rates = (each.trained, each.decoded, machine.hosts * STORAGE / FILE)
    return {
        "batch": f"{machine.batch:,}",
        "steps an epoch": f"{BILLION // machine.batch:,}",
        "an epoch on the devices": _time(BILLION / rates[0]),
        "decoding it": _time(BILLION / rates[1]),
        f"reading it, {BILLION * FILE / 1e12:.0f} TB": _time(BILLION / rates[2]),
        "**an epoch: the slowest**": _time(BILLION / min(rates)),
        "permutation of a device": f"{4 * BILLION / machine.devices / 1e6:.1f} MB",
        "sent for it when matching": f"{rows / 1e6:.2f} MB",
        "that takes": _ms(machine.exchange(rows) / SHARE_OF_WIRES),
        "a checkpoint": f"{(weights + 4 * BILLION) / 1e9:.2f} GB",
        "training stands still": _time(standing),
        "on the storage after": _time(standing + (share + weights) / STORAGE),
        "restored in": _time((share + weights) / STORAGE + proof + bits),
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines."""
    yield "| " + " | ".join(head) + " |"
    yield "|---|" + "---:|" * (len(head) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _time(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(*tables(load(parser.parse_args().results)), sep="\n")


if __name__ == "__main__":
    main()
