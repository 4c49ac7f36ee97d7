"""The protocols that score features by labels: one function and one statement for each task.

docs/protocols.md has them in words. "pretrain" is the one at the end of training and during it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate
from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureSet, few_labels
from nat_jax.evaluate.probe_data import FeatureExtractor, ProbeData
from nat_jax.evaluate.probes.knn import knn_sweep
from nat_jax.evaluate.probes.linear import linear_probe_stream
from nat_jax.evaluate.probes.mlp import mlp_probe_stream
from nat_jax.input.transforms import Transform, eval_transform
from nat_jax.models import Model
from nat_jax.models.frozen import resolve_layers
from nat_jax.report.rows import ALL_LABELS, HEADLINE, OWN, Choice, Row, labels_name, row

_VOTES = {"weighted votes": 0.07, "plain votes": None}
_SUBSETS = "of each class the records whose names, hashed with the split, come first"
_LARGE = 2 << 30  # features of more bytes are fitted by SGD, where eval.linear_fit is "auto"
_MANY = 100_000  # records from which on the MLP is the authors', where the config leaves it open

# Rows by what was drawn besides the seed; "" where nothing was.
Scored = dict[str, list[Row]]


class TaskInputs(NamedTuple):
    """What a protocol works on.

    Attributes:
        settings: the group ``eval``.
        data: the records.
        seed: of everything that is drawn.
        model: the network that is evaluated.
        augment: of training images, for probes that learn from another view in each epoch.
        resize: of evaluation images; 0: there is no room for ten crops.
        supervised: whether the network was trained with labels.
    """

    settings: ConfigDict
    data: ProbeData
    seed: int
    model: Model
    augment: Transform
    resize: int
    supervised: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """The evaluated network's layers."""
        return resolve_layers(self.settings.layers, self.model)

    @property
    def num_classes(self) -> int:
        """The number of classes; only for records with labels."""
        assert self.data.num_classes is not None
        return self.data.num_classes

    @property
    def test_transform(self) -> Transform:
        """The views of a test image for probes that learn from augmented images: ten crops, or one.

        They are five where training images are not mirrored, as for digits or text.

        Raises:
            InputError: ten crops of images that leave no room for them.
        """
        wanted = self.settings.ten_crops
        if wanted == "on" and not self.resize:
            raise InputError(
                "eval.ten_crops: ten crops are cut out of a larger image, but data.resize of this "
                "network is 0. Set --config.eval.ten_crops=auto for one view"
            )
        ten = wanted == "on" or (wanted == "auto" and self.resize > 0)
        views = eval_transform(image_size=self.augment.size, resize=self.resize, ten_crops=ten)
        both_ways = ten and self.augment.flip
        return dataclasses.replace(views, both_ways=both_ways, white=self.augment.white)


class Protocol(NamedTuple):
    """How a task scores features.

    Attributes:
        score: returns the rows of one extractor's features.
        state: returns the protocol in full, for the result; raises an InputError for records or
            settings that do not fit.
        headline: which rows sum up the result, see ``rows.headline``.
    """

    score: Callable[[TaskInputs, FeatureExtractor], Scored]
    state: Callable[[TaskInputs], dict[str, Any]]
    headline: Callable[[TaskInputs], Sequence[Choice]]


def probe_options(probe: str, settings: ConfigDict, records: int) -> dict[str, Any]:
    """Return the options that a config's ``eval`` has for a probe that learns on some records."""
    options: dict[str, Callable[[], dict[str, Any]]] = {
        "knn": lambda: {"k": max(1, min(settings.knn_k, records))},
        "linear_probe": lambda: {"fit": _linear_fit(settings, records)},
        "mlp_probe": lambda: {
            "hidden": settings.mlp_width or (4096 if records >= _MANY else 512),
            "epochs": settings.mlp_epochs or (100 if records >= _MANY else 50),
            "init": settings.mlp_init,
        },
    }
    return options[probe]() if probe in options else {}


def _linear_fit(settings: ConfigDict, records: int) -> str:
    if settings.linear_fit != "auto":
        return settings.linear_fit
    return "lbfgs" if 4 * records * settings.max_features <= _LARGE else "sgd"


Sets = tuple[dict[str, FeatureSet], dict[str, FeatureSet]]  # to learn on and to be scored on


