"""Write the tables of the pages from the JSON files in docs/results.

    python docs/make_tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``, in README.md or in a
page of docs; NAME is a key of TABLES. The same command writes docs/results/suite_cifar10.md.
``--check`` writes nothing, and exits with 1 if a page differs from what would be written.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nat_jax.cli.help_text import markdown_table_of_keys
from nat_jax.experiments import pages as suite_pages
from nat_jax.report import markdown_table
from nat_jax.report.tables import NETWORK_NAMES, PROBE_NAMES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
MARKED = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NONE = "–"


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


def layer_of(row: Mapping[str, Any]) -> str:
    """Return the layer of a row of accuracies, whose key was `features` in version 0.1."""
    return row.get("layer", row.get("features"))


def accuracies(name: str, **wanted: tuple[str, ...]) -> str:
    """Return the accuracies of a run: those of the wanted layers, labels and probes."""
    rows = measured(name)["table"]
    for key, values in wanted.items():
        rows = [row for row in rows if (row[key] if key in row else layer_of(row)) in values]
    return markdown_table(rows).rstrip("\n") + "\n"


def last_convolutions() -> str:
    """Return the accuracies of the last convolution with all labels, on two data sets."""
    fashion = accuracies("fashion_mnist", layer=("conv3",), labels=("all",))
    cifar10 = accuracies("cifar10", layer=("conv4",), labels=("all",))
    return (
        fashion.replace("| labels |", "| data |").replace("| all |", "| Fashion-MNIST |")
        + cifar10.partition("| all |")[1]
        + cifar10.partition("| all |")[2]
    ).replace("| all |", "| CIFAR-10 |")


def baselines() -> str:
    """Return kNN for three k, and the linear probe, of all networks on 10,000 images."""
    columns = ("k=1", "k=20", "k=200", "linear_probe")
    found: dict[tuple[str, str], dict[str, float]] = {}
    for name in ("cifar10_10000_knn", "cifar10_10000_linear_probe"):
        for row in measured(name)["table"]:
            if row["probe"] in columns and row["labels"] in ("weighted votes", "all"):
                found.setdefault((layer_of(row), row["network"]), {})[row["probe"]] = row["mean"]
    best = {column: max(cells[column] for cells in found.values()) for column in columns}
    rows = []
    for (layer, network), cells in sorted(found.items(), key=lambda item: _order(item[0][0])):
        shown = [f"{100 * cells[column]:.1f}" for column in columns]
        bold = [cells[column] == best[column] for column in columns]
        rows.append(
            [
                NONE if layer in ("pixels", "patches") else layer,
                NETWORK_NAMES.get(network, network),
                *(f"**{text}**" if top else text for text, top in zip(shown, bold, strict=True)),
            ]
        )
    return table(("features", "network", "k = 1", "k = 20", "k = 200", "linear"), rows, names=2)


def _order(layer: str) -> int:
    return ("pixels", "patches", "z").index(layer) if not layer.startswith("conv") else 3


def ablations() -> str:
    """Return what each of four parts of configs/modern/cifar10.py is worth."""
    rows = measured("ablations_cifar10")["rows"]
    columns = [key for key in rows[0] if key != "name"]
    words = [key.split() for key in columns]
    head = ["", *(f"{layer}, {PROBE_NAMES[probe]}" for layer, probe in words)]
    cells = [[percent(row[key]["mean"], row[key]["std"]) for key in columns] for row in rows]
    return table(head, [[row["name"], *c] for row, c in zip(rows, cells, strict=True)])


def solvers() -> str:
    """Return the auction's milliseconds and those of other solvers, by size."""
    rows = []
    for size, name in (("256", "256 x 256"), ("1024", "1024 x 1024"), ("4096", "4096 x 4096")):
        what = f"{size}, geometric mean of 5 families"
        of_size = [target for target in measured("assign")["targets"] if target["what"] == what]
        others = {target["rival"]: milliseconds(target["rival_ms"]) for target in of_size}
        cells = [others.get(other, NONE) for other in ("scipy", "optax", "lapx lapjvr")]
        rows.append([name, milliseconds(of_size[0]["ms"]), *cells])
    return table(("problem", "`auction`", "SciPy", "optax", "lapx"), rows)


def steps() -> str:
    """Return the milliseconds of each kind of step, for two networks."""
    kinds = {
        "NAT": "NAT",
        "supervised": "supervised",
        "NAT, re-matching, device, auction": "NAT, re-matching",
        "NAT, re-matching, host, auction": "NAT, re-matching on the host",
    }
    rows = []
    for group in measured("step")["groups"]:
        times = {row["name"]: row["ms"] for row in group["results"]}
        rows.append([group["problem"]["name"], *(f"{times[kind]:,.0f}" for kind in kinds)])
    return table(("network", *kinds.values()), rows)


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
    rows = []
    for pair, what in pairs.items():
        cells = []
        for group in groups:
            (low, middle, high) = next(
                ratio["quartiles"]
                for ratio in group["ratios"]
                if (ratio["what"], ratio["one"], ratio["other"]) == pair
            )
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        rows.append([what, *cells])
    return table(("time of one / of the other", *(g["problem"]["name"] for g in groups)), rows)


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
    rows = [
        [name, *(f"{start['seconds'][part]:.1f}" for start in starts)]
        for part, name in parts.items()
    ]
    return table(["", *head], rows)


