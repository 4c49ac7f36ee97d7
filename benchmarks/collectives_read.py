"""Reads from a compiled train step what its devices send each other, and what that is.

A step may exchange sums of gradients, sums for batch norm, single numbers, and, when the batch is
matched anew, features and row numbers of the batch. ``Sizes`` knows how large each of these is, and
``faults`` says what else there is, or how much too often.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from aot import COLLECTIVES, FREE, computations, loops, within

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}  # or 4

GRADIENT = "gradients of matrices and kernels"
CHANNELS = (
    "sums over each channel"  # batch norm's moments and what comes back; gradients of vectors
)
FEATURES = "B x D features or target rows"
INTEGERS = "B indices or rows"
WEIGHTS = "B weights of records"
SOLUTION = "solutions of the blocks"
SCALARS = "single numbers"
UNKNOWN = "unknown"
RECORDS = "N-sized"
ALLOWED = (GRADIENT, CHANNELS, FEATURES, INTEGERS, WEIGHTS, SOLUTION, SCALARS)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a collective; ``shape`` is that of the whole, which no device may hold."""

    carries: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute, ...
        devices: how many take part in each group.
        source: what it stems from, as JAX names it.
        parts: the arrays.
    """

    kind: str
    devices: int
    source: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the arrays as wholes."""
        return sum(part.bytes for part in self.parts)

    @property
    def sent(self) -> float:
        """Bytes that each device sends if the exchange is a ring."""
        share = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is that a step may exchange.

    Attributes:
        records: N; entries of the permutation, which may be padded.
        batch: B.
        dim: D.
        blocks: K, problems a batch.
        devices: along "data".
        weights: the number of elements of every matrix and kernel.
        channels: the length of every vector that batch norm keeps, one for each layer.
        vectors: the lengths of all vectors among the parameters.
    """

    records: int
    batch: int
    dim: int
    blocks: int
    devices: int
    weights: tuple[int, ...]
    channels: tuple[int, ...]
    vectors: tuple[int, ...]

    @classmethod
    def of(cls, state: Any, *, batch: int, dim: int, block: int | None, devices: int) -> "Sizes":
        """Take the sizes from a train state, or its shapes."""
        params, stats = map(jax.tree.leaves, (state.params, state.batch_stats))
        return cls(
            records=state.assignment.size,
            batch=batch,
            dim=dim,
            blocks=batch // (block or batch),
            devices=devices,
            weights=tuple(leaf.size for leaf in params if leaf.ndim > 1),
            channels=tuple(leaf.size for leaf in stats)[::2],
            vectors=tuple(leaf.size for leaf in params if leaf.ndim == 1),
        )

    def carries(self, kind: str, dtype: str, shape: tuple[int, ...]) -> str:
        """Say what an array of a collective is."""
        size, real = math.prod(shape), dtype.startswith(("f", "bf"))
        summed = kind in ("all-reduce", "reduce-scatter")
        per_block = self.batch // self.blocks
        rules = (
            (SCALARS, size == 1),
            (GRADIENT, real and summed and size in self.weights),
            (RECORDS, {self.records, self.records // self.devices} & set(shape)),
            (CHANNELS, real and summed and size in {*self.channels, *self.vectors}),
            (FEATURES, real and size == self.batch * self.dim),
            (INTEGERS, not real and size == self.batch),
            (WEIGHTS, real and size == self.batch),
            (SOLUTION, not real and size == self.blocks * (per_block + 3)),
            (SOLUTION, size == self.blocks),
        )
        return next((name for name, holds in rules if holds), UNKNOWN)

    def faults(
        self,
        found: Iterable[Collective],
        *,
        reassign: bool,
        sharded: bool = False,
        table: bool = False,
        halves: bool = False,
    ) -> list[str]:
        """Return what a step exchanges that it should not, in words.

        Args:
            found: its collectives, those of all its programs.
            reassign: whether the step matches its batch anew.
            sharded: whether the permutation is sharded over the devices.
            table: whether a table of targets is.
            halves: whether it is two programs; the second one computes batch norm's moments anew,
                and asks for the features once more.
        """
        parts = [(part, each) for each in found for part in each.parts]
        said = [
            f"{part.carries}: {each.kind} of {part.dtype}{list(part.shape)} from {each.source!r}"
            for part, each in parts
            if part.carries not in ALLOWED
        ]
        kernels = Counter(math.prod(p.shape) for p, _ in parts if p.carries == GRADIENT)
        for size, count in (kernels - Counter(self.weights)).items():
            said.append(f"{GRADIENT}: {count} of {size} elements too many")
        for size, count in (Counter(self.weights) - kernels).items():
            said.append(f"{GRADIENT}: {count} of {size} elements are never summed")
        # The gradient of each vector; of each layer two moments, and one sum more on the way back.
        least = 2 * sum(self.channels)
        most = (3 + 2 * halves) * sum(self.channels) + sum(self.vectors)
        if self.batch in self.channels:  # weights of records look the same where they are summed
            most += self.batch * reassign
        channels = sum(math.prod(p.shape) for p, _ in parts if p.carries == CHANNELS)
        if not least <= channels <= most:
            said.append(f"{CHANNELS}: {channels} numbers, not {least} to {most}")
        count = Counter(part.carries for part, _ in parts)
        spread = reassign and self.blocks % self.devices != 0  # blocks lie across devices
        limits = {
            FEATURES: (2 + halves) * spread + (1 + reassign) * table,
            INTEGERS: 2 * reassign + (2 + reassign) * sharded + 2 * table,
            WEIGHTS: int(spread),
            SOLUTION: int(halves),
        }
        said += [
            f"{name}: {count[name]}, not {limit} at the most"
            for name, limit in limits.items()
            if count[name] > limit
        ]
        return said


def read(program: str, sizes: Sizes) -> list[Collective]:
    """Return the collectives of a compiled program."""
    found: dict[str, Collective] = {}
    for operations in computations(program).values():
        for opcode, line in operations:
            if COLLECTIVES.match(opcode) and not opcode.endswith("-done"):
                # On a TPU one that goes on beside other work stands in each of their fusions.
                channel = re.search(r"channel_id=\d+", line)
                found[channel[0] if channel else line] = _collective(opcode, line, sizes)
    return list(found.values())


def in_loops(program: str) -> int:
    """Return how many collectives stand inside loops."""
    return sum(loop["collectives"] for loop in loops(program))


def touched(program: str) -> int:
    """Return the bytes that a device's operations read and write, if nothing stays in caches."""
    parts = computations(program)
    sizes = {}
    for operations in parts.values():
        for opcode, line in operations:
            name, _, result = line.partition(" = ")
            arrays = _leaves(result.partition(f" {opcode}(")[0])
            sizes[name.split()[-1].lstrip("%")] = sum(Part("", *array).bytes for array in arrays)
    main = re.search(r"^ENTRY %?([\w.-]+)", program, re.MULTILINE)
    assert main
    total = 0
    for opcode, line in within(main[1], parts):
        if opcode in FREE or opcode.endswith(("-start", "-done")):
            continue
        name, _, rest = line.partition(" = ")
        operands = rest.partition(f" {opcode}(")[2].partition(")")[0]
        total += sizes[name.split()[-1].lstrip("%")]
        total += sum(sizes.get(each, 0) for each in re.findall(r"%([\w.-]+)", operands))
    return total


