"""From the runs of a suite to its result: claims with verdicts, sweeps, layers, a curve."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax.evaluate.evaluator import environment
from nat_jax.evaluate.protocols import probe_options
from nat_jax.experiments import claims
from nat_jax.experiments.claims import Arm, Claim
from nat_jax.experiments.members import EXPERIMENTS, Member, Planned, values_of
from nat_jax.report.rows import ALL_LABELS, HEADLINE, OWN, UNTRAINED, Row, aggregate, headline
from nat_jax.report.tables import PROBE_NAMES, probe_name

# A run's outcome: "rows", "curve", "data", "last_conv", and "error" (None if it succeeded).
Record = Mapping[str, Any]


class Done(NamedTuple):
    """A successful run."""

    config: ConfigDict
    record: Record

    def score(self, layer: str, probe: str, *, trained: bool = True) -> float | None:
        """Return the network's accuracy with all labels; None if it was not measured."""
        for row in self.record["rows"]:
            same = (row["layer"], row["probe"], row["labels"]) == (layer, probe, ALL_LABELS)
            if same and (row["network"] != UNTRAINED) == trained:
                return float(row["value"])
        return None


def find(
    config: ConfigDict, runs: Sequence[Planned], records: Sequence[Record | None]
) -> dict[str, Any]:
    """Return the suite's result, ready for JSON.

    Args:
        config: the suite's.
        runs: all runs of the plan.
        records: their outcomes; None for a run that has not ended yet.

    Returns:
        {"task", "metric", "value", "untrained", "protocol", "run", "claims", "sweeps", "layers",
        "curve", "runs"}: accuracies in [0, 1]; ``value`` is the number of claims that hold, and
        ``untrained`` is None, as there is no such number.
    """
    scale, names = config.suite.scale, set(config.suite.experiments or EXPERIMENTS)
    periods, ks = (values_of(name, scale) for name in ("fig2_period", "discrete_targets"))
    by_member = {
        member: Done(run.config, record)
        for run, record in zip(runs, records, strict=True)
        if record is not None and record["error"] is None
        for member in run.members
    }
    good = [record for record in records if record is not None and record["error"] is None]
    shown = [
        _verdict(claim, by_member)
        for claim in claims.claims(periods, ks)
        if {arm.experiment for arm in (claim.left, *claim.rights)} <= names
    ]
    return {
        "task": "suite",
        "metric": "claims of the paper whose trend holds at this scale",
        "value": sum(claim["verdict"] == claims.HOLDS for claim in shown),
        "untrained": None,
        "protocol": {
            "rule": claims.RULE,
            "config": configs.to_dict(config),
            **({"data": good[0]["data"]} if good else {}),
        },
        "run": {**environment(), "seconds": sum(r["seconds"] or 0 for r in good)},
        "claims": shown,
        "sweeps": {
            "fig2_period": _sweep(by_member, "fig2_period", periods),
            "discrete_targets": _sweep(by_member, "discrete_targets", ks),
        },
        "layers": _layers(by_member),
        "curve": _curve(by_member),
        "runs": [
            {
                "run": run.folder,
                "serves": [" ".join(map(str, member)) for member in run.members],
                "seconds": record["seconds"] if record else None,
                "error": record["error"] if record else "not run yet",
                "rows": record["rows"] if record else [],
            }
            for run, record in zip(runs, records, strict=True)
        ],
    }


def _verdict(claim: Claim, by_member: Mapping[Member, Done]) -> dict[str, Any]:
    arms = (claim.left, *claim.rights)
    values = {arm.name: _accuracies(by_member, arm, claim.probe) for arm in arms}
    runs = [done for m, done in by_member.items() if m.experiment == claim.left.experiment]
    tests = runs[0].record["data"]["test"]["records"] if runs else 0
    compared: list[claims.Difference | None]
    if claim.rule == "settles":
        points = [(p["epoch"], p[claim.probe]) for p in _curve(by_member) if claim.probe in p]
        compared = list(claims.settles(points, tests=tests))
        names = ["gain of the first half", "gain of the second half"]
    else:
        left = values[claim.left.name]
        compared = [
            claims.compare(
                left, values[arm.name], tests=tests, rule=claim.rule, margin=claim.margin
            )
            if runs
            else None
            for arm in claim.rights
        ]
        names = [f"{claim.left.name} - {arm.name}" for arm in claim.rights]
    return {
        "place": claim.place,
        "claim": claim.text,
        "paper": claim.paper,
        "ours": {name: claims.spread(found) for name, found in values.items() if found},
        "differences": [
            {"of": name, **one._asdict()}
            for name, one in zip(names, compared, strict=False)
            if one is not None
        ],
        "verdict": claims.overall(compared),
        "protocol": _protocol(claim.probe, runs[0]) if runs else "",
    }