def _score_probes(
    inputs: TaskInputs,
    name: str,
    sets: Sets,
    amounts: Sequence[float],
    *,
    split: int,
    records: int = 0,
) -> list[Row]:
    """Score each layer by each probe of ``eval.probes``, with some amounts of labels.

    Args:
        inputs: the task's.
        name: of the network, in the rows.
        sets: the features of its layers.
        amounts: labels per class, 0 for all; shares of each class below 1.
        split: seed of the subsets and of the probes.
        records: by how many to choose the probes' options; 0: by those of each subset.
    """
    train, test = sets
    rows: list[Row] = []
    some, names = next(iter(train.values())), None
    if any(amounts):
        assert some.index is not None
        names = [inputs.data.train.record_name(int(i)) for i in some.index]
    for amount in amounts:
        chosen = few_labels(some.labels, amount, seed=split, names=names) if amount else None
        for layer in train:
            known = train[layer] if chosen is None else train[layer].of(chosen)
            for probe in inputs.settings.probes:
                value = evaluate.PROBES[probe](
                    known,
                    test[layer],
                    num_classes=inputs.num_classes,
                    seed=split,
                    **probe_options(probe, inputs.settings, records or len(known)),
                )
                rows.append(row(layer, name, probe, labels_name(amount), value))
    return rows


def _score_trained(inputs: TaskInputs, extractor: FeatureExtractor) -> Scored:
    sets, amounts = inputs.data.sets(extractor), inputs.settings.labels_per_class
    draw = {"split": inputs.seed, "records": len(inputs.data.train)}
    rows = _score_probes(inputs, extractor.name, sets, amounts, **draw)
    if inputs.supervised and (z := sets[1].get("z")):
        right = float(np.mean(np.argmax(z.features, axis=1) == z.labels))
        rows = [row("z", extractor.name, OWN, ALL_LABELS, right), *rows]
    return {"": rows}


def _state_trained(inputs: TaskInputs) -> dict[str, Any]:
    _check_labels(inputs)
    settings, records = inputs.settings, len(inputs.data.train)
    return {
        "eval": configs.to_dict(settings),
        "probes": _stated(settings, records),
        "subsets": _SUBSETS,
        "layers": list(inputs.layers),
    }


def _stated(settings: ConfigDict, records: int) -> dict[str, Any]:
    """State the probes of ``eval.probes`` that learn on some records."""
    return {
        probe: evaluate.protocol(probe, probe_options(probe, settings, records))
        for probe in settings.probes
    }


def _check_labels(inputs: TaskInputs) -> None:
    """Check that there are the records that a subset of labels and kNN need."""
    settings, train = inputs.settings, inputs.data.train
    if inputs.data.num_classes is None or not settings.probes:
        return
    for per_class in settings.labels_per_class:
        if train.labels is not None:
            known = train.labels[train.labels >= 0]
            counts = np.bincount(known, minlength=inputs.num_classes)
            if per_class > counts.min():
                raise InputError(
                    f"eval.labels_per_class: asks for {per_class} records of every class of "
                    f"{train.name}; class {(train.class_names or ())[counts.argmin()]} has "
                    f"{counts.min()}. "
                    "Set --config.eval.labels_per_class='(0,)' for all labels only"
                )
        records = per_class * inputs.num_classes or len(train)
        if "knn" in settings.probes and settings.knn_k > records:
            raise InputError(
                f"eval.knn_k: expected at most {records}, the training records with "
                f"{labels_name(per_class)} labels; got {settings.knn_k}. "
                f"Set --config.eval.knn_k={records}"
            )


def _score_knn(inputs: TaskInputs, extractor: FeatureExtractor) -> Scored:
    train, test = inputs.data.sets(extractor)
    rows: list[Row] = []
    for layer in train:
        accuracies = knn_sweep(
            train[layer],
            test[layer],
            num_classes=inputs.num_classes,
            ks=_ks(inputs.settings),
            temperatures=tuple(_VOTES.values()),
        )
        rows += [
            row(layer, extractor.name, f"k={k}", votes, accuracies[k, temperature])
            for votes, temperature in _VOTES.items()
            for k in _ks(inputs.settings)
        ]
    return {"": rows}


def _state_knn(inputs: TaskInputs) -> dict[str, Any]:
    most, train = max(_ks(inputs.settings)), inputs.data.train
    if most > len(train):
        raise InputError(
            f"eval.knn_ks: expected at most {len(train)}, the training records of {train.name}; "
            f"got {most}. Set --config.eval.knn_ks='(1, 5)' and --config.eval.knn_k=5, for instance"
        )
    stated = evaluate.protocol("knn")
    del stated["k"], stated["temperature"]
    return {"knn": stated, "k": list(_ks(inputs.settings)), "temperature": _VOTES}