def _collective(opcode: str, line: str, sizes: Sizes) -> Collective:
    kind = opcode.removesuffix("-start")
    result = line.partition(" = ")[2].partition(f" {opcode}(")[0]
    arrays = _leaves(result)
    if opcode != kind and kind != "all-reduce":  # the operands, the results, and perhaps a context
        operands, results = map(_leaves, list(_split(result[1:-1]))[:2])
        arrays = operands if kind == "reduce-scatter" else results
    devices = _group(line) or sizes.devices
    if opcode == "reduce-scatter":
        arrays = [(dtype, (devices * shape[0], *shape[1:])) for dtype, shape in arrays]
    source = re.search(r'op_name="([^"]*)"', line)
    parts = tuple(Part(sizes.carries(kind, *array), *array) for array in arrays)
    return Collective(kind, devices, source[1][:120] if source else "", parts)


def _leaves(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return the (dtype, shape) pairs of a type, however nested."""
    found = re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", type_)
    return [(dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in found]


def _split(types: str) -> Iterator[str]:
    """Yield the elements of a tuple's type."""
    depth = start = 0
    for place, letter in enumerate(types):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            yield types[start:place]
            start = place + 1
    yield types[start:]


def _group(line: str) -> int | None:
    """Return how many devices take part in each group; None if the line does not say."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        axes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'\w+'", found[2]))
    return None


def table(found: Iterable[Collective]) -> list[dict[str, Any]]:
    """Add collectives of a kind up by what they carry."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for each in found:
        for part in each.parts:
            row = rows.setdefault(
                (each.kind, part.carries, part.dtype),
                {"kind": each.kind, "carries": part.carries, "dtype": part.dtype}
                | {"arrays": 0, "bytes": 0},
            )
            row["arrays"] += 1
            row["bytes"] += part.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
