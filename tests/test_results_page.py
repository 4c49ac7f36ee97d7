"""The tables that pages repeat are those of the JSON files in docs/results."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
from project import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import ablations

from nat_jax.experiments import pages
from nat_jax.report import markdown_table
from nat_jax.report.tables import arrange

PAGE = "docs/results.md"


def measured(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text("utf-8"))


def accuracies(result: dict[str, Any]) -> list[str]:
    return markdown_table(result["table"]).splitlines()


def milliseconds(value: float) -> str:
    """Return three digits of a time, or all before the point."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def solvers(result: dict[str, Any]) -> list[str]:
    """Return a line for each size: the auction's milliseconds, and how its rivals compare."""
    lines = []
    for size, name in (("256", "256 x 256"), ("1024", "1024 x 1024"), ("4096", "4096 x 4096")):
        what = f"{size}, geometric mean of 5 families"
        of_size = [target for target in result["targets"] if target["what"] == what]
        rivals = {target["rival"]: milliseconds(target["rival_ms"]) for target in of_size}
        cells = [name, milliseconds(of_size[0]["ms"])]
        cells += [rivals.get(rival, "–") for rival in ("scipy", "optax", "lapx lapjvr")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def steps(result: dict[str, Any]) -> list[str]:
    """Return a line for each network: milliseconds of a step of each kind."""
    kinds = (
        "NAT",
        "supervised",
        "NAT, re-matching, device, auction",
        "NAT, re-matching, host, auction",
    )
    lines = []
    for group in result["groups"]:
        times = {r["name"]: r["ms"] for r in group["results"]}
        cells = [group["problem"]["name"], *(f"{times[kind]:,.0f}" for kind in kinds)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def loading(result: dict[str, Any]) -> list[str]:
    """Return a line for each goal of whole photographs: the ratio by the clock and by CPU time."""
    goals = {goal["what"]: goal for goal in result["goals"]}
    lines = []
    for source in ("folder", "arrayrecord"):
        for rival, name in (
            ("limit, simplejpeg", "a bare loop that reads nothing"),
            ("PyTorch DataLoader, Pillow", "PyTorch's `DataLoader`"),
        ):
            goal = goals[f"photos500: ours, {source}, simplejpeg / {rival}"]
            lines.append(f"| `{source}:` | {name} | {goal['value']:.2f} | {goal['cpu']:.2f} |")
    return lines


def sizes(result: dict[str, Any]) -> list[str]:
    """Return a line for each number of images: milliseconds of a step, and the most memory."""
    return [
        f"| {row['records']:,} | {row['step_ms']['plain']['median']:.1f} "
        f"| {row['step_ms']['match']['median']:.1f} "
        f"| {max(row['peak_bytes'].values()) / 1e9:.2f} GB |"
        for row in result["rows"]
    ]


def undone(result: dict[str, Any]) -> list[str]:
    return ablations.markdown(result["rows"]).splitlines()


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "digits": ("digits", accuracies),
    "fashion_mnist": ("fashion_mnist", accuracies),
    "cifar10": ("cifar10", accuracies),
    "beyond the paper": ("modern_cifar10", accuracies),
    "ablations": ("ablations_cifar10", undone),
    "solvers": ("assign", solvers),
    "steps": ("step", steps),
    "loading": ("input_pipeline", loading),
    "sizes": ("billion", sizes),
}


def stands_in(lines: list[str], page: str) -> bool:
    """Say whether a table's lines stand in a page, one below the other."""
    return "\n".join(lines) + "\n" in page


@pytest.mark.parametrize("table", TABLES)
def test_tables_are_what_was_measured(table: str) -> None:
    name, lines = TABLES[table]
    assert stands_in(lines(measured(name)), (ROOT / PAGE).read_text("utf-8"))


def shown_at_once(result: dict[str, Any]) -> list[str]:
    """Return the beginnings of the three lines that the quick start explains."""
    pixels, untrained, trained = arrange(result["table"]).groups["all"][:3]
    return [
        f"| `–`, raw pixels: {pixels.cells[0]} |",
        f"| `z`, untrained: {untrained.cells[0]} |",
        f"| `z`, NAT: {trained.cells[0]} |",
    ]


def test_the_quick_start_s_numbers_are_what_was_measured() -> None:
    page = (ROOT / "docs" / "quickstart.md").read_text("utf-8")
    assert all(line in page for line in shown_at_once(measured("digits")))
    assert not any(line in page for line in shown_at_once(measured("fashion_mnist")))


def test_the_paper_s_claims_are_those_of_the_suite() -> None:
    tables = pages.markdown(measured("suite_cifar10"))
    assert (ROOT / "docs" / "results" / "suite_cifar10.md").read_text("utf-8") == tables
    claims = tables.partition("## Claims\n\n")[2].partition("\n\n")[0]
    page = (ROOT / "docs" / "paper.md").read_text("utf-8")
    assert claims.count("\n") == 9 and stands_in([claims], page)


def test_another_number_is_noticed() -> None:
    result, page = measured("digits"), (ROOT / PAGE).read_text("utf-8")
    result["table"][0]["mean"] += 0.01
    assert not stands_in(accuracies(result), page)
