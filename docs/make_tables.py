"""Write the tables of the pages from the JSON files in docs/results.

    python docs/make_tables.py [--check]

A table is between ``<!-- table: NAME -->`` and ``<!-- end of table -->``, in README.md or in a
page of docs; NAME is a key of TABLES. The same command writes docs/results/suite_cifar10.md.
``--check`` writes nothing, and exits with 1 if a page differs from what would be written.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nat_jax.cli.help_text import markdown_table_of_keys
from nat_jax.experiments import pages as suite_pages
from nat_jax.report import markdown_table
from nat_jax.report import rows as result_rows
from nat_jax.report.tables import network_name, probe_name

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NONE = "–"
SAVING = ("standing_still", "to_save", "to_restore")  # seconds of a checkpoint


def measured(name: str) -> dict[str, Any]:
    """Return a file of docs/results."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> str:
    """Return a Markdown table whose first columns are names and all others are numbers."""
    rule = ["---"] * names + ["---:"] * (len(head) - names)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rows))


def percent(mean: float, std: float | None, digits: int = 1) -> str:
    """Return an accuracy in [0, 1] as percent, with its standard deviation where it has one."""
    text = f"{100 * mean:.{digits}f}"
    return text if std is None else f"{text} ± {100 * std:.{digits}f}"


def milliseconds(value: float) -> str:
    """Return a time with three digits, or with all of those before the point."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def scores(name: str) -> list[result_rows.Row]:
    """Return the rows of accuracies of a result."""
    return result_rows.current(measured(name)["table"])


def accuracies(name: str, **wanted: tuple[str, ...]) -> str:
    """Return the accuracies of a run: those of the wanted layers, labels and probes."""
    chosen = [
        row for row in scores(name) if all(row[key] in values for key, values in wanted.items())
    ]
    return markdown_table(chosen).rstrip("\n") + "\n"


def last_convolutions() -> str:
    """Return the accuracies of the last convolution with all labels, on two data sets."""
    fashion = accuracies("fashion_mnist", layer=("conv3",), labels=("all",))
    cifar10 = accuracies("cifar10", layer=("conv4",), labels=("all",))
    return (
        fashion.replace("| labels |", "| data |").replace("| all |", "| Fashion-MNIST |")
        + cifar10.partition("| all |")[1]
        + cifar10.partition("| all |")[2]
    ).replace("| all |", "| CIFAR-10 |")


def knn_and_linear(stem: str) -> str:
    """Return kNN for three k, and the linear probe, of all networks of two results."""
    columns = ("k=1", "k=20", "k=200", "linear_probe")
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name in (f"{stem}_knn", f"{stem}_linear_probe"):
        for row in scores(name):
            if row["probe"] in columns and row["labels"] in ("weighted votes", "all"):
                found.setdefault((row["layer"], row["network"]), {})[row["probe"]] = row["mean"]
    best = {column: max(cells[column] for cells in found.values()) for column in columns}
    lines = []
    for (layer, network), cells in sorted(found.items(), key=lambda item: _order(item[0][0])):
        shown = [f"{100 * cells[column]:.1f}" for column in columns]
        bold = [cells[column] == best[column] for column in columns]
        lines.append(
            [
                NONE if layer in result_rows.NO_NETWORK else layer,
                network_name(network),
                *(f"**{text}**" if top else text for text, top in zip(shown, bold, strict=True)),
            ]
        )
    return table(("features", "network", "k = 1", "k = 20", "k = 200", "linear"), lines, names=2)


def _order(layer: str) -> int:
    known = [*result_rows.NO_NETWORK, "z"]
    return known.index(layer) if layer in known else len(known)


def ablations() -> str:
    """Return what each of four parts of configs/modern/cifar10.py is worth."""
    rows = measured("ablations_cifar10")["rows"]
    columns = [key for key in rows[0] if key != "name"]
    words = [key.split() for key in columns]
    head = ["", *(f"{layer}, {probe_name(probe)}" for layer, probe in words)]
    cells = [[percent(row[key]["mean"], row[key]["std"]) for key in columns] for row in rows]
    return table(head, [[row["name"], *c] for row, c in zip(rows, cells, strict=True)])


def solvers() -> str:
    """Return the auction's milliseconds and those of other solvers, by size."""
    lines = []
    for size, name in (("256", "256 x 256"), ("1024", "1024 x 1024"), ("4096", "4096 x 4096")):
        what = f"{size}, geometric mean of 5 families"
        of_size = [target for target in measured("assign")["targets"] if target["what"] == what]
        others = {target["rival"]: milliseconds(target["rival_ms"]) for target in of_size}
        cells = [others.get(other, NONE) for other in ("scipy", "optax", "lapx lapjvr")]
        lines.append([name, milliseconds(of_size[0]["ms"]), *cells])
    return table(("problem", "`auction`", "SciPy", "optax", "lapx"), lines)


