"""Judge networks: every probe on every chosen layer, with all labels and with few, as one table.

The features of raw pixels and of the same network before training stand beside every trained
number: a wide random network is a strong baseline on small images.
"""

import importlib.metadata
import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nat_jax import __version__, evaluate, report
from nat_jax import config as configs
from nat_jax.errors import InputError
from nat_jax.evaluate import features, neighbours, subjects
from nat_jax.evaluate.feature_cache import FeatureCache
from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probe_data import ProbeData, Reading, Subject
from nat_jax.export.loading import UNTRAINED
from nat_jax.input import transforms
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Source
from nat_jax.models import Model
from nat_jax.models.frozen import Network, resolve_layers

# How rows name trained networks: by what they were trained with.
NAT, SUPERVISED = "nat", {"square": "supervised_square", "softmax": "supervised_softmax"}

# The name in rows of a supervised network's own decision, the largest of its outputs.
OWN = "own"

# Features of more bytes are fitted by SGD, where eval.linear_fit leaves the choice.
_LARGE = 2 << 30

logger = logging.getLogger(__name__)

Row = dict[str, Any]


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
        self._eval, self._data, self._seed = config.eval, config.data, seed
        self.trained = trained_name(config)
        self._records = probe_data(config, train, test, seed=seed, cache=cache)
        self._transform = transforms.eval_transform(
            image_size=config.data.image_size, resize=config.data.resize
        )
        self.layers = resolve_layers(config.eval.layers, model)
        self.num_classes = self._records.num_classes
        if self.num_classes is not None:
            for per_class in config.eval.labels_per_class:
                self._check_enough(per_class, self.num_classes)

    def _check_enough(self, per_class: int, num_classes: int) -> None:
        """Check that there are the records that a subset of labels and kNN need."""
        train = self._records.train
        if train.labels is not None:
            counts = np.bincount(train.labels[train.labels >= 0], minlength=num_classes)
            if per_class > counts.min():
                raise InputError(
                    f"eval.labels_per_class: asks for {per_class} records of every class of "
                    f"{train.name}; class {counts.argmin()} has {counts.min()}. "
                    "Set --config.eval.labels_per_class='(0,)' for all labels only"
                )
        few = per_class * num_classes or len(train)
        if "knn" in self._eval.probes and self._eval.knn_k > few:
            raise InputError(
                f"eval.knn_k: expected at most {few}, the training records with "
                f"{labels_name(per_class)} labels; got {self._eval.knn_k}. "
                f"Set --config.eval.knn_k={few}"
            )

    @property
    def has_labels(self) -> bool:
        """Say whether there is anything to score against."""
        return self.num_classes is not None

    def protocol(self) -> dict[str, Any]:
        """Return everything that two numbers must share to be compared."""
        records = len(self._records.train)
        return {
            "eval": configs.to_dict(self._eval),
            "probes": {
                name: evaluate.protocol(name, probe_options(name, self._eval, records))
                for name in self._eval.probes
            },
            "layers": list(self.layers),
            "image_size": self._data.image_size,
            "resize": self._data.resize,
            **self._records.describe(),
        }

    def baselines(self) -> list[Row]:
        """Score ``eval.baselines``: raw pixels, k-means patches."""
        chosen = baselines(self._eval, self._records, self._transform, self._seed)
        return [row for subject in chosen for row in self._score(subject)]

    def network(self, name: str, network: Network) -> list[Row]:
        """Score a network's layers; ``name`` goes into the rows."""
        return self._score(self._subject(name, network))

    def neighbours(
        self, network: Network, layer: str, *, queries: int, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Find the nearest training images of some test images, by cosine in one layer.

        Returns:
            Query images uint8[Q, H, W, 3], neighbour images uint8[Q, K, H, W, 3] most similar
            first, and whether their labels agree bool[Q, K] (None without labels).
        """
        subject = self._subject(self.trained, network, (layer,))
        found = neighbours.find(self._records, subject, layer, queries=queries, count=count)
        return found.query_images, found.images, found.correct

    def _subject(
        self, name: str, network: Network, layers: tuple[str, ...] | None = None
    ) -> Subject:
        return subjects.of_network(
            name,
            network,
            layers or self.layers,
            max_features=self._eval.max_features,
            transform=self._transform,
        )

    def _score(self, subject: Subject) -> list[Row]:
        if self.num_classes is None:
            raise InputError("labels: expected labelled records to score against; got none")
        name = subject.name
        logger.info("judging %s", report.network_name(name))
        train, test = self._records.sets(subject)
        rows, records = [], len(self._records.train)
        if self.trained != NAT and "z" in test:
            right = np.argmax(test["z"].features, axis=1) == test["z"].labels
            rows.append(row("z", name, OWN, "all", float(np.mean(right))))
        for layer in train:
            for per_class in self._eval.labels_per_class:
                few = _few(train[layer], per_class, self._seed)
                labels = labels_name(per_class)
                for probe in self._eval.probes:
                    value = evaluate.PROBES[probe](
                        few,
                        test[layer],
                        num_classes=self.num_classes,
                        seed=self._seed,
                        **probe_options(probe, self._eval, records),
                    )
                    rows.append(row(layer, name, probe, labels, value))
        return rows


def probe_data(
    config: ConfigDict,
    train: Source,
    test: Source,
    *,
    seed: int,
    cache: ImageCache,
    keep: FeatureCache | None = None,
) -> ProbeData:
    """Return a config's records of the probes; see ``ProbeData``."""
    data = config.data
    reading = Reading(
        batch_size=config.eval.batch_size,
        threads=data.threads,
        workers=data.workers,
        prefetch=data.prefetch,
        timeout=data.timeout,
    )
    most = config.eval.max_train
    return ProbeData(
        train, test, reading=reading, max_train=most, seed=seed, cache=cache, keep=keep
    )


def baselines(
    settings: ConfigDict, data: ProbeData, transform: transforms.Transform, seed: int
) -> list[Subject]:
    """Return the subjects that ``eval.baselines`` names."""
    made = {
        "pixels": lambda: subjects.of_pixels(
            max_features=settings.max_features, transform=transform
        ),
        "patches": lambda: subjects.of_patches(
            data,
            centroids=settings.patch_centroids,
            seed=seed,
            max_train=settings.max_train,
            transform=transform,
        ),
    }
    return [made[name]() for name in settings.baselines]


def trained_name(config: ConfigDict) -> str:
    """Return how rows name the network of a config: by what it was trained with."""
    return SUPERVISED[config.optim.loss] if config.targets.kind == "labels" else NAT


def row(layer: str, network: str, probe: str, labels: str, value: float) -> Row:
    """Return what one probe found: a row of a seed's results."""
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


def aggregate(judged: Mapping[Any, Sequence[Row]]) -> list[Row]:
    """Join the rows of several seeds: mean, standard deviation (None for one seed), values."""
    joined: dict[tuple[str, ...], dict[Any, float]] = {}
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
    beside = (subjects.PIXELS, subjects.PATCHES, UNTRAINED)
    trained = [row for row in table if row["network"] not in beside]
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


def probe_options(probe: str, settings: ConfigDict, records: int) -> dict[str, Any]:
    """Return the options that a config's ``eval`` gives a probe that learns on some records.

    None for a probe that has no keys there.
    """
    given: dict[str, Callable[[], dict[str, Any]]] = {
        "knn": lambda: {"k": settings.knn_k},
        "linear_probe": lambda: {"fit": linear_fit(settings, records)},
        "mlp_probe": lambda: {
            "hidden": settings.mlp_width,
            "epochs": settings.mlp_epochs,
            "init": settings.mlp_init,
        },
    }
    return given[probe]() if probe in given else {}


def linear_fit(settings: ConfigDict, records: int) -> str:
    """Return ``eval.linear_fit``; "auto" is "lbfgs" up to 2 GiB of features, else "sgd"."""
    if settings.linear_fit != "auto":
        return settings.linear_fit
    return "lbfgs" if 4 * records * settings.max_features <= _LARGE else "sgd"


def _few(train: FeatureSet, per_class: int, seed: int) -> FeatureSet:
    if per_class == configs.LABELS_ALL:
        return train
    return features.subset_per_class(train, per_class, seed)
