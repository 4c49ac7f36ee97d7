"""From the runs of a suite to its result: claims with verdicts, sweeps, layers, curves."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax.evaluate import judge
from nat_jax.experiments import claims
from nat_jax.experiments.claims import Arm, Claim, Difference
from nat_jax.experiments.members import EXPERIMENTS, Member, Planned, values_of
from nat_jax.export.loading import UNTRAINED

Result = dict[str, Any]

# How a verdict is found, for a reader of the result.
RULE = (
    "Networks of the same seed are compared. The noise of a mean difference is the half-width of "
    "its 95 % interval by Student's t over the seeds; of one seed, what the choice of test images "
    "leaves open. A trend holds where the difference exceeds its noise, and does not where it is "
    "below minus its noise; of a claim with several comparisons all must hold, and one that does "
    "not decides. 'About as good' holds where difference and noise stay within 2 points. 'Settles' "
    "holds where the gain of training's first half exceeds its noise and that of the second half."
)

_PROBES = {"own": "own", "mlp_probe": "MLP", "linear_probe": "linear", "knn": "kNN"}


class Done(NamedTuple):
    """A run that has ended, well or not: what was planned, and its record."""

    run: Planned
    record: Mapping[str, Any]

    @property
    def last_conv(self) -> str:
        """The name of its last convolution."""
        return str(self.record["last_conv"])


def find(config: ConfigDict, done: Sequence[Done], planned: Sequence[str]) -> Result:
    """Return the suite's result, as JSON has it.

    Args:
        config: the suite's.
        done: the runs that have ended.
        planned: folders of all runs.

    Returns:
        {"task", "metric", "value", "untrained", "protocol", "run", "claims", "sweeps", "layers",
        "curve", "runs"}: accuracies in [0, 1]; ``value`` is how many claims hold, and ``untrained``
        is None, as there is no such number.
    """
    scale = config.suite.scale
    periods, ks = (values_of(name, scale) for name in ("fig2_period", "discrete_targets"))
    good = [one for one in done if one.record["error"] is None]
    by_member = {member: one for one in good for member in one.run.members}
    tests = _tests(good)
    judged = [_judge(claim, by_member, tests) for claim in claims.claims(periods, ks)]
    names = set(config.suite.experiments or EXPERIMENTS)
    shown = [one for one in judged if one["experiments"] <= names]
    return {
        "task": "suite",
        "metric": "claims of the paper whose trend holds at this scale",
        "value": sum(one["verdict"] == claims.HOLDS for one in shown),
        "untrained": None,
        "protocol": _protocol(config, good),
        "run": {**judge.environment(), "seconds": sum(one.record["seconds"] or 0 for one in good)},
        "claims": [{k: v for k, v in one.items() if k != "experiments"} for one in shown],
        "sweeps": {
            "fig2_period": _sweep(by_member, "fig2_period", periods),
            "discrete_targets": _sweep(by_member, "discrete_targets", ks),
        },
        "layers": judge.aggregate(_layers(by_member)),
        "curve": _curve(by_member),
        "runs": [*_runs(done), *_missing(done, planned)],
    }


def _judge(claim: Claim, by_member: Mapping[Member, Done], tests: int) -> dict[str, Any]:
    arms = (claim.left, *claim.rights)
    values = {arm.name: _accuracies(by_member, arm, claim.probe) for arm in arms}
    compared: list[Difference | None]
    names: list[str]
    if claim.rule == "settles":
        curve = _curve(by_member)
        points = [(point["epoch"], point[claim.probe]) for point in curve if claim.probe in point]
        compared = list(claims.settles(points, tests=tests) if tests else ())
        names = ["gain of the first half", "gain of the second half"]
    else:
        left = values[claim.left.name]
        names = [f"{claim.left.name} - {arm.name}" for arm in claim.rights]
        compared = [
            claims.compare(
                left, values[arm.name], tests=tests, rule=claim.rule, margin=claim.margin
            )
            if tests
            else None
            for arm in claim.rights
        ]
    differences = [
        {"of": name, **one._asdict()}
        for name, one in zip(names, compared, strict=False)
        if one is not None
    ]
    return {
        "place": claim.place,
        "claim": claim.says,
        "paper": claim.paper,
        "ours": {name: claims.spread(found) for name, found in values.items() if found},
        "differences": differences,
        "verdict": claims.overall(compared),
        "protocol": _line(claim, by_member, tests),
        "experiments": {arm.experiment for arm in arms},
    }


def _accuracies(by_member: Mapping[Member, Done], arm: Arm, probe: str) -> dict[int, float]:
    """Return an arm's accuracies by seed; of runs that are missing there are none."""
    found = {}
    for member, one in by_member.items():
        if (member.experiment, member.value) != (arm.experiment, arm.value):
            continue
        layer = "z" if probe == judge.OWN else one.last_conv
        value = _score(one.record["rows"], layer, probe, untrained=arm.network == claims.UNTRAINED)
        if value is not None:
            found[member.seed] = value
    return found