def _protocol(probe: str, done: Done) -> str:
    """Return in one line how a claim's numbers were measured."""
    settings, data = done.config.eval, done.record["data"]
    how = "the network's own decisions"
    if probe != OWN:
        used = probe_options("mlp_probe", settings, data["train"]["records"])
        how = f"MLP of width {used['hidden']}, {used['epochs']} epochs"
        how += f", on {done.record['last_conv']}"
    return (
        f"{how}; {data['train']['records']:,} training images, {done.config.epochs:g} epochs, "
        f"{data['test']['records']:,} test images"
    )


def _accuracies(by_member: Mapping[Member, Done], arm: Arm, probe: str) -> dict[int, float]:
    """Return an arm's accuracies by seed; missing runs are left out."""
    found = {}
    for member, done in by_member.items():
        if (member.experiment, member.value) == (arm.experiment, arm.value):
            layer = "z" if probe == OWN else done.record["last_conv"]
            value = done.score(layer, probe, trained=arm.trained)
            if value is not None:
                found[member.seed] = value
    return found


def _sweep(
    by_member: Mapping[Member, Done], experiment: str, values: Sequence[str]
) -> dict[str, Any]:
    """Return {value: {probe: spread}} on the last convolution, by size; 0, which is never, last.

    Only probes that all values have, as a run that other experiments share may have more.
    """
    table = {}
    for value in sorted(values, key=lambda v: int(v) or math.inf):
        arm = Arm(value, experiment, value)
        found = {probe: _accuracies(by_member, arm, probe) for probe in PROBE_NAMES}
        if any(found.values()):
            table[value] = {probe: claims.spread(v) for probe, v in found.items() if v}
    common = set.intersection(*map(set, table.values())) if table else set()
    return {
        value: {probe: v for probe, v in found.items() if probe in common}
        for value, found in table.items()
    }


def _layers(by_member: Mapping[Member, Done]) -> list[dict[str, Any]]:
    """Return the rows of NAT's layers, and those of the supervised network with its front end."""
    rows: dict[int, list[Row]] = {}
    for member, done in by_member.items():
        if member.experiment == "table3_imagenet":
            rows.setdefault(member.seed, []).extend(done.record["rows"])
        if member.experiment == "table2_sobel":
            rows.setdefault(member.seed, []).extend(
                row
                for row in done.record["rows"]
                if row["network"] != UNTRAINED and row["probe"] != OWN
            )
    return aggregate(rows)


def _curve(by_member: Mapping[Member, Done]) -> list[dict[str, float]]:
    """Return the accuracies during fig2_epochs' first seed; epoch 0 is the untrained network."""
    mine = {m.seed: done for m, done in by_member.items() if m.experiment == "fig2_epochs"}
    if not mine:
        return []
    done = mine[min(mine)]
    points = dict(done.record["curve"])
    for epoch, trained in ((0.0, False), (done.config.epochs, True)):
        scores = {p: done.score(done.record["last_conv"], p, trained=trained) for p in PROBE_NAMES}
        points[epoch] = {probe: value for probe, value in scores.items() if value is not None}
    return [{"epoch": epoch, **points[epoch]} for epoch in sorted(points)]


def summary(record: Record) -> str:
    """Return a run's outcome in a few words: its error, or its accuracy and the untrained one."""
    if record["error"] is not None:
        return f"FAILED: {record['error'].splitlines()[0]}"
    on_conv = (record["last_conv"], "mlp_probe", ALL_LABELS)  # as in the paper
    row, untrained = headline(record["rows"], (HEADLINE[0], on_conv, *HEADLINE))
    how = f"{probe_name(row['probe'])} on {row['layer']}"
    text = f"{'own decisions' if row['probe'] == OWN else how} {100 * row['value']:.1f} %"
    return text + (f", untrained {100 * untrained['value']:.1f} %" if untrained else "")
