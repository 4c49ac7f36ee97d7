"""Read from a compiled program what its loops do, and what its devices send each other.

A step may exchange sums of gradients, sums for batch norm, single numbers, and, when the batch is
matched, features and row numbers of the batch. ``Sizes`` knows how large each of these is, and
``Sizes.faults`` returns what else there is, or what is exchanged too often.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import jax

Operation = tuple[str, str]  # opcode and line

COLLECTIVES = re.compile(
    r"^(all-reduce|all-gather|all-to-all|reduce-scatter|collective-(permute|broadcast))"
)
# Operations that are neither a launch on a GPU nor work on a TPU.
FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "call",
    "conditional", "after-all", "partition-id", "iota", "opt-barrier",
}  # fmt: skip
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}  # or 4

GRADIENT = "gradients of matrices and kernels"
# Batch norm's moments, forward and back, and the gradients of vectors.
CHANNELS = "sums over each channel"
FEATURES = "B x D features or target rows"
INTEGERS = "B indices or rows"
WEIGHTS = "B weights of records"
SOLUTION = "solutions of the blocks"
SCALARS = "single numbers"
UNKNOWN = "unknown"
RECORDS = "N-sized"
ALLOWED = (GRADIENT, CHANNELS, FEATURES, INTEGERS, WEIGHTS, SOLUTION, SCALARS)


def computations(text: str) -> dict[str, list[Operation]]:
    """Return the operations of each computation of an optimised program."""
    found: dict[str, list[Operation]] = {}
    name = ""
    for line in text.splitlines():
        if begin := re.match(r"(?:ENTRY )?%?([\w.-]+) .*->.*\{$", line):
            name = begin[1]
            found[name] = []
        operation = re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line)
        if operation and name:
            found[name].append((operation[1], line))
    return found


def within(name: str, program: dict[str, list[Operation]]) -> Iterator[Operation]:
    """Yield the operations of a computation and of those it calls, not of loops inside it."""
    for opcode, line in program[name]:
        yield opcode, line
        if opcode in ("call", "conditional", "async-start"):
            for group in re.findall(r"(?:to_apply|calls|\w+_computations?)=\{?([^}\s]*)", line):
                for callee in re.findall(r"%?([\w.-]+)", group):
                    yield from within(callee, program) if callee in program else ()


def entry(text: str) -> list[Operation]:
    """Return the operations of a program's entry computation."""
    name = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)
    assert name
    return list(within(name[1], computations(text)))


def loops(text: str) -> list[dict[str, Any]]:
    """Return source, operations and collectives of each loop, and whether it is innermost."""
    program = computations(text)
    found = []
    for operations in program.values():
        for opcode, line in operations:
            if opcode != "while":
                continue
            parts = re.findall(r"(?:condition|body)=%?([\w.-]+)", line)
            inside = [operation for part in parts for operation in within(part, program)]
            source = re.search(r'op_name="([^"]*)"', line)
            found.append({
                "source": source[1] if source else parts[-1],
                "innermost": all(opcode != "while" for opcode, _ in inside),
                "operations": sum(opcode not in FREE for opcode, _ in inside),
                "collectives": sum(bool(COLLECTIVES.match(opcode)) for opcode, _ in inside),
            })  # fmt: skip
    return found


def in_loops(program: str) -> int:
    """Return the number of collectives inside loops."""
    return sum(loop["collectives"] for loop in loops(program))


def bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of an array."""
    return math.prod(shape) * BYTES.get(dtype, 4)


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of a collective; ``shape`` is the global one, which no device may hold."""

    carries: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute, ...
        devices: the number of devices of each group.
        source: the operation that it stems from, as JAX names it.
        parts: the arrays.
    """

    kind: str
    devices: int
    source: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the global arrays."""
        return sum(bytes_of(part.dtype, part.shape) for part in self.parts)

    @property
    def sent(self) -> float:
        """Bytes that each device sends if the exchange is a ring."""
        share = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of everything that a step may exchange.

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
        """Return what an array of a collective is."""
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
        halves: bool = False,
    ) -> list[str]:
        """Return what a step exchanges that it should not, in words.

        Args:
            found: its collectives, those of all its programs.
            reassign: whether the step matches its batch.
            sharded: whether the permutation is sharded over the devices.
            halves: whether it is two programs; the second one computes batch norm's moments again,
                and gathers the features once more.
        """
        parts = [(part, each) for each in found for part in each.parts]
        faults = [
            f"{part.carries}: {each.kind} of {part.dtype}{list(part.shape)} from {each.source!r}"
            for part, each in parts
            if part.carries not in ALLOWED
        ]
        kernels = Counter(math.prod(p.shape) for p, _ in parts if p.carries == GRADIENT)
        for size, count in (kernels - Counter(self.weights)).items():
            faults.append(f"{GRADIENT}: {count} of {size} elements too many")
        for size, count in (Counter(self.weights) - kernels).items():
            faults.append(f"{GRADIENT}: {count} of {size} elements are never summed")
        # The gradient of each vector; of each layer two moments, and one sum more on the way back.
        least = 2 * sum(self.channels)
        most = (3 + 2 * halves) * sum(self.channels) + sum(self.vectors)
        if self.batch in self.channels:  # weights of records look the same where they are summed
            most += self.batch * reassign
        channels = sum(math.prod(p.shape) for p, _ in parts if p.carries == CHANNELS)
        if not least <= channels <= most:
            faults.append(f"{CHANNELS}: {channels} numbers, not {least} to {most}")
        count = Counter(part.carries for part, _ in parts)
        spread = reassign and self.blocks % self.devices != 0  # blocks lie across devices
        limits = {
            FEATURES: (2 + halves) * spread,
            INTEGERS: 2 * reassign + (2 + reassign) * sharded,
            WEIGHTS: int(spread),
            SOLUTION: int(halves),
        }
        faults += [
            f"{name}: {count[name]}, not {limit} at the most"
            for name, limit in limits.items()
            if count[name] > limit
        ]
        return faults


def read(program: str, sizes: Sizes) -> list[Collective]:
    """Return the collectives of a compiled program."""
    found: dict[str, Collective] = {}
    for operations in computations(program).values():
        for opcode, line in operations:
            if COLLECTIVES.match(opcode) and not opcode.endswith("-done"):
                # On a TPU a collective that overlaps with other work is in each of their fusions.
                channel = re.search(r"channel_id=\d+", line)
                found[channel[0] if channel else line] = _collective(opcode, line, sizes)
    return list(found.values())


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
    """Return the number of devices of each group; None if the line does not contain it."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        axes = dict(re.findall(r"('\w+')=(\d+)", found[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'\w+'", found[2]))
    return None