def headline(record: Mapping[str, Any]) -> tuple[str, float, float | None]:
    """Return what a run is summed up by: how it was measured, its accuracy, the untrained one's."""
    rows = record["rows"]
    own = [row for row in rows if row["probe"] == judge.OWN and row["network"] != UNTRAINED]
    layer, probe = ("z", judge.OWN) if own else (record["last_conv"], "mlp_probe")
    trained = _score(rows, layer, probe, untrained=False)
    if trained is None:  # other probes were asked for
        return "accuracy", *judge.headline(judge.aggregate({0: rows}))
    how = "own decisions" if own else f"MLP on {layer}"
    return how, trained, _score(rows, layer, probe, untrained=True)


def _score(rows: Sequence[judge.Row], layer: str, probe: str, *, untrained: bool) -> float | None:
    for row in rows:
        if (row["features"], row["probe"], row["labels"]) != (layer, probe, "all"):
            continue
        if (row["network"] == UNTRAINED) == untrained:
            return float(row["value"])
    return None


def _sweep(
    by_member: Mapping[Member, Done], experiment: str, values: Sequence[str]
) -> dict[str, Any]:
    """Return {value: {probe: spread}} on the last convolution, by size; 0, which is never, last.

    Only probes of all values, as a run that other experiments share may have had more.
    """
    table = {}
    for value in sorted(values, key=lambda v: int(v) or math.inf):
        arm = Arm(value, experiment, value)
        found = {probe: _accuracies(by_member, arm, probe) for probe in _PROBES}
        if any(found.values()):
            table[value] = {probe: claims.spread(v) for probe, v in found.items() if v}
    common = set.intersection(*map(set, table.values())) if table else set()
    return {
        value: {probe: v for probe, v in found.items() if probe in common}
        for value, found in table.items()
    }


def _layers(by_member: Mapping[Member, Done]) -> dict[int, list[judge.Row]]:
    """Return the rows of NAT's layers by seed, with those of the supervised network beside them."""
    rows: dict[int, list[judge.Row]] = {}
    for member, one in by_member.items():
        if member.experiment == "table3_imagenet":
            rows.setdefault(member.seed, []).extend(one.record["rows"])
        if member.experiment == "table2_sobel":
            own = (r for r in one.record["rows"] if r["network"] != UNTRAINED)
            rows.setdefault(member.seed, []).extend(r for r in own if r["probe"] != judge.OWN)
    return rows


def _curve(by_member: Mapping[Member, Done]) -> list[dict[str, float]]:
    """Return the accuracies along fig2_epochs' first seed, the untrained network's first."""
    mine = [(m.seed, one) for m, one in by_member.items() if m.experiment == "fig2_epochs"]
    if not mine:
        return []
    _, one = min(mine, key=lambda pair: pair[0])
    ends = {}
    for epoch, untrained in ((0.0, True), (one.run.config.epochs, False)):
        scores = {
            p: _score(one.record["rows"], one.last_conv, p, untrained=untrained) for p in _PROBES
        }
        ends[epoch] = {probe: value for probe, value in scores.items() if value is not None}
    points = {**dict(one.record["curve"]), **ends}
    return [{"epoch": epoch, **points[epoch]} for epoch in sorted(points)]


def _protocol(config: ConfigDict, good: Sequence[Done]) -> dict[str, Any]:
    return {
        "rule": RULE,
        "config": configs.to_dict(config),
        **({"data": good[0].record["data"]} if good else {}),
    }


def _tests(good: Sequence[Done]) -> int:
    return good[0].record["data"]["test"]["records"] if good else 0


def _line(claim: Claim, by_member: Mapping[Member, Done], tests: int) -> str:
    """Say in one line how a claim's numbers were found."""
    mine = [one for m, one in by_member.items() if m.experiment == claim.left.experiment]
    if not mine:
        return ""
    one, settings = mine[0], mine[0].run.config.eval
    how = {
        "own": "the network's own decisions",
        "mlp_probe": f"MLP of width {settings.mlp_width}, {settings.mlp_epochs} epochs, "
        f"on {one.last_conv}",
    }[claim.probe]
    trained = one.record["data"]["train"]["records"]
    return (
        f"{how}; {trained:,} training images, {one.run.config.epochs:g} epochs, "
        f"{tests:,} test images"
    )


def _runs(done: Sequence[Done]) -> Iterator[dict[str, Any]]:
    for one in done:
        yield {
            "run": one.run.folder,
            "serves": [" ".join(map(str, member)) for member in one.run.members],
            "seconds": one.record["seconds"],
            "error": one.record["error"],
            "rows": one.record["rows"],
        }


def _missing(done: Sequence[Done], planned: Sequence[str]) -> Iterator[dict[str, Any]]:
    there = {one.run.folder for one in done}
    for folder in planned:
        if folder not in there:
            yield {"run": folder, "serves": [], "seconds": None, "error": "not run yet", "rows": []}
