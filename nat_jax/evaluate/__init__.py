"""Probes of frozen features: each takes two feature sets and returns an accuracy."""

import inspect
from collections.abc import Callable
from typing import Any

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.knn import knn
from nat_jax.evaluate.linear_probe import linear_probe
from nat_jax.evaluate.mlp_probe import mlp_probe

__all__ = ["PROBES", "FeatureSet", "Probe", "protocol"]


# (train, test, *, num_classes, seed, **options) -> top-1 accuracy in [0, 1]
Probe = Callable[..., float]

PROBES: dict[str, Probe] = {"knn": knn, "linear_probe": linear_probe, "mlp_probe": mlp_probe}

_STATEMENTS = {
    "knn": "cosine k nearest neighbours, exact; votes weighted by exp(cosine / temperature), "
    "or equal when temperature is null",
    "linear_probe": "multinomial logistic regression on features standardised by the training "
    "set; mean cross-entropy + l2 / 2 |W|^2, full-batch L-BFGS",
    "mlp_probe": "FC-BN-ReLU-dropout-FC-BN-ReLU-FC trained by SGD with momentum "
    "m = mu m + (1 - mu) g on cached features, one view",
}


def protocol(probe_name: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """State a probe in full, for the result that it belongs to.

    Args:
        probe_name: a key of PROBES.
        options: those given to the probe; defaults fill the rest.

    Returns:
        {"probe", "statement", "metric", and every option with the value used}.

    Raises:
        ValueError: unknown probe or option; the message lists the known ones.
    """
    if probe_name not in PROBES:
        raise ValueError(f"unknown probe {probe_name!r}; known: {', '.join(PROBES)}")
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(PROBES[probe_name]).parameters.items()
        if name not in ("train", "test", "num_classes", "seed")
    }
    unknown = sorted(set(options or {}) - set(known))
    if unknown:
        raise ValueError(
            f"{probe_name}: unknown option {', '.join(unknown)}; known: {', '.join(known)}"
        )
    return {
        "probe": probe_name,
        "statement": _STATEMENTS[probe_name],
        "metric": "top-1 accuracy",
        **known,
        **(options or {}),
    }
