"""Judge networks: every probe on every chosen layer, with all labels and with few, as one table.

The features of raw pixels and of the same network before training stand beside every trained
number: a wide random network is a strong baseline on small images.
"""

import dataclasses
import functools
import importlib.metadata
import logging
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nat_jax import __version__, evaluate, input_pipeline, preprocess, sharding
from nat_jax import config as configs
from nat_jax.bad_records import BadRecords
from nat_jax.evaluate import features
from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.knn import nearest
from nat_jax.image_reader import ImageCache
from nat_jax.models import Model, Params
from nat_jax.records import Record, Source

PIXELS, UNTRAINED = "raw pixels", "untrained"

# How rows name trained networks: by what they were trained with.
NAT, SUPERVISED = "nat", {"square": "supervised_square", "softmax": "supervised_softmax"}

# The name in rows of a supervised network's own decision, the largest of its outputs.
OWN = "own"

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Batch = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its weights, as the probes see it: in evaluation mode."""

    model: Model
    params: Params
    batch_stats: Params


@functools.partial(jax.jit, static_argnames=("model", "layers", "max_features"))
def _layers(
    model: Model,
    layers: tuple[str, ...],
    max_features: int,
    params: Params,
    batch_stats: Params,
    images: jax.Array,
) -> dict[str, jax.Array]:
    outputs, _ = model.apply(params, batch_stats, images)
    chosen = {name: outputs[name] for name in layers}
    return {
        name: features.pool(x, max_features) if x.ndim == 4 else x for name, x in chosen.items()
    }


_raw_pixels = jax.jit(features.raw_pixels, static_argnames="max_features")


class Judge:
    """The probes of one config on one data set; ``seed`` draws few-label subsets and MLPs."""

    def __init__(
        self,
        config: ConfigDict,
        train: Source,
        test: Source,
        model: Model,
        *,
        seed: int,
        cache: ImageCache,
    ):
        """Prepare to judge.

        Args:
            config: the whole config; ``eval`` and ``data`` are read.
            train: records that probes learn on.
            test: records that they are judged on.
            model: gives the names of the layers.
            seed: of everything that is drawn.
            cache: keeps decoded images from pass to pass.

        Raises:
            ValueError: unknown layer, or sources that do not share their classes.
        """
        self._eval, self._data, self._seed, self._cache = config.eval, config.data, seed, cache
        self._supervised = config.targets.kind == "labels"
        self.trained = SUPERVISED[config.optim.loss] if self._supervised else NAT
        self._train = _thinned(train, config.eval.max_train, seed)
        self._test = test
        # One count over all passes, so that a bad record is reported once.
        self._bad = {source.split: BadRecords(len(source)) for source in (self._train, test)}
        self.layers = resolve_layers(config.eval.layers, model)
        self.num_classes = check_labels(train, test)
        if self.num_classes is not None:
            for per_class in config.eval.labels_per_class:
                self._check_enough(per_class, self.num_classes)

    def _check_enough(self, per_class: int, num_classes: int) -> None:
        """Check that there are the records that a subset of labels and kNN need."""
        labels = self._train.labels
        if labels is not None:
            counts = np.bincount(labels[labels >= 0], minlength=num_classes)
            if per_class > counts.min():
                raise ValueError(
                    f"eval.labels_per_class: asks for {per_class} records of every class of "
                    f"{self._train.name}; class {counts.argmin()} has {counts.min()}. "
                    "Set --config.eval.labels_per_class='(0,)' for all labels only"
                )
        few = per_class * num_classes or len(self._train)
        if "knn" in self._eval.probes and self._eval.knn_k > few:
            raise ValueError(
                f"eval.knn_k: expected at most {few}, the training records with "
                f"{labels_name(per_class)} labels; got {self._eval.knn_k}"
            )

    @property
    def has_labels(self) -> bool:
        """Say whether there is anything to score against."""
        return self.num_classes is not None

    def protocol(self) -> dict[str, Any]:
        """Return everything that two numbers must share to be compared."""
        return {
            "eval": configs.to_dict(self._eval),
            "probes": {
                name: evaluate.protocol(name, _options(name, self._eval))
                for name in self._eval.probes
            },
            "layers": list(self.layers),
            "image_size": self._data.image_size,
            "resize": self._data.resize,
            "train": _describe(self._train),
            "test": _describe(self._test),
        }

    def pixels(self) -> list[Row]:
        """Score the raw pixels, pooled to ``eval.max_features`` values as network maps are."""
        most = self._eval.max_features
        return self._score(PIXELS, lambda images: {"pixels": _raw_pixels(images, most)})

    def network(self, name: str, network: Network) -> list[Row]:
        """Score a network's layers; ``name`` goes into the rows."""
        return self._score(name, self._apply(network))

    def neighbours(
        self, network: Network, layer: str, *, queries: int, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Find the nearest training images of some test images, by cosine in one layer.

        Returns:
            Query images uint8[Q, H, W, 3], neighbour images uint8[Q, K, H, W, 3] most similar
            first, and whether their labels agree bool[Q, K] (None without labels).
        """
        apply = self._apply(network, (layer,))
        good: list[np.ndarray] = []
        batches = _noting_index(self._batches(self._train), good)
        train = features.extract(apply, batches)[layer]
        chosen = np.linspace(0, len(self._test) - 1, min(queries, len(self._test))).astype(int)
        picked = list(self._batches(Selection(self._test, chosen), keep=False))
        test = features.extract(apply, picked)[layer]
        _, rows = nearest(test.features, train.features, min(count, len(train)))
        images = np.concatenate([batch["image"][batch["weight"] > 0] for batch in picked])
        neighbours = Selection(self._train, np.concatenate(good)[rows.reshape(-1)])
        found = np.concatenate(
            [batch["image"][batch["weight"] > 0] for batch in self._batches(neighbours, keep=False)]
        )
        correct = train.labels[rows] == test.labels[:, None] if self.has_labels else None
        return images, found.reshape(*rows.shape, *found.shape[1:]), correct

    def _apply(self, network: Network, layers: tuple[str, ...] | None = None) -> features.Apply:
        weights = sharding.on_local_devices((network.params, network.batch_stats))

        def apply(images: np.ndarray) -> dict[str, jax.Array]:
            return _layers(
                network.model,
                layers or self.layers,
                self._eval.max_features,
                *weights,
                sharding.local_batch(images),
            )

        return apply

    def _score(self, name: str, apply: features.Apply) -> list[Row]:
        if self.num_classes is None:
            raise ValueError("labels: expected labelled records to score against; got none")
        logger.info("judging %s", name)
        train = features.extract(apply, self._batches(self._train))
        test = features.extract(apply, self._batches(self._test))
        rows = []
        if self._supervised and "z" in test:
            right = np.argmax(test["z"].features, axis=1) == test["z"].labels
            rows.append(_row("z", name, OWN, configs.LABELS_ALL, float(np.mean(right))))
        for layer in train:
            for per_class in self._eval.labels_per_class:
                few = _few(train[layer], per_class, self._seed)
                for probe in self._eval.probes:
                    value = evaluate.PROBES[probe](
                        few,
                        test[layer],
                        num_classes=self.num_classes,
                        seed=self._seed,
                        **_options(probe, self._eval),
                    )
                    rows.append(_row(layer, name, probe, per_class, value))
        return rows

    def _batches(self, source: Source, *, keep: bool = True) -> Iterable[Batch]:
        return input_pipeline.eval_batches(
            source,
            preprocess.eval_transform(image_size=self._data.image_size, resize=self._data.resize),
            batch_size=self._eval.batch_size,
            cache=self._cache if keep else None,
            bad_records=self._bad[source.split] if keep else None,
            threads=self._data.threads,
            workers=self._data.workers,
            prefetch=self._data.prefetch,
            timeout=self._data.timeout,
        )


def _row(layer: str, network: str, probe: str, per_class: int, value: float) -> Row:
    labels = labels_name(per_class)
    return {
        "features": layer,
        "network": network,
        "probe": probe,
        "labels": labels,
        "value": value,
    }


def labels_name(per_class: int) -> str:
    """Return how a table names a number of labels."""
    return "all" if per_class == configs.LABELS_ALL else f"{per_class} per class"


def resolve_layers(names: Sequence[str], model: Model) -> tuple[str, ...]:
    """Turn layer names of a config into those of a network.

    Raises:
        ValueError: unknown name; the known ones are listed.
    """
    resolved = tuple(model.last_conv if name == "last_conv" else name for name in names)
    for name in resolved:
        if name not in model.layer_names:
            raise ValueError(
                f"eval.layers: unknown layer {name!r}. "
                f"Known: last_conv, {', '.join(model.layer_names)}"
            )
    return resolved


def check_labels(train: Source, test: Source) -> int | None:
    """Return the number of classes; None where one of the sources is unlabelled.

    Raises:
        ValueError: the two sources do not have the same classes.
    """
    if train.num_classes is None or test.num_classes is None:
        return None
    if train.num_classes != test.num_classes or train.class_names != test.class_names:
        raise ValueError(
            f"eval: expected the same classes in {train.name} and {test.name}; got "
            f"{train.num_classes} and {test.num_classes} ({train.class_names}, {test.class_names})"
        )
    return train.num_classes


def aggregate(judged: Mapping[int, Sequence[Row]]) -> list[Row]:
    """Join the rows of several seeds: mean, standard deviation (None for one seed), values."""
    joined: dict[tuple[str, ...], dict[int, float]] = {}
    for seed, rows in judged.items():
        for row in rows:
            key = (row["features"], row["network"], row["probe"], row["labels"])
            joined.setdefault(key, {})[seed] = row["value"]
    return [
        {
            "features": key[0],
            "network": key[1],
            "probe": key[2],
            "labels": key[3],
            "mean": float(np.mean(list(values.values()))),
            "std": float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else None,
            "values": list(values.values()),
            "seeds": list(values),
        }
        for key, values in joined.items()
    ]


def headline(table: Sequence[Row]) -> tuple[float, float]:
    """Return (trained, untrained) mean accuracy with all labels.

    That of a supervised network's own decisions, else of kNN on z, else of the first trained row.
    """
    trained = [row for row in table if row["network"] not in (PIXELS, UNTRAINED)]
    all_of_z = {r["probe"]: r for r in trained if (r["features"], r["labels"]) == ("z", "all")}
    row = all_of_z.get(OWN) or all_of_z.get("knn") or trained[0]
    same = [
        other["mean"]
        for other in table
        if other["network"] == UNTRAINED
        and all(other[key] == row[key] for key in ("features", "probe", "labels"))
    ]
    return row["mean"], same[0]


def environment() -> dict[str, Any]:
    """Return versions and hardware, for the ``run`` part of a result."""
    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {
        "nat_jax": __version__,
        **{name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "platform": jax.default_backend(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "machine": platform.machine(),
    }


def _options(probe: str, settings: ConfigDict) -> dict[str, Any]:
    """Return the options that the config gives a probe."""
    return {
        "knn": lambda: {"k": settings.knn_k},
        "linear_probe": dict,
        "mlp_probe": lambda: {"hidden": settings.mlp_width, "epochs": settings.mlp_epochs},
    }[probe]()


def _few(train: FeatureSet, per_class: int, seed: int) -> FeatureSet:
    if per_class == configs.LABELS_ALL:
        return train
    return features.subset_per_class(train, per_class, seed)


def _describe(source: Source) -> dict[str, Any]:
    return {
        "source": source.name,
        "split": source.split,
        "records": len(source),
        "fingerprint": source.fingerprint,
    }


def _noting_index(batches: Iterable[Batch], good: list[np.ndarray]) -> Iterator[Batch]:
    """Pass batches on, and append the record numbers that are not left out to ``good``."""
    for batch in batches:
        good.append(batch["index"][batch["weight"] > 0])
        yield batch


class Selection:
    """Some records of a source, renumbered from 0."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.name, self.split = source.name, source.split
        self.class_names, self.num_classes = source.class_names, source.num_classes
        self.fingerprint = source.fingerprint
        self.labels = None if source.labels is None else source.labels[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def record_name(self, index: int) -> str:
        return self._source.record_name(int(self._rows[index]))

    def __getitem__(self, index: int) -> Record:
        record = self._source[int(self._rows[index])]
        return Record(**{**record, "index": index})


def _thinned(source: Source, most: int, seed: int) -> Source:
    if not most or most >= len(source):
        return source
    rows = np.sort(np.random.default_rng(seed).choice(len(source), most, replace=False))
    return Selection(source, rows)
