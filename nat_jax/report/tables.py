"""The table of probe results, for the terminal, for Markdown and for the report page."""

import dataclasses
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nat_jax.errors import InputError

NETWORK_NAMES = {
    "raw pixels": "raw pixels",
    "k-means patches": "k-means patches",
    "untrained": "untrained",
    "nat": "NAT",
    "supervised_square": "supervised, square loss",
    "supervised_softmax": "supervised, softmax",
}
PROBE_NAMES = {"own": "own", "knn": "kNN", "linear_probe": "linear", "mlp_probe": "MLP"}

TRAINED = ("nat", "supervised_square", "supervised_softmax")
_NO_NETWORK = ("raw pixels", "k-means patches")

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One accuracy in percent.

    Attributes:
        mean: over the seeds.
        std: standard deviation over the seeds; None for one seed, or for raw pixels where
            the seed changes nothing.
        best: no other network or layer has more in the same column and number of labels.
        gain: points above the same features of the untrained network; None where there are none.
    """

    mean: float
    std: float | None
    best: bool
    gain: float | None

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.std:.1f}" if self.std is not None else "")


@dataclasses.dataclass(frozen=True)
class Line:
    """One network's features: a line of the table."""

    features: str
    network: str
    cells: tuple[Cell | None, ...]  # one per probe