def loading() -> str:
    """Return how fast photographs are loaded, compared with two other programs."""
    (group,) = measured("input_pipeline")["groups"]
    pairs = {(pair["one"], pair["other"]): pair for pair in group["ratios"]}
    rivals = {
        "limit, simplejpeg": "a bare loop that reads nothing",
        "PyTorch DataLoader, Pillow": "PyTorch's `DataLoader`",
    }
    rows = []
    for source in ("folder", "arrayrecord"):
        for rival, name in rivals.items():
            pair = pairs[f"ours, {source}, simplejpeg", rival]
            ratios = (f"{pair['quartiles'][1]:.2f}", f"{pair['cpu']:.2f}")
            rows.append([f"`{source}:`", name, *ratios])
    return table(("source", "compared with", "wall clock", "CPU time"), rows, names=2)


def data_set_sizes() -> str:
    """Return the time of a step and the memory, by the number of images."""
    rows = [
        [
            f"{row['records']:,}",
            f"{row['step_ms']['plain']['median']:.1f}",
            f"{row['step_ms']['match']['median']:.1f}",
            f"{max(row['peak_bytes'].values()) / 1e9:.2f} GB",
        ]
        for row in measured("billion")["rows"]
    ]
    head = ("images", "a step, ms", "a step that matches, ms", "peak memory")
    return table(head, rows, names=0)


def solvers_in_training() -> str:
    """Return the accuracy after training with each solver, and its time."""
    names = {
        "scipy": "`scipy`, exact",
        "auction": "`auction`, the default",
        "auction, eps 0.05": "`auction`, `eps=0.05`",
        "auction, eps 0.2": "`auction`, `eps=0.2`",
    }
    arms = measured("solver_for_training")["arms"]
    exact, rows = arms["scipy"], []
    for arm, name in names.items():
        cells = [name]
        for probe in ("knn", "linear_probe"):
            values = arms[arm][probe]
            change = [a - b for a, b in zip(values, exact[probe], strict=True)]
            cells.append(percent(statistics.fmean(values), statistics.stdev(values), 2))
            difference = percent(statistics.fmean(change), statistics.stdev(change), 2)
            cells.append("" if arm == "scipy" else difference)
        cells.append(f"{statistics.fmean(arms[arm]['cosine_after']):.4f}")
        rows.append([*cells, f"{arms[arm]['solve_ms']:.2f}"])
    head = ("solver", "kNN %", "minus exact", "linear %", "minus exact", "cosine after matching")
    return table((*head, "ms a matching"), rows)


def claims() -> str:
    """Return the claims of the paper and their verdicts."""
    made = suite_pages.markdown(measured("suite_cifar10"))
    return made.partition("## Claims\n\n")[2].partition("\n\n")[0] + "\n"


def memory_of_a_device() -> str:
    """Return the memory that a device needs for each kind of step."""
    cells: dict[tuple[str, int, int], list[str]] = {}
    variants: dict[str, None] = {}
    for row in measured("collectives")["rows"]:
        most = max(program["bytes"]["all"] for program in row["programs"])
        case = (row["target"], row["records"], row["batch"] // row["devices"])
        cells.setdefault(case, []).append(f"{most / 1e9:.2f} GB")
        variants[row["variant"]] = None
    rows = [
        [target, f"{records:,}", str(images), *sizes]
        for (target, records, images), sizes in cells.items()
    ]
    return table(("compiled for", "data set", "images a device", *variants), rows)


def very_many_images() -> str:
    """Return the time, the memory and the checkpoints of a step, by the number of images."""
    head = ("images", "a plain step", "a matching step", "most memory", "proof", "needs")
    head += ("checkpoint", "standing still", "saved after", "restored in")
    rows = []
    for row in measured("billion")["rows"]:
        kept = row["checkpoint"]
        seconds = ("seconds_standing_still", "seconds_to_save", "seconds_to_restore")
        rows.append(
            [
                f"{row['records']:,}",
                *(f"{row['step_ms'][name]['median']:.1f} ms" for name in ("plain", "match")),
                f"{max(row['peak_bytes'].values()) / 1e9:.2f} GB",
                f"{row['check']['seconds']:.3g} s",
                f"{row['check']['bytes'] / 1e6:.0f} MB",
                f"{kept['bytes'] / 1e9:.2f} GB",
                *(f"{kept[name]:.3g} s" for name in seconds),
            ]
        )
    return table(head, rows)


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
    "baselines": baselines,
    "solvers": solvers,
    "solvers in training": solvers_in_training,
    "steps": steps,
    "ratios of steps": ratios_of_steps,
    "first steps": first_steps,
    "loading": loading,
    "data set sizes": data_set_sizes,
    "claims": claims,
    "keys": markdown_table_of_keys,
    "memory of a device": memory_of_a_device,
    "very many images": very_many_images,
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