def _ks(settings: ConfigDict) -> tuple[int, ...]:
    """Return the numbers of neighbours to compare, the one of the headline among them."""
    return tuple(sorted({*settings.knn_ks, settings.knn_k}))


def _score_learned(
    probe: str,
    from_stream: Callable[..., dict[str, float]],
    inputs: TaskInputs,
    extractor: FeatureExtractor,
) -> Scored:
    """Score each layer by a probe that learns, from augmented images where it can and shall."""
    options = probe_options(probe, inputs.settings, len(inputs.data.train))
    common = {"num_classes": inputs.num_classes, "seed": inputs.seed}
    if _streamed(inputs, probe):
        options.pop("fit", None)
        test = inputs.data.test_views(extractor, inputs.test_transform)
        epochs = inputs.data.train_epochs(extractor, inputs.augment, inputs.seed)
        values = from_stream(epochs, test, **common, **options)
    else:
        train, held_out = inputs.data.sets(extractor)
        score = functools.partial(evaluate.PROBES[probe], **common, **options)
        values = {layer: score(train[layer], held_out[layer]) for layer in train}
    return {"": [row(layer, extractor.name, probe, ALL_LABELS, v) for layer, v in values.items()]}


def _streamed(inputs: TaskInputs, probe: str) -> bool:
    """Return whether a probe learns from augmented images; L-BFGS and ridge need fixed ones."""
    fit = _linear_fit(inputs.settings, len(inputs.data.train))
    return bool(inputs.settings.fresh_crops) and (probe == "mlp_probe" or fit == "sgd")


def _state_learned(probe: str, inputs: TaskInputs) -> dict[str, Any]:
    options = probe_options(probe, inputs.settings, len(inputs.data.train))
    streamed = _streamed(inputs, probe)
    stated = {probe: evaluate.protocol(probe, options, streamed=streamed)}
    if streamed:
        stated["stream"] = {
            "augmentation": repr(inputs.augment),
            "batch_size": inputs.data.stream_batch,
            "test_views": inputs.test_transform.count,
        }
    return stated


def _score_few(inputs: TaskInputs, extractor: FeatureExtractor) -> Scored:
    sets, settings = inputs.data.sets(extractor), inputs.settings
    return {
        f"split {split}": _score_probes(
            inputs, extractor.name, sets, settings.few_labels, split=split
        )
        for split in settings.few_splits
    }


def _state_few(inputs: TaskInputs) -> dict[str, Any]:
    settings, labels = inputs.settings, inputs.data.train.labels
    if not settings.probes:
        raise InputError("eval.probes: expected at least one for task low_shot; got none")

    def count(amount: float) -> int:
        if labels is not None:
            return len(few_labels(labels, amount, seed=0))
        # Known once the records are read; classes of one size have so many.
        share = amount * len(inputs.data.train) / inputs.num_classes
        return max(1, round(share if amount < 1 else amount)) * inputs.num_classes

    return {
        "subsets": _SUBSETS,
        "splits": list(settings.few_splits),
        "probes": {
            labels_name(amount): _stated(settings, count(amount)) for amount in settings.few_labels
        },
    }


def _or_first(inputs: TaskInputs, layer: str, probe: str, labels: str) -> Sequence[Choice]:
    """Choose a layer for the headline, or the first layer if that one is not evaluated."""
    return (layer, probe, labels), (inputs.layers[0], probe, labels)


def _learned(probe: str, from_stream: Callable[..., dict[str, float]]) -> Protocol:
    return Protocol(
        functools.partial(_score_learned, probe, from_stream),
        functools.partial(_state_learned, probe),
        lambda inputs: _or_first(inputs, inputs.model.last_conv, probe, ALL_LABELS),
    )


PROTOCOLS: dict[str, Protocol] = {
    "pretrain": Protocol(_score_trained, _state_trained, lambda _: HEADLINE),
    "knn": Protocol(
        _score_knn,
        _state_knn,
        lambda inputs: _or_first(inputs, "z", f"k={inputs.settings.knn_k}", next(iter(_VOTES))),
    ),
    "linear_probe": _learned("linear_probe", linear_probe_stream),
    "mlp_probe": _learned("mlp_probe", mlp_probe_stream),
    "low_shot": Protocol(
        _score_few,
        _state_few,
        lambda inputs: _or_first(
            inputs,
            inputs.model.last_conv,
            inputs.settings.probes[0],
            labels_name(inputs.settings.few_labels[0]),
        ),
    ),
}
