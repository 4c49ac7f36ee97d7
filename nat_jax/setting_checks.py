"""Checks of settings that need neither devices nor records: common ones, and those of `eval`."""

import numbers
from collections.abc import Collection, Mapping
from typing import Any

from nat_jax.errors import InputError

TEN_CROPS = ("auto", "on", "off")
BASELINES = ("pixels", "patches")
LINEAR_FITS = ("auto", "lbfgs", "sgd", "ridge")
MLP_INITS = ("torch", "gaussian")

_NOT_EMPTY = ("layers", "probes", "labels_per_class", "knn_ks", "few_labels", "few_splits")
_COUNTS = (
    "batch_size",
    "knn_k",
    "max_features",
    "mlp_width",
    "mlp_epochs",
    "neighbours",
    "patch_centroids",
    "queries",
)


def one_of(key: str, value: Any, known: Collection[str]) -> None:
    """Raise ValueError, listing what is known, for a value that is not."""
    if value not in known:
        raise InputError(f"{key}: unknown {value!r}. Known: {', '.join(known)}")


def at_least(values: Mapping[str, Any], least: float, *keys: str) -> None:
    """Raise ValueError for the first of some keys whose value is smaller."""
    for key in keys:
        if values[key] < least:
            raise InputError(f"{key}: expected at least {least}; got {values[key]}")


def check_lists(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that lists hold what they hold by default: words, whole numbers or numbers.

    Args:
        values: a flat config.
        defaults: the flat config that nobody has changed; an empty list there is one of words.

    Raises:
        ValueError: naming the first key that holds something else.
    """
    for key, default in defaults.items():
        if not isinstance(default, list):
            continue
        kinds = {type(value) for value in default} or {str}
        kind: type = numbers.Integral
        what = "whole numbers"
        if str in kinds:
            kind, what = str, "words"
        elif float in kinds:
            kind, what = numbers.Real, "numbers"
        wrong = [value for value in values[key] if not isinstance(value, kind)]
        if wrong:
            example = tuple(default) or ("a", "b")
            raise InputError(
                f'{key}: expected {what}, for instance --config.{key}="{example}"; got {wrong[0]!r}'
            )


def check_eval(values: Mapping[str, Any], probes: Collection[str]) -> None:
    """Check the group `eval`.

    Args:
        values: a flat config, "eval.layers" and so on.
        probes: the known probes.

    Raises:
        ValueError: one message for the first mistake: the key, what is expected, what it is.
    """
    for probe in values["eval.probes"]:
        if "," in probe:
            raise InputError(
                f"eval.probes: got {probe!r}; write several as "
                "--config.eval.probes=\"('knn', 'linear_probe')\""
            )
        one_of("eval.probes", probe, probes)
    for baseline in values["eval.baselines"]:
        one_of("eval.baselines", baseline, BASELINES)
    one_of("eval.linear_fit", values["eval.linear_fit"], LINEAR_FITS)
    one_of("eval.mlp_init", values["eval.mlp_init"], MLP_INITS)
    one_of("eval.ten_crops", values["eval.ten_crops"], TEN_CROPS)
    for key in _NOT_EMPTY:
        if not values[f"eval.{key}"]:
            raise InputError(f"eval.{key}: expected at least one; got none")
    at_least(values, 1, *(f"eval.{key}" for key in _COUNTS))
    at_least(values, 0, "eval.every_epochs", "eval.max_train")
    if min(values["eval.knn_ks"]) < 1:
        raise InputError(f"eval.knn_ks: expected at least 1; got {min(values['eval.knn_ks'])}")
    if min(values["eval.labels_per_class"]) < 0:
        raise InputError(
            "eval.labels_per_class: expected 0 (all labels) or more; got "
            f"{tuple(values['eval.labels_per_class'])}"
        )
    for amount in values["eval.few_labels"]:
        if not amount > 0 or (amount >= 1 and amount != int(amount)):
            raise InputError(
                "eval.few_labels: expected shares in (0, 1) and numbers of labels per class from 1 "
                f"on; got {amount}"
            )
    if min(values["eval.few_splits"]) < 0:
        raise InputError(
            f"eval.few_splits: expected seeds of 0 or more; got {tuple(values['eval.few_splits'])}"
        )
