"""The protocols that score features by labels: one function and one statement for each task.

docs/protocols.md has them in words.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate
from nat_jax.errors import InputError
from nat_jax.evaluate import judge
from nat_jax.evaluate.features import few_labels
from nat_jax.evaluate.judge import Row
from nat_jax.evaluate.probe_data import TEST, TRAIN, ProbeData, Subject
from nat_jax.evaluate.probes.knn import knn_sweep
from nat_jax.evaluate.probes.linear import linear_probe_stream
from nat_jax.evaluate.probes.mlp import mlp_probe_stream
from nat_jax.input.transforms import Transform, eval_transform

_VOTES = {"weighted votes": 0.07, "plain votes": None}

# Rows of a subject, by what was drawn besides the seed; "" where nothing was.
Scored = dict[str, list[Row]]


class Asked(NamedTuple):
    """What a task was asked for.

    Attributes:
        settings: the group ``eval``.
        data: the records.
        seed: of what is drawn.
        augment: what becomes of training images where they change from epoch to epoch.
        resize: of evaluation images; 0: there is no room for ten crops.
    """

    settings: ConfigDict
    data: ProbeData
    seed: int
    augment: Transform
    resize: int

    @property
    def classes(self) -> int:
        """How many classes there are; only asked where there are labels."""
        assert self.data.num_classes is not None
        return self.data.num_classes

    @property
    def test_transform(self) -> Transform:
        """What becomes of test images where training images change: ten crops, or one view.

        They are five where training images are not mirrored, as for digits or text.

        Raises:
            ValueError: ten crops of images that leave no room for them.
        """
        asked = self.settings.ten_crops
        if asked == "on" and not self.resize:
            raise InputError(
                "eval.ten_crops: ten crops are cut out of a larger image, but data.resize of this "
                "network is 0. Set --config.eval.ten_crops=auto for one view"
            )
        ten = asked == "on" or (asked == "auto" and self.resize > 0)
        views = eval_transform(image_size=self.augment.size, resize=self.resize, ten_crops=ten)
        return dataclasses.replace(views, both_ways=ten and self.augment.flip)


class Task(NamedTuple):
    """A protocol.

    Attributes:
        score: the rows of one subject.
        state: the protocol in full, for the result.
        probe: which rows are the headline: their probe ...
        labels: ... and their labels.
        layer: the layer of the headline, if it is judged; otherwise the first one is.
    """

    score: Callable[[Asked, Subject], Scored]
    state: Callable[[Asked], dict[str, Any]]
    probe: Callable[[ConfigDict], str]
    labels: Callable[[ConfigDict], str]
    layer: str


def _score_knn(asked: Asked, subject: Subject) -> Scored:
    train, test = asked.data.sets(subject)
    rows = []
    for layer in train:
        swept = knn_sweep(
            train[layer],
            test[layer],
            num_classes=asked.classes,
            ks=_ks(asked.settings),
            temperatures=tuple(_VOTES.values()),
        )
        for votes, temperature in _VOTES.items():
            for k in _ks(asked.settings):
                value = swept[k, temperature]
                rows.append(judge.row(layer, subject.name, f"k={k}", votes, value))
    return {"": rows}


def _state_knn(asked: Asked) -> dict[str, Any]:
    stated = evaluate.protocol("knn")
    del stated["k"], stated["temperature"]
    return {"knn": stated, "k": list(_ks(asked.settings)), "temperature": _VOTES}


def _ks(settings: ConfigDict) -> tuple[int, ...]:
    """Return the numbers of neighbours to compare, the one of the headline among them."""
    return tuple(sorted({*settings.knn_ks, settings.knn_k}))


def _score_linear(asked: Asked, subject: Subject) -> Scored:
    return _score_learned(asked, subject, "linear_probe", linear_probe_stream)


def _score_mlp(asked: Asked, subject: Subject) -> Scored:
    return _score_learned(asked, subject, "mlp_probe", mlp_probe_stream)


def _score_learned(
    asked: Asked, subject: Subject, probe: str, from_stream: Callable[..., Mapping[str, float]]
) -> Scored:
    options = judge.probe_options(probe, asked.settings, len(asked.data.train))
    common = {"num_classes": asked.classes, "seed": asked.seed}
    if _streamed(asked, probe):
        options.pop("fit", None)
        test = asked.data.test_views(subject, subject.layers, asked.test_transform)
        epochs = asked.data.train_epochs(subject, subject.layers, asked.augment, asked.seed)
        values = from_stream(epochs, test, **common, **options)
    else:
        train, held_out = asked.data.sets(subject)
        fit = functools.partial(evaluate.PROBES[probe], **common, **options)
        values = {layer: fit(train[layer], held_out[layer]) for layer in train}
    named = subject.name
    return {"": [judge.row(layer, named, probe, "all", value) for layer, value in values.items()]}


def _streamed(asked: Asked, probe: str) -> bool:
    """Say whether a probe learns from images that change; L-BFGS and ridge need them to stay."""
    sgd = probe == "mlp_probe" or judge.linear_fit(asked.settings, len(asked.data.train)) == "sgd"
    return bool(asked.settings.fresh_crops) and sgd


def _state_learned(probe: str, asked: Asked) -> dict[str, Any]:
    options = judge.probe_options(probe, asked.settings, len(asked.data.train))
    streamed = _streamed(asked, probe)
    stated = {probe: evaluate.protocol(probe, options, streamed=streamed)}
    if streamed:
        stated["stream"] = {
            "augmentation": repr(asked.augment),
            "batch_size": asked.data.stream_batch,
            "test_views": asked.test_transform.count,
        }
    return stated


def _score_few(asked: Asked, subject: Subject) -> Scored:
    train, test = (asked.data.extract(subject, split) for split in (TRAIN, TEST))
    first = train[subject.layers[0]]
    names = [asked.data.train.record_name(int(i)) for i in first.index]
    scored: Scored = {}
    for split in asked.settings.few_splits:
        rows = scored[f"split {split}"] = []
        for amount in asked.settings.few_labels:
            chosen = few_labels(first.data.labels, amount, seed=split, names=names)
            for layer in train:
                for probe in asked.settings.probes:
                    value = evaluate.PROBES[probe](
                        train[layer].data.of(chosen),
                        test[layer].data,
                        num_classes=asked.classes,
                        seed=split,
                        **_few_options(asked.settings, probe, len(chosen)),
                    )
                    rows.append(judge.row(layer, subject.name, probe, few_name(amount), value))
    return scored


def _state_few(asked: Asked) -> dict[str, Any]:
    settings, labels = asked.settings, asked.data.train.labels

    def chosen(amount: float) -> int:
        if labels is not None:
            return len(few_labels(labels, amount, seed=0))
        # Known once the records are read; classes of one size have so many.
        share = round(amount * len(asked.data.train) / asked.classes) if amount < 1 else int(amount)
        return max(1, share) * asked.classes

    return {
        "subsets": "of each class the records whose names, hashed with the split, come first",
        "splits": list(settings.few_splits),
        "probes": {
            few_name(amount): {
                probe: evaluate.protocol(probe, _few_options(settings, probe, chosen(amount)))
                for probe in settings.probes
            }
            for amount in settings.few_labels
        },
    }


def _few_options(settings: ConfigDict, probe: str, records: int) -> dict[str, Any]:
    options = judge.probe_options(probe, settings, records)
    if probe == "knn":  # one per cent of a small data set may be fewer records than neighbours
        options["k"] = max(1, min(options["k"], records))
    return options


def few_name(amount: float) -> str:
    """Return how a table names a share of the labels or a number per class."""
    return f"{100 * amount:g} % of the labels" if amount < 1 else judge.labels_name(int(amount))


def _all_labels(_: ConfigDict) -> str:
    return judge.labels_name(configs.LABELS_ALL)


SCORED: dict[str, Task] = {
    "knn": Task(
        _score_knn,
        _state_knn,
        lambda settings: f"k={settings.knn_k}",
        lambda _: next(iter(_VOTES)),
        "z",
    ),
    "linear_probe": Task(
        _score_linear,
        functools.partial(_state_learned, "linear_probe"),
        lambda _: "linear_probe",
        _all_labels,
        "last_conv",
    ),
    "mlp_probe": Task(
        _score_mlp,
        functools.partial(_state_learned, "mlp_probe"),
        lambda _: "mlp_probe",
        _all_labels,
        "last_conv",
    ),
    "low_shot": Task(
        _score_few,
        _state_few,
        lambda settings: settings.probes[0],
        lambda settings: few_name(settings.few_labels[0]),
        "last_conv",
    ),
}