@dataclasses.dataclass(frozen=True)
class Table:
    """Results arranged for reading: a group of lines per number of labels.

    Attributes:
        probes: the columns.
        groups: the lines, by number of labels.
        seeds: over how many draws a mean is taken.
        drawn: "seeds", or "draws" where more than seeds differ.
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
    def spreads(self) -> bool:
        """Whether any cell has a standard deviation."""
        return any(cell.std is not None for cell in self.cells)


def arrange(rows: Sequence[Row]) -> Table:
    """Arrange the rows of a result: {"features", "network", "probe", "labels", "mean", "std"}.

    Lines go from raw pixels over z to the other layers, untrained before trained; these layers, the
    columns and the groups keep the order in which they first appear.

    Raises:
        ValueError: a row lacks a key, or two rows are about the same thing.
    """
    values: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        missing = {"features", "network", "probe", "labels", "mean"} - set(row)
        if missing:
            raise InputError(f"table row: expected the key {', '.join(sorted(missing))} in {row}")
        key = (row["labels"], row["features"], row["network"], row["probe"])
        if key in values:
            raise InputError(f"table: expected one row for {key}, got two")
        values[key] = row

    probes = _unique(row["probe"] for row in rows)
    order = list(NETWORK_NAMES)

    def place(pair: tuple[str, str]) -> tuple[bool, bool, int, int]:
        layer, network = pair
        kind = _kind(network)
        known = order.index(kind) if kind in order else len(order)
        return network not in _NO_NETWORK, layer != "z", layers.index(layer), known

    layers = _unique(row["features"] for row in rows)
    groups = {}
    for labels in _unique(row["labels"] for row in rows):
        pairs = _unique((r["features"], r["network"]) for r in rows if r["labels"] == labels)
        columns = [
            _column({pair: values.get((labels, *pair, p)) for pair in pairs}) for p in probes
        ]
        groups[labels] = tuple(
            Line(layer, network, tuple(column[layer, network] for column in columns))
            for layer, network in sorted(pairs, key=place)
        )
    seeds = max((len(row.get("seeds") or ()) for row in rows), default=0)
    tags = {type(tag) for row in rows for tag in row.get("seeds") or ()}
    return Table(tuple(probes), groups, seeds, "draws" if str in tags else "seeds")


def _column(rows: Mapping[tuple[str, str], Row | None]) -> dict[tuple[str, str], Cell | None]:
    shown = {line: round(100 * row["mean"], 1) for line, row in rows.items() if row is not None}
    cells: dict[tuple[str, str], Cell | None] = {}
    for line, row in rows.items():
        if row is None:
            cells[line] = None
            continue
        base = rows.get((line[0], "untrained")) if _kind(line[1]) in TRAINED else None
        std = row.get("std")
        # Without a network most probes do not depend on the seed: "± 0.0" would say nothing.
        settled = line[1] in _NO_NETWORK and std is not None and std < 1e-12
        cells[line] = Cell(
            mean=100 * row["mean"],
            std=None if std is None or settled else 100 * std,
            best=shown[line] == max(shown.values()),  # as shown: a tie marks all
            gain=None if base is None else 100 * (row["mean"] - base["mean"]),
        )
    return cells


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def text_table(rows: Sequence[Row]) -> str:
    """Return the table for a terminal: accuracy in percent, the best of each column starred."""
    table = arrange(rows)
    printed = [("features", "network", *(probe_name(p) + " " for p in table.probes))]
    titles = {}
    for labels, group in table.groups.items():
        titles[len(printed)] = labels_title(labels)
        for line in group:
            cells = (_text(cell, table.spreads) for cell in line.cells)
            printed.append((layer_name(line), network_name(line.network), *cells))
    widths = [max(map(len, column)) for column in zip(*printed, strict=True)]
    text = ["Top-1 accuracy in percent" + _note(table), ""]
    for number, words in enumerate(printed):
        if number in titles:
            text += ["", titles[number]]
        padded = (
            w.ljust(n) if i < 2 else w.rjust(n)
            for i, (w, n) in enumerate(zip(words, widths, strict=True))
        )
        text.append(("  " + "  ".join(padded)).rstrip())
    return "\n".join(text)


def markdown_table(rows: Sequence[Row]) -> str:
    """Return the table as Markdown; the best of each column bold."""
    table = arrange(rows)
    head = ["labels", "features", "network", *map(probe_name, table.probes)]
    printed = [head, ["---"] * 3 + ["---:"] * len(table.probes)]
    for labels, group in table.groups.items():
        for line in group:
            cells = (f"**{c}**" if c and c.best else str(c or "–") for c in line.cells)
            printed.append([labels, layer_name(line), network_name(line.network), *cells])
    return "\n".join("| " + " | ".join(words) + " |" for words in printed)


def html_table(rows: Sequence[Row]) -> str:
    """Return the table as an HTML <table>, with the gain of training beside each trained number."""
    table = arrange(rows)
    columns = len(table.probes) + 2
    head = "".join(f"<th scope=col class=num>{_escape(probe_name(p))}</th>" for p in table.probes)
    body = []
    for labels, group in table.groups.items():
        title = _escape(labels_title(labels))
        body.append(f"<tr class=group><th colspan={columns} scope=rowgroup>{title}</th></tr>")
        named = ""
        for line in group:
            layer = layer_name(line)
            shown, named = (
                "" if layer == named else _escape(layer),
                layer,
            )  # once, on its first line
            kind = "trained" if _kind(line.network) in TRAINED else "base"
            body.append(
                f'<tr class="{kind}"><td>{shown}</td>'
                f"<td>{_escape(network_name(line.network))}</td>"
                + "".join(_html_cell(cell) for cell in line.cells)
                + "</tr>"
            )
    return (
        "<table class=results><thead><tr><th scope=col>features</th><th scope=col>network</th>"
        f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td class=num>–</td>"
    spread = f"<span class=std>±{cell.std:.1f}</span>" if cell.std is not None else ""
    gain = ""
    if cell.gain is not None:
        rounded = round(cell.gain, 1)
        kind = "up" if rounded > 0 else "down" if rounded < 0 else ""
        sign = "+" if rounded > 0 else "−" if rounded < 0 else "±"
        gain = f'<span class="gain {kind}">{sign}{abs(rounded):.1f}</span>'
    mark = " best" if cell.best else ""
    return f'<td class="num{mark}"><span class=mean>{cell.mean:.1f}</span>{spread}{gain}</td>'


def _text(cell: Cell | None, spreads: bool) -> str:
    """Return a cell whose decimals stand in line with those above and below."""
    if cell is None:
        return "- "
    spread = "" if cell.std is None else f" ± {cell.std:.1f}"
    behind = spread + "*" * cell.best
    return f"{cell.mean:.1f}{behind:{6 * spreads + 1}}"


def _note(table: Table) -> str:
    over = f"{table.seeds} {table.drawn}"
    spread = f", mean ± standard deviation over {over}" if table.spreads else ""
    return f"{spread} (* best of its column)"


def outcome(rows: Sequence[Row]) -> str:
    """Say in one or two sentences what came of training, better or not.

    The first sentence is about a supervised network's own decisions, else kNN on z with all labels,
    or the first trained row where there is neither; the second counts all comparisons with the
    untrained network.
    """
    trained = [row for row in rows if row["network"] in TRAINED]
    if not trained:
        return "No trained network was judged."
    all_of_z = {r["probe"]: r for r in trained if (r["features"], r["labels"]) == ("z", "all")}
    row = all_of_z.get("own") or all_of_z.get("knn") or trained[0]

    def same(features: str, network: str) -> str | None:
        for other in rows:
            if (other["features"], other["network"]) == (features, network) and all(
                other[key] == row[key] for key in ("probe", "labels")
            ):
                return f"{100 * other['mean']:.1f}"
        return None

    untrained, pixels = same(row["features"], "untrained"), same("pixels", "raw pixels")
    said = f"{probe_name(row['probe'])} on {row['features']}"
    said += "" if row["labels"] == "all" else f" with {labels_title(row['labels'])}"
    said += f": {untrained} % untrained → " if untrained else ": "
    name = network_name(row["network"])
    said += f"{100 * row['mean']:.1f} % {name}" + (f" (raw pixels {pixels} %)" if pixels else "")
    return " ".join([said + ".", *_counted(rows, name)])


def _counted(rows: Sequence[Row], name: str) -> list[str]:
    gains = [cell.gain for cell in arrange(rows).cells if cell.gain is not None]
    if len(gains) < 2:
        return []
    better = sum(gain > 0 for gain in gains)
    if better == len(gains):
        return [f"{name} is above the untrained network in all {better} comparisons."]
    if not better:
        return [f"{name} is not above the untrained network in any of {len(gains)}."]
    return [f"{name} is above the untrained network in {better} of {len(gains)} comparisons."]


def probe_name(probe: str) -> str:
    """Return how a table heads a probe's column."""
    return PROBE_NAMES.get(probe, probe)


def network_name(network: str) -> str:
    """Return how a table names a network; of several of a kind some have their folder's name."""
    kind = _kind(network)
    return NETWORK_NAMES.get(kind, kind) + network.removeprefix(kind)


def _kind(network: str) -> str:
    """Return what a network is, of names such as "nat: FOLDER"."""
    return network.partition(": ")[0]


def layer_name(line: Line) -> str:
    """Return how a table names a line's features."""
    return "–" if line.network in _NO_NETWORK else line.features


def labels_title(labels: str) -> str:
    """Return the heading of a group of lines."""
    return "all labels" if labels == "all" else labels.replace(" per ", " labels per ", 1)


def _escape(text: str) -> str:
    return html.escape(str(text))
