"""Tables of probe results for the terminal and for Markdown, and the names that they show."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nat_jax.errors import InputError
from nat_jax.report.rows import (
    ALL_LABELS,
    KEYS,
    NAT,
    NO_NETWORK,
    OWN,
    SUPERVISED,
    TRAINED,
    UNTRAINED,
    Row,
    current,
    headline,
    kind,
    same,
)

# Networks in the order in which tables list them.
NETWORK_NAMES = {
    **{name: name for name in NO_NETWORK.values()},
    UNTRAINED: "untrained",
    NAT: "NAT",
    SUPERVISED["square"]: "supervised, square loss",
    SUPERVISED["softmax"]: "supervised, softmax",
}
# Probes in the order in which the suite's tables list them.
PROBE_NAMES = {OWN: "own", "mlp_probe": "MLP", "linear_probe": "linear", "knn": "kNN"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One accuracy in percent.

    Attributes:
        mean: over the seeds.
        std: standard deviation over the seeds; None for one seed, or without a network if the
            seed changes nothing.
        best: no other network or layer has more in the same column and number of labels.
        gain: points above the untrained network with the same layer and probe; None if there is
            no such row.
    """

    mean: float
    std: float | None
    best: bool
    gain: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer of one network, with one cell per probe."""

    layer: str
    network: str
    cells: tuple[Cell | None, ...]

    @property
    def trained(self) -> bool:
        """Whether the network was trained."""
        return kind(self.network) in TRAINED


@dataclasses.dataclass(frozen=True)
class Table:
    """Results arranged for reading, one group of lines per number of labels.

    Attributes:
        probes: the columns.
        groups: the lines, by number of labels.
        seeds: number of draws behind each mean.
        drawn: "seeds", or "draws" where more than the seed differs.
    """

    probes: tuple[str, ...]
    groups: dict[str, tuple[Line, ...]]
    seeds: int
    drawn: str

    @property
    def cells(self) -> list[Cell]:
        """All cells that hold a number."""
        lines = [line for group in self.groups.values() for line in group]
        return [cell for line in lines for cell in line.cells if cell is not None]

    @property
    def spread(self) -> str:
        """What the numbers after "±" are, for a heading; "" if there are none."""
        if all(cell.std is None for cell in self.cells):
            return ""
        return f", mean ± standard deviation over {self.seeds} {self.drawn}"


def arrange(rows: Sequence[Row]) -> Table:
    """Arrange result rows over seeds (see ``report.rows``), of version 0.1 too.

    Baselines without a network come first, then z, then the other layers; within a layer the
    networks have the order of ``NETWORK_NAMES``. Layers, probes and numbers of labels keep the
    order in which they first appear.

    Raises:
        ValueError: a row lacks a key, or two rows have the same layer, network, probe and labels.
    """
    rows = current(rows)
    by_key: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        missing = {*KEYS, "mean"} - set(row)
        if missing:
            raise InputError(f"table row: expected the key {', '.join(sorted(missing))} in {row}")
        key = (row["labels"], row["layer"], row["network"], row["probe"])
        if key in by_key:
            raise InputError(f"table: expected one row for {key}, got two")
        by_key[key] = row

    layers, order = _unique(row["layer"] for row in rows), list(NETWORK_NAMES)

    def position(pair: tuple[str, str]) -> tuple[bool, bool, int, int]:
        layer, network = pair
        known = order.index(kind(network)) if kind(network) in order else len(order)
        return network not in NO_NETWORK.values(), layer != "z", layers.index(layer), known

    probes = _unique(row["probe"] for row in rows)
    groups = {}
    for labels in _unique(row["labels"] for row in rows):
        pairs = _unique((r["layer"], r["network"]) for r in rows if r["labels"] == labels)
        columns = [_column({p: by_key.get((labels, *p, probe)) for p in pairs}) for probe in probes]
        groups[labels] = tuple(
            Line(layer, network, tuple(column[layer, network] for column in columns))
            for layer, network in sorted(pairs, key=position)
        )
    seeds = [row.get("seeds") or () for row in rows]
    named = any(isinstance(seed, str) for drawn in seeds for seed in drawn)
    most = max(map(len, seeds), default=0)
    return Table(tuple(probes), groups, most, "draws" if named else "seeds")


def _column(rows: Mapping[tuple[str, str], Row | None]) -> dict[tuple[str, str], Cell | None]:
    """Return the cells of one probe and number of labels by (layer, network)."""
    shown = {pair: round(100 * row["mean"], 1) for pair, row in rows.items() if row is not None}
    cells: dict[tuple[str, str], Cell | None] = dict.fromkeys(rows)
    for (layer, network), row in rows.items():
        if row is None:
            continue
        base = rows.get((layer, UNTRAINED)) if kind(network) in TRAINED else None
        std = row.get("std")
        # Without a network most probes do not depend on the seed, and "± 0.0" would be noise.
        fixed = network in NO_NETWORK.values() and std is not None and std < 1e-12
        cells[layer, network] = Cell(
            mean=100 * row["mean"],
            std=None if std is None or fixed else 100 * std,
            # Compared as shown, so that numbers that look equal are marked alike.
            best=shown[layer, network] == max(shown.values()),
            gain=None if base is None else 100 * (row["mean"] - base["mean"]),
        )
    return cells


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def text_table(rows: Sequence[Row]) -> str:
    """Return the table for a terminal: percent, the best of a column within a group starred."""
    table = arrange(rows)
    printed = [("features", "network", *(probe_name(p) + " " for p in table.probes))]
    titles = {}
    for labels, group in table.groups.items():
        titles[len(printed)] = labels_title(labels)
        for line in group:
            cells = (_text(cell, bool(table.spread)) for cell in line.cells)
            printed.append((layer_name(line), network_name(line.network), *cells))
    widths = [max(map(len, column)) for column in zip(*printed, strict=True)]
    text = [f"Top-1 accuracy in percent{table.spread} (* best of its column within a group)", ""]
    for number, words in enumerate(printed):
        if number in titles:
            text += ["", titles[number]]
        padded = (
            word.ljust(width) if column < 2 else word.rjust(width)
            for column, (word, width) in enumerate(zip(words, widths, strict=True))
        )
        text.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(text)


def _text(cell: Cell | None, spreads: bool) -> str:
    """Return a cell padded on the right, so that the decimal points of a column line up."""
    if cell is None:
        return "- "
    suffix = str(cell).removeprefix(f"{cell.mean:.1f}") + "*" * cell.best
    return f"{cell.mean:.1f}{suffix:{6 * spreads + 1}}"


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown; the best of a column within a group bold."""
    table = arrange(rows)
    lines = [
        [
            labels,
            layer_name(line),
            network_name(line.network),
            *(f"**{c}**" if c and c.best else str(c or "–") for c in line.cells),
        ]
        for labels, group in table.groups.items()
        for line in group
    ]
    head = ["labels", "features", "network", *map(probe_name, table.probes)]
    return markdown(head, lines, numbers=len(table.probes))


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """Return any table as Markdown; the last ``numbers`` columns are aligned to the right."""
    rule = ["---"] * (len(head) - numbers) + ["---:"] * numbers
    cells = ([cell.replace("|", "\\|") for cell in line] for line in [head, rule, *lines])
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def outcome(rows: Sequence[Row]) -> str:
    """Return one or two sentences about what training achieved.

    The first compares the headline's network (see ``rows.headline``) with the untrained one and
    with raw pixels; the second counts the comparisons with the untrained network that it won.
    """
    rows = current(rows)
    if not any(row["network"] in TRAINED for row in rows):
        return "No trained network was evaluated."
    row, untrained = headline(rows)
    pixels = same(rows, row, layer="pixels", network=NO_NETWORK["pixels"])
    name = network_name(row["network"])
    text = f"{probe_name(row['probe'])} on {row['layer']}"
    text += "" if row["labels"] == ALL_LABELS else f" with {labels_title(row['labels'])}"
    text += f": {100 * untrained['mean']:.1f} % untrained → " if untrained else ": "
    text += f"{100 * row['mean']:.1f} % {name}"
    text += f" (raw pixels {100 * pixels['mean']:.1f} %)." if pixels else "."

    gains = [cell.gain for cell in arrange(rows).cells if cell.gain is not None]
    if len(gains) < 2:
        return text
    better = sum(gain > 0 for gain in gains)
    if not better:
        return f"{text} {name} is not above the untrained network in any of {len(gains)}."
    counted = f"all {better}" if better == len(gains) else f"{better} of {len(gains)}"
    return f"{text} {name} is above the untrained network in {counted} comparisons."


def probe_name(probe: str) -> str:
    """Return the heading of a probe's column."""
    return PROBE_NAMES.get(probe, probe)


def network_name(network: str) -> str:
    """Return a network's name in tables; "nat: FOLDER" keeps the folder."""
    return NETWORK_NAMES.get(kind(network), kind(network)) + network.removeprefix(kind(network))


def layer_name(line: Line) -> str:
    """Return a layer's name in tables; a dash for baselines without a network."""
    return "–" if line.network in NO_NETWORK.values() else line.layer


def labels_title(labels: str) -> str:
    """Return the heading of a group of lines."""
    return "all labels" if labels == ALL_LABELS else labels.replace(" per ", " labels per ", 1)
