"""Probes: classifiers of frozen features, whose accuracy measures a network.

``PROBES`` has those that a config can name in ``eval.probes``.
"""

from collections.abc import Callable
from typing import Any

from nat_jax.errors import InputError
from nat_jax.evaluate.probes.knn import knn
from nat_jax.evaluate.probes.linear import fit_options, linear_probe
from nat_jax.evaluate.probes.mlp import mlp_probe
from nat_jax.evaluate.probes.sgd import keyword_options

# (train, test, *, num_classes, seed, **options) -> top-1 accuracy in [0, 1]
Probe = Callable[..., float]

PROBES: dict[str, Probe] = {
    "knn": knn,
    "linear_probe": linear_probe,
    "mlp_probe": mlp_probe,
}

_STATEMENTS = {
    "knn": "cosine k nearest neighbours, exact; votes weighted by exp(cosine / temperature), "
    "or equal when temperature is null",
    "mlp_probe": "FC-BN-ReLU-dropout-FC-BN-ReLU-FC trained by SGD with momentum "
    "m = mu m + (1 - mu) g",
}
_FIT_STATEMENTS = {
    "lbfgs": "multinomial logistic regression on features standardised by the training "
    "set; mean cross-entropy + l2 / 2 |W|^2, full-batch L-BFGS",
    "sgd": "batch norm without scale and shift, one linear layer; mean cross-entropy + l2 / 2 "
    "|W|^2, SGD with momentum, the bias at twice the rate",
    "ridge": "ridge regression of one-hot labels on features standardised by the training set; "
    "mean |W x + b - y|^2 + l2 |W|^2, exact",
}
_CACHED = "cached: one view of each record"
_STREAMED = "computed in each epoch from newly augmented images; logits summed over a test's views"


def protocol(
    probe_name: str, options: dict[str, Any] | None = None, *, streamed: bool = False
) -> dict[str, Any]:
    """State a probe in full, for the result that it belongs to.

    Args:
        probe_name: a key of PROBES.
        options: those given to the probe; defaults fill the rest.
        streamed: whether the probe learned from a stream (`mlp_probe_stream`,
            `linear_probe_stream`); its batch size is then the stream's, which the caller states.

    Returns:
        "probe", "statement", "metric", and every option with the value used; "features" states
        which of the two kinds a probe that can learn from both was given.

    Raises:
        InputError: unknown probe or option; the message lists the known ones.
    """
    if probe_name not in PROBES:
        raise InputError(f"unknown probe {probe_name!r}; known: {', '.join(PROBES)}")
    given = dict(options or {})
    known = keyword_options(PROBES[probe_name])
    statement = _STATEMENTS.get(probe_name)
    if probe_name == "linear_probe":
        fit = given.get("fit", "sgd" if streamed else known["fit"])
        known = {"fit": fit, **fit_options(fit)}
        statement = _FIT_STATEMENTS[fit]
    learns_from_streams = probe_name == "mlp_probe" or known.get("fit") == "sgd"
    if streamed and not learns_from_streams:
        raise InputError(f"{probe_name}: only SGD learns from a stream of features")
    if streamed:
        del known["batch_size"]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(
            f"{probe_name}: unknown option {', '.join(unknown)}; known: {', '.join(known)}"
        )
    kind = {"features": _STREAMED if streamed else _CACHED} if learns_from_streams else {}
    return {
        "probe": probe_name,
        "statement": statement,
        "metric": "top-1 accuracy",
        **kind,
        **known,
        **given,
    }