def steps() -> str:
    """Return the milliseconds of each kind of step, for two networks."""
    kinds = {
        "NAT": "NAT",
        "supervised": "supervised",
        "NAT, re-matching, device, auction": "NAT, re-matching",
        "NAT, re-matching, host, auction": "NAT, re-matching on the host",
    }
    lines = []
    for group in measured("step")["groups"]:
        times = {row["name"]: row["ms"] for row in group["results"]}
        lines.append([group["problem"]["name"], *(f"{times[kind]:,.0f}" for kind in kinds)])
    return table(("network", *kinds.values()), lines)


def ratios_of_steps() -> str:
    """Return how long a step takes compared with another: medians of ratios, and quartiles."""
    matching = "NAT, re-matching, device, auction"
    pairs = {
        ("step", "NAT", "by hand"): "NAT, no re-matching / the same written by hand",
        ("step", "NAT", "softmax on z"): "NAT, no re-matching / a linear layer and softmax on z",
        ("step", "NAT", "supervised"): 'NAT, no re-matching / `targets.kind = "labels"`, softmax',
        ("cycle", matching, "supervised"): "NAT, three epochs, one re-matching / supervised",
        ("step", matching, "NAT"): "NAT, re-matching on the device / no re-matching",
        ("step", matching.replace("device", "host"), "NAT"): (
            "NAT, re-matching on the host / no re-matching"
        ),
    }
    groups = measured("step")["groups"]
    lines = []
    for pair, what in pairs.items():
        cells = []
        for group in groups:
            (low, middle, high) = next(
                ratio["quartiles"]
                for ratio in group["ratios"]
                if (ratio["what"], ratio["one"], ratio["other"]) == pair
            )
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        lines.append([what, *cells])
    return table(("time of one / of the other", *(g["problem"]["name"] for g in groups)), lines)


def beside_pytorch() -> str:
    """Return a step's and a pass's times over PyTorch's, wall clock and processor time."""
    matching = "NAT, re-matching, device, auction"
    pairs = {
        ("NAT", "PyTorch"): "a step",
        (matching, "PyTorch"): "a step that re-matches",
        ("features", "PyTorch, features"): "features, evaluation mode",
    }
    lines = []
    for cores, name in ((1, "step_one_core"), (2, "step")):
        for group in measured(name)["groups"]:
            found = {(ratio["one"], ratio["other"]): ratio for ratio in group["ratios"]}
            for pair, what in pairs.items():
                low, middle, high = found[pair]["quartiles"]
                wall = f"{middle:.2f} ({low:.2f} to {high:.2f})"
                row = [group["problem"]["name"], str(cores), what, wall]
                lines.append([*row, f"{found[pair]['cpu']:.2f}"])
    return table(("network", "cores", "time over PyTorch's", "wall clock", "processor"), lines)


def first_steps() -> str:
    """Return the seconds that a new process takes to its first steps."""
    starts = measured("step")["start"]
    head = [
        f"{start['problem'].split()[0]}{', again' * (start['programs'] == 'kept')}"
        for start in starts
    ]
    parts = {
        "imports and JAX": "imports, starting JAX",
        "state of NAT": "the first state",
        "NAT": "first step without re-matching",
        "NAT, re-matching, device": "first step that re-matches on the device",
        "NAT, re-matching, host": "first step that re-matches on the host",
    }
    lines = [
        [name, *(f"{start['seconds'][part]:.1f}" for start in starts)]
        for part, name in parts.items()
    ]
    return table(["", *head], lines)


def loading() -> str:
    """Return how fast photographs are loaded, compared with two other programs."""
    (group,) = [g for g in measured("input_pipeline")["groups"] if g["name"] == "photos500"]
    pairs = {(ratio["one"], ratio["other"]): ratio for ratio in group["ratios"]}
    others = {
        "limit, simplejpeg": "a bare loop that reads nothing",
        "PyTorch DataLoader, Pillow": "PyTorch's `DataLoader`",
    }
    lines = []
    for source in ("folder", "arrayrecord"):
        for other, name in others.items():
            ratio = pairs[f"ours, {source}, simplejpeg", other]
            cells = (f"{ratio['quartiles'][1]:.2f}", f"{ratio['cpu']:.2f}")
            lines.append((f"`{source}:`", name, *cells))
    return table(("source", "compared with", "wall clock", "CPU time"), lines, names=2)


