"""Linear classifiers of frozen features: which fit, for what.

The fits differ in what they cost and how comparable they are. "lbfgs" has one answer, whatever the
seed and the batches, and needs no learning rate: the default, for features that fit on a device
twice. "sgd" is how Zhang et al. and their successors trained their probes, takes features of any
number, in memory or from a stream of fresh crops (`linear_probe_stream`), and is what to compare
with published figures. "ridge" takes one pass and no iterations.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes import sgd
from nat_jax.evaluate.probes.lbfgs import lbfgs_probe
from nat_jax.evaluate.probes.linear_sgd import fit_layers, sgd_probe
from nat_jax.evaluate.probes.ridge import ridge_probe
from nat_jax.evaluate.stream import FeatureBatch, TrainEpoch

FITS: dict[str, Callable[..., float]] = {
    "lbfgs": lbfgs_probe,
    "sgd": sgd_probe,
    "ridge": ridge_probe,
}


def linear_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    fit: str = "lbfgs",
    **options: Any,
) -> float:
    """Fit a linear classifier and return top-1 accuracy.

    Args:
        train: features float32[N, F] to fit.
        test: features to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the order of "sgd"; nothing else is random.
        fit: a key of FITS.
        **options: of that fit: see `lbfgs_probe`, `sgd_probe`, `ridge_probe`.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: unknown fit or option, an option out of range, or sets that do not fit (see
            `features.check_sets`).
    """
    unknown = sorted(set(options) - set(fit_options(fit)))
    if unknown:
        raise InputError(
            f"linear_probe: {fit} has no option {', '.join(unknown)}; "
            f"known: {', '.join(fit_options(fit))}"
        )
    return FITS[fit](train, test, num_classes=num_classes, seed=seed, **options)


def fit_options(fit: str) -> dict[str, Any]:
    """Return the options of a fit and their defaults.

    Raises:
        ValueError: unknown fit; the known ones are listed.
    """
    if fit not in FITS:
        raise InputError(f"linear_probe: unknown fit {fit!r}; known: {', '.join(FITS)}")
    parameters = inspect.signature(FITS[fit]).parameters
    common = ("train", "test", "num_classes", "seed")
    return {name: p.default for name, p in parameters.items() if name not in common}


def linear_probe_stream(
    train_epoch: TrainEpoch,
    test: Iterable[FeatureBatch],
    *,
    num_classes: int,
    seed: int = 0,
    **options: Any,
) -> dict[str, float]:
    """Train a linear classifier on every layer of a stream at once, by SGD as `sgd_probe` does.

    With fresh crops and flips in each epoch and maps pooled to the published sizes
    (`features.pool`), this is the protocol of Zhang et al. (ECCV 2016).

    Args:
        train_epoch: gives the batches of an epoch, features {layer: float[B, F]}.
        test: batches with features float[B, V, F] for V views of each record, whose logits are
            summed, or [B, F] for one.
        num_classes: labels are 0 .. num_classes - 1.
        seed: unused, as the classifiers begin at zero; streams share one signature.
        **options: of `sgd_probe`, except for batch_size, which is the stream's.

    Returns:
        {layer: accuracy in [0, 1]}.

    Raises:
        ValueError: an option out of range, an empty stream, labels out of range, or weights that
            diverge.
    """
    defaults = {k: v for k, v in fit_options("sgd").items() if k != "batch_size"}
    trained = fit_layers(train_epoch, num_classes=num_classes, seed=seed, **defaults | options)
    return sgd.accuracy_stream(trained, test, num_classes=num_classes)
