"""Rows of results, each one accuracy in [0, 1] of a probe on one layer of one network.

A row of one seed is {"layer", "network", "probe", "labels", "value"}; over several seeds it is
{"layer", "network", "probe", "labels", "mean", "std", "values", "seeds"}.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Choice = tuple[str, str, str]  # layer, probe, labels

# Networks as rows name them; of several of one kind some have their folder's name after it, as in
# "nat: FOLDER".
UNTRAINED = "untrained"
NAT, SUPERVISED = "nat", {"square": "supervised_square", "softmax": "supervised_softmax"}
TRAINED = (NAT, *SUPERVISED.values())

# Baselines without a network, by their word in eval.baselines, which also names their layer.
NO_NETWORK = {
    "pixels": "raw pixels",
    "patches": "k-means patches",
    "som": "self-organising map",
    "gas": "neural gas",
    "smt": "sparse manifold",
    "diffrac": "DIFFRAC",
    "sift": "SIFT + Fisher vectors",
}

OWN = "own"  # the probe in rows of a supervised network's own decision, its largest output
ALL_LABELS = "all"
HEADLINE: tuple[Choice, ...] = (("z", OWN, ALL_LABELS), ("z", "knn", ALL_LABELS))

KEYS = ("layer", "network", "probe", "labels")


def row(layer: str, network: str, probe: str, labels: str, value: float) -> Row:
    """Return a row of one seed."""
    return dict(zip(KEYS, (layer, network, probe, labels), strict=True)) | {"value": value}


def labels_name(amount: float) -> str:
    """Return how rows name a number of labels per class (0: all), or a share of them below 1."""
    if 0 < amount < 1:
        return f"{100 * amount:g} % of the labels"
    return f"{int(amount)} per class" if amount else ALL_LABELS


def aggregate(rows: Mapping[Any, Sequence[Row]]) -> list[dict[str, Any]]:
    """Join the rows of several seeds: mean, standard deviation (None for one seed), values."""
    joined: dict[tuple[str, ...], dict[Any, float]] = {}
    for seed, of_seed in rows.items():
        for one in of_seed:
            joined.setdefault(tuple(one[key] for key in KEYS), {})[seed] = one["value"]
    return [
        {
            **dict(zip(KEYS, key, strict=True)),
            "mean": float(np.mean(list(values.values()))),
            "std": float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None,
            "values": list(values.values()),
            "seeds": list(values),
        }
        for key, values in joined.items()
    ]


def headline(
    rows: Sequence[Row], choices: Iterable[Choice] = HEADLINE, network: str | None = None
) -> tuple[Row, Row | None]:
    """Choose the row that sums up a result, and the same row of the untrained network.

    Args:
        rows: of one seed, or over several.
        choices: the first one that a row fits is taken; if none does, the first row.
        network: whose rows to choose from; None for all trained networks.

    Returns:
        (row, the untrained network's row under the same probe or None).

    Raises:
        ValueError: there is no row of such a network.
    """
    baselines = (*NO_NETWORK.values(), UNTRAINED)
    own = [
        one
        for one in rows
        if (one["network"] == network if network else kind(one["network"]) not in baselines)
    ]
    if not own:
        raise ValueError(f"headline: expected rows of {network or 'a trained network'}, got none")
    by_choice = {(one["layer"], one["probe"], one["labels"]): one for one in reversed(own)}
    chosen = next((by_choice[c] for c in choices if c in by_choice), own[0])
    return chosen, same(rows, chosen, network=UNTRAINED)


def same(rows: Iterable[Row], one: Row, **other: str) -> Row | None:
    """Return the row that agrees with `one` in all keys except for those in `other`."""
    wanted = {**{key: one[key] for key in KEYS}, **other}
    return next((r for r in rows if all(r[key] == wanted[key] for key in KEYS)), None)


def kind(network: str) -> str:
    """Return the kind of a network, which is its name without a folder's name."""
    return network.partition(": ")[0]


def current(rows: Iterable[Row]) -> list[Row]:
    """Translate the rows of a saved result: version 0.1 named the layer "features"."""
    names = {"features": "layer"}
    return [{names.get(key, key): value for key, value in one.items()} for one in rows]