def memory_of_a_device() -> str:
    """Return the memory that each kind of step needs on a device."""
    needed: dict[tuple[str, int, int], list[str]] = {}
    for row in measured("collectives")["rows"]:
        target = (row["target"], row["records"], row["batch"] // row["devices"])
        largest = max(program["bytes"]["all"] for program in row["programs"])
        needed.setdefault(target, []).append(f"{largest / 1e9:.2f} GB")
    head = ("compiled for", "data set", "images per device", "plain", "match on devices")
    lines = [(name, f"{n:,}", str(images), *cells) for (name, n, images), cells in needed.items()]
    return table((*head, "match on hosts"), lines)


def very_many_images() -> str:
    """Return what a permutation of very many images costs."""
    lines = []
    for row in measured("billion")["rows"]:
        saving = row["checkpoint"]
        lines.append(
            (
                f"{row['records']:,}",
                f"{row['step_ms']['plain']['median']:.1f} ms",
                f"{row['step_ms']['match']['median']:.1f} ms",
                f"{max(row['peak_bytes'].values()) / 1e9:.2f} GB",
                f"{row['check']['seconds']:.3g} s",
                f"{row['check']['bytes'] / 1e6:.0f} MB",
                f"{saving['bytes'] / 1e9:.2f} GB",
                *(f"{saving[f'seconds_{part}']:.3g} s" for part in SAVING),
            )
        )
    head = ("images", "a step", "a step that matches", "peak memory", "check", "its memory")
    return table((*head, "checkpoint", "blocked", "saved", "restored"), lines, names=0)


def data_set_sizes() -> str:
    """Return the time of a step and the memory, by the number of images."""
    lines = [
        [
            f"{row['records']:,}",
            f"{row['step_ms']['plain']['median']:.1f}",
            f"{row['step_ms']['match']['median']:.1f}",
            f"{max(row['peak_bytes'].values()) / 1e9:.2f} GB",
        ]
        for row in measured("billion")["rows"]
    ]
    head = ("images", "a step, ms", "a step that matches, ms", "peak memory")
    return table(head, lines, names=0)


def solvers_in_training() -> str:
    """Return the accuracy after training with each solver, and its time."""
    names = {
        "scipy": "`scipy`, exact",
        "auction": "`auction`, the default",
        "auction, eps 0.05": "`auction`, `eps=0.05`",
        "auction, eps 0.2": "`auction`, `eps=0.2`",
    }
    arms = measured("solver_for_training")["arms"]
    exact, lines = arms["scipy"], []
    for arm, name in names.items():
        cells = [name]
        for probe in ("knn", "linear_probe"):
            values = arms[arm][probe]
            change = [a - b for a, b in zip(values, exact[probe], strict=True)]
            cells.append(percent(statistics.fmean(values), statistics.stdev(values), 2))
            difference = percent(statistics.fmean(change), statistics.stdev(change), 2)
            cells.append("" if arm == "scipy" else difference)
        cells.append(f"{statistics.fmean(arms[arm]['cosine_after']):.4f}")
        lines.append([*cells, f"{arms[arm]['solve_ms']:.2f}"])
    head = ("solver", "kNN %", "minus exact", "linear %", "minus exact", "cosine after matching")
    return table((*head, "ms a matching"), lines)


def claims() -> str:
    """Return the claims of the paper and their verdicts."""
    made = suite_pages.markdown(measured("suite_cifar10"))
    return made.partition("## Claims\n\n")[2].partition("\n\n")[0] + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "digits": partial(accuracies, "digits"),
    "digits, kNN": partial(
        accuracies, "digits", layer=("pixels", "z"), labels=("all",), probe=("knn",)
    ),
    "Fashion-MNIST": partial(accuracies, "fashion_mnist"),
    "CIFAR-10": partial(accuracies, "cifar10"),
    "last convolutions": last_convolutions,
    "beyond the paper": partial(accuracies, "modern_cifar10"),
    "ablations": ablations,
    "baselines": partial(knn_and_linear, "cifar10_10000"),
    "without a network": partial(knn_and_linear, "cifar10_5000"),
    "solvers": solvers,
    "solvers in training": solvers_in_training,
    "steps": steps,
    "ratios of steps": ratios_of_steps,
    "beside PyTorch": beside_pytorch,
    "first steps": first_steps,
    "loading": loading,
    "data set sizes": data_set_sizes,
    "claims": claims,
    "memory of a device": memory_of_a_device,
    "very many images": very_many_images,
    "keys": markdown_table_of_keys,
}


def written(text: str) -> str:
    """Return a page with the tables as they are measured."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def pages() -> dict[Path, str]:
    """Return all pages as they should be, by path."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    made = {path: written(path.read_text("utf-8")) for path in paths}
    made[RESULTS / "suite_cifar10.md"] = suite_pages.markdown(measured("suite_cifar10"))
    return made


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    check = parser.parse_args().check
    changed = [path for path, text in pages().items() if path.read_text("utf-8") != text]
    for path in changed:
        print(f"{path.relative_to(ROOT)} {'differs from docs/results' if check else 'written'}")
        if not check:
            path.write_text(pages()[path], "utf-8")
    sys.exit(f"run `python {Path(__file__).relative_to(ROOT)}`" if check and changed else 0)


if __name__ == "__main__":
    main()
