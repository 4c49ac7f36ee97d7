"""Project the time of a step on machines that nobody has run it on.

    python benchmarks/scaling.py

Prints the tables of docs/scaling.md: arithmetic over docs/results (collectives.json, assign.json,
billion.json, input_pipeline.json) and what vendors publish of their machines. Nothing is measured.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from collectives_read import INTEGERS, SOLUTION
from collectives_table import carried, memory

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"

# Assumed, not measured: what a step reaches of a chip's peak, and of its memory's bandwidth.
SHARE_OF_PEAK = 0.35
SHARE_OF_MEMORY = 0.7
# Bytes per second between a host and one of its chips; PCIe of the fourth generation gives more.
HOST_LINK = 10e9

IMAGENET = 1_281_167
BILLION = 10**9


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices and what their vendor publishes; rates are of one device, per second.

    Attributes:
        name: what the tables call it.
        compiled: the target of benchmarks/collectives.py whose programs stand for it.
        devices: how many there are.
        per_host: how many share a host, and a fast network if there are two.
        operations: peak, in the precision that float32 arrays are multiplied in by default.
        memory: bytes to and from its memory.
        inner: bytes that a device can send to others of its host, or over the whole torus.
        outer: bytes that it can send beyond its host; 0 if ``inner`` reaches all.
    """

    name: str
    compiled: str
    devices: int
    per_host: int
    operations: float
    memory: float
    inner: float
    outer: float = 0.0

    @property
    def hosts(self) -> int:
        return max(1, self.devices // self.per_host)

    def exchange(self, payload: float) -> float:
        """Return the seconds of an all-reduce."""
        if not self.outer:
            return 2 * payload * (self.devices - 1) / self.devices / self.inner
        group = min(self.per_host, self.devices)
        within = 2 * payload * (group - 1) / group / self.inner
        across = 2 * payload / group * (self.hosts - 1) / self.hosts / self.outer
        return within + across


V5E = dict(compiled="tpu:v5e:16x16", per_host=8, operations=197e12, memory=819e9, inner=200e9)
H100 = dict(
    compiled="cuda:H200:2x8",
    per_host=8,
    operations=494.7e12,
    memory=3.35e12,
    inner=450e9,
    outer=50e9,
)
MACHINES = (
    Machine("v5e-256", devices=256, **V5E),
    Machine("8 x H100", devices=8, **H100),
    Machine("4 nodes of 8 x H100", devices=32, **H100),
    Machine("32 nodes of 8 x H100", devices=256, **H100),
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the projections rest on.

    Attributes:
        rows: those of collectives.json, by target, data set and variant; 256 images a device.
        operations: floating-point operations of an image, forward and back.
        solver: seconds of one core for a block of 256, late in training.
        check: seconds to prove a permutation of a billion entries, on one core.
        decoded: images that a core decodes in a second.
    """

    rows: dict[tuple[str, int, str], dict]
    operations: float
    solver: float
    check: float
    decoded: float


def load(folder: Path) -> Measured:
    """Read the results."""
    collectives, solvers, billion, pipeline = (
        json.loads((folder / f"{name}.json").read_text())
        for name in ("collectives", "assign", "billion", "input_pipeline")
    )
    rows = {
        (row["target"], row["records"], row["variant"]): row
        for row in collectives["rows"]
        if row["batch"] == 256 * row["devices"]
    }
    late = [
        row["wall_ms"]
        for row in solvers["results"]
        if (row["shape"], row["solver"]) == ("256", "auction") and row["family"].endswith(" late")
    ]
    (large,) = [row for row in billion["rows"] if row["records"] == BILLION]
    plain = rows["cpu:8", IMAGENET, "plain"]
    return Measured(
        rows,
        operations=plain["programs"][0]["operations"] / plain["batch"],
        solver=max(late) / 1e3,
        check=large["check"]["seconds"],
        decoded=decoded_in(pipeline),
    )


def decoded_in(pipeline: dict) -> float:
    """Return the images per second and core of the whole input pipeline."""
    (photos,) = [group for group in pipeline["groups"] if group["name"] == "photos500"]
    (ours,) = [row for row in photos["results"] if row["name"] == "ours, arrayrecord, simplejpeg"]
    return 1e6 / ours["cpu_us_per_image"]


@dataclasses.dataclass(frozen=True)
class Projection:
    """Seconds of one device and step, 256 images a device.

    Attributes:
        compute: all operations at peak.
        traffic: all bytes to and from memory at full bandwidth.
        exchange: gradients and batch norm's sums, if nothing else went on.
        match: what a step that matches takes longer, with one solving thread a host.
        match_threads: the same with one for each block.
    """

    machine: Machine
    compute: float
    traffic: float
    exchange: float
    match: float
    match_threads: float

    @property
    def limit(self) -> float:
        """No step is faster than this."""
        return max(self.compute, self.traffic, self.exchange)

    @property
    def expected(self) -> float:
        """Assumed shares of peak and bandwidth, and nothing hidden behind anything."""
        return max(self.compute / SHARE_OF_PEAK, self.traffic / SHARE_OF_MEMORY) + self.exchange

    @property
    def cycle(self) -> float:
        """The mean step of three epochs, one of which matches."""
        return self.expected + self.match / 3

    @property
    def images(self) -> float:
        """Images per second of all devices."""
        return 256 * self.machine.devices / self.cycle


def project(machine: Machine, measured: Measured) -> Projection:
    """Project a step of 256 images a device."""
    row = measured.rows[machine.compiled, IMAGENET, "plain"]
    (program,) = row["programs"]
    payload = sum(each["bytes"] for each in row["collectives"])
    costs = 256 * 256 * 4 / HOST_LINK  # each device hands over its own block
    blocks = machine.per_host
    return Projection(
        machine,
        compute=256 * measured.operations / machine.operations,
        traffic=program["touched"] / machine.memory,
        exchange=machine.exchange(payload),
        match=costs + blocks * measured.solver,
        match_threads=costs + measured.solver,
    )


def tables(measured: Measured) -> Iterator[str]:
    """Yield the lines of the tables."""
    projections = [project(machine, measured) for machine in MACHINES]
    yield from table(
        ("", "operations", "memory", "exchange", "no faster than", "expected", "matching adds")
        + ("with a thread a block", "mean of a cycle"),
        [
            (
                each.machine.name,
                *map(_ms, (each.compute, each.traffic, each.exchange, each.limit, each.expected)),
                *map(_ms, (each.match, each.match_threads, each.cycle)),
            )
            for each in projections
        ],
    )
    yield ""
    yield from table(
        ("", "batch", "images/s", "steps an epoch", "an epoch", "100 epochs", "cores a host")
        + ("memory of a device",),
        [
            (
                each.machine.name,
                f"{256 * each.machine.devices:,}",
                f"{each.images:,.0f}",
                f"{IMAGENET // (256 * each.machine.devices):,}",
                _time(IMAGENET / each.images),
                _time(100 * IMAGENET / each.images),
                f"{each.images / each.machine.hosts / measured.decoded:,.0f}",
                f"{memory(measured.rows[each.machine.compiled, IMAGENET, 'plain']) / 1e9:.2f} GB",
            )
            for each in projections
        ],
    )
    yield ""
    yield from table(
        ("", "batch", "steps an epoch", "an epoch", "permutation of a device", "rows exchanged")
        + ("that takes", "check at restore"),
        [_billion(each, measured) for each in projections if each.machine.devices == 256],
    )


def _billion(each: Projection, measured: Measured) -> tuple[str, ...]:
    machine, batch = each.machine, 256 * each.machine.devices
    row = measured.rows["cpu:512", BILLION, "match on devices"]
    _, size = carried(row, (INTEGERS, SOLUTION))
    size = size * batch // row["batch"]
    # Its own entries on each host, and a bit for every entry through the slower of its networks.
    check = measured.check / machine.hosts + BILLION / 8 / (machine.outer or 12.5e9)
    return (
        machine.name,
        f"{batch:,}",
        f"{BILLION // batch:,}",
        _time(BILLION / each.images),
        f"{4 * BILLION / machine.devices / 1e6:.1f} MB",
        f"{size / 1e6:.2f} MB",
        _ms(machine.exchange(size)),
        _time(check),
    )


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
