"""The evaluator: scores networks and baselines by one protocol on the records of one config.

The features of raw pixels and of the same network before training stand next to every trained
number: a wide random network is a strong baseline on small images.
"""

import functools
import importlib.metadata
import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from nat_jax import __version__, report
from nat_jax import config as configs
from nat_jax.errors import InputError
from nat_jax.evaluate import features, retrieval
from nat_jax.evaluate.baselines import BASELINES
from nat_jax.evaluate.networks import trained_name
from nat_jax.evaluate.probe_data import TRAIN, FeatureExtractor, ProbeData, check_learnable
from nat_jax.evaluate.protocols import PROTOCOLS, Scored, TaskInputs
from nat_jax.evaluate.store import FeatureStore, fingerprint
from nat_jax.input import transforms
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Source
from nat_jax.models import Model
from nat_jax.models.frozen import FrozenModel, resolve_layers
from nat_jax.report.rows import NO_NETWORK, UNTRAINED, Row, aggregate, headline
from nat_jax.runtime import atomic_files
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

Result = dict[str, Any]

# Settings that the features and the records depend on, in every protocol.
_COMMON = ("layers", "max_train", "max_features", "batch_size")
_QUERIES, _NEIGHBOURS = 8, 10  # in the pictures of a trained run
_WINDOWS_PER_SIDE = 32  # of a patch dictionary, about: those of CIFAR's images, for larger ones too

_raw_pixels = jax.jit(features.raw_pixels, static_argnames="max_features")


class Evaluator:
    """One protocol on the records of one config and seed."""

    def __init__(
        self,
        config: ConfigDict,
        train: Source,
        test: Source,
        model: Model,
        *,
        seed: int,
        cache: ImageCache,
        task: str = "pretrain",
        store: FeatureStore | None = None,
    ):
        """Prepare to evaluate.

        Args:
            config: a run's; ``eval``, ``data``, ``targets`` and ``optim.loss`` are read.
            train: records that probes learn on.
            test: records that they are scored on.
            model: the network that is evaluated, whose layers ``eval.layers`` names.
            seed: of everything that is drawn.
            cache: keeps decoded images from pass to pass.
            task: a key of PROTOCOLS, or another task that looks at images.
            store: keeps features; None computes them each time.

        Raises:
            InputError: an unknown layer, or records that the task cannot be done on.
        """
        settings, data = config.eval, config.data
        records = ProbeData(
            train,
            test,
            batch_size=settings.batch_size,
            reading=configs.reading(config),
            max_train=settings.max_train,
            seed=seed,
            cache=cache,
            store=store,
        )
        self.inputs = TaskInputs(
            settings,
            records,
            seed,
            model,
            configs.train_transform(config, colors=False),
            data.resize,
            config.targets.kind == "labels",
        )
        self.trained = trained_name(config)
        self._task, self._size = task, data.image_size
        self._transform = transforms.eval_transform(
            image_size=data.image_size, resize=data.resize, white=data.white
        )
        if task in PROTOCOLS and (settings.probes or task != "pretrain"):
            check_learnable(train, test)
        self.protocol()  # finds what does not fit

    @property
    def has_labels(self) -> bool:
        """Whether there are labels to score against."""
        return self.inputs.data.num_classes is not None

    @property
    def scores_run(self) -> bool:
        """Whether a run is scored: there are labels, and probes."""
        return self.has_labels and bool(self.inputs.settings.probes)

    def protocol(self) -> dict[str, Any]:
        """Return everything that two numbers must share to be compared."""
        settings = configs.to_dict(self.inputs.settings)
        keys = [*_COMMON, *(["baselines"] if self._task in PROTOCOLS else ())]
        if "baselines" in keys:
            learned = [BASELINES[w].setting for w in settings["baselines"] if w in BASELINES]
            keys += dict.fromkeys(learned)
        data = self.inputs.data
        if self._task not in PROTOCOLS:
            stated = {key: settings[key] for key in ("queries", "neighbours")}
        elif self.has_labels or self._task == "pretrain":
            stated = PROTOCOLS[self._task].state(self.inputs)
        else:
            assert data.unlabelled is not None
            raise InputError(
                f"task {self._task}: expected labelled records; {data.unlabelled.name} has no "
                "classes. "
                "Name a source that has with --config.eval.source=..., or run retrieval, filters "
                "or features, which need none"
            )
        return {
            "eval": {key: settings[key] for key in keys},
            "image_size": self._size,
            "resize": self.inputs.resize,
            **({"white": white} if (white := self._transform.white) else {}),
            **data.describe(),
            **stated,
        }

    def extractors(self, networks: Mapping[str, FrozenModel]) -> list[FeatureExtractor]:
        """Return the extractors of ``eval.baselines`` and of some networks."""
        chosen = [
            self._learned(word) if word in BASELINES else self._pixels()
            for word in self.inputs.settings.baselines
        ]
        return chosen + [self.extractor(name, network) for name, network in networks.items()]

    def extractor(
        self, name: str, network: FrozenModel, layers: tuple[str, ...] = ()
    ) -> FeatureExtractor:
        """Return the extractor of a network's layers, by default those of ``eval.layers``.

        Feature maps are pooled to ``eval.max_features`` values; ``name`` goes into the rows.
        """
        settings = self.inputs.settings
        most = settings.max_features
        return FeatureExtractor(
            name,
            layers or resolve_layers(settings.layers, network.model),
            lambda chosen: network.extractor(chosen, most),
            self._transform,
            functools.cache(lambda: {"network": network.fingerprint(), "max_features": most}),
        )

    def _pixels(self) -> FeatureExtractor:
        """Return the extractor of raw pixels, pooled as maps are."""
        most = self.inputs.settings.max_features
        return FeatureExtractor(
            NO_NETWORK["pixels"],
            ("pixels",),
            lambda _: lambda images: {"pixels": _raw_pixels(images, most)},
            self._transform,
            lambda: {"pixels": most},
        )

    def _learned(self, word: str) -> FeatureExtractor:
        """Return the extractor of a baseline, learned when its features are first needed."""
        data, seed, transform = self.inputs.data, self.inputs.seed, self._transform
        baseline = BASELINES[word]
        size = self.inputs.settings[baseline.setting]
        stride = max(1, round(transform.size / _WINDOWS_PER_SIDE))

        class Images:
            def __iter__(self) -> Iterator[np.ndarray]:
                batches = data.batches(data.train, transform)
                return (np.asarray(batch["image"])[batch["weight"] > 0] for batch in batches)

        @functools.cache
        def describe() -> Callable[[np.ndarray], jax.Array]:
            return baseline.learn(Images(), size, stride=stride, seed=seed)

        learned_from = {
            word: size,
            "stride": stride,
            "seed": seed,
            "max_train": self.inputs.settings.max_train,
            **data.describe()[TRAIN],
        }
        return FeatureExtractor(
            NO_NETWORK[word],
            (word,),
            lambda _: lambda images: {word: describe()(images)},
            transform,
            lambda: learned_from,
        )

    def score(self, extractor: FeatureExtractor) -> Scored:
        """Return the rows of an extractor's features by draw; "" if only the seed is drawn."""
        logger.info("evaluating %s", report.network_name(extractor.name))
        return PROTOCOLS[self._task].score(self.inputs, extractor)

    def headline(self, table: Sequence[Row], network: str | None = None) -> tuple[Row, Row | None]:
        """Return the row that sums up a table, and that of the untrained network."""
        return headline(table, PROTOCOLS[self._task].headline(self.inputs), network)

    def score_run(
        self, workdir: Path, trained: FrozenModel, untrained: Callable[[], FrozenModel], run: Result
    ) -> list[Row]:
        """Score the baselines, the untrained and the trained network, and draw the pictures.

        The rows of an earlier call on the same weights under the same protocol are read back.

        Args:
            workdir: the folder of the seed's run.
            trained: its network.
            untrained: returns the same network before training.
            run: what else identifies the run.
        """
        key = {"protocol": self.protocol(), "network": trained.fingerprint(), "run": run}
        path = kept_result(workdir, "pretrain", key)
        if (known := workdirs.read_json(path)) is not None:
            return known["rows"]
        rows: list[Row] = []
        extractors = [self.extractor(self.trained, trained)]
        if self.scores_run:
            extractors = self.extractors({UNTRAINED: untrained(), self.trained: trained})
        while extractors:
            extractor = extractors.pop(0)  # the features of the others need no memory then
            rows += self.score(extractor)[""] if self.scores_run else []
        self._draw(workdir / "pictures", trained, extractor)
        workdirs.write_json(path, {**key, "rows": rows})
        return rows

    def _draw(self, folder: Path, network: FrozenModel, extractor: FeatureExtractor) -> None:
        """Draw the first layer's filters and some test images' nearest neighbours."""
        kernel = jax.device_get(network.params["conv1"]["map"]["kernel"])
        drawn = report.filters(kernel, "First-layer filters")
        atomic_files.write(folder / "filters.png", drawn)
        for layer in ("z", network.model.last_conv):
            found = retrieval.find(
                self.inputs.data, extractor, layer, queries=_QUERIES, count=_NEIGHBOURS
            )
            drawn = report.neighbours(found.query_images, found.images, found.correct)
            atomic_files.write(folder / f"neighbours_{layer}.png", drawn)


def write_run_result(
    workdir: Path,
    evaluator: Evaluator,
    config: ConfigDict,
    rows: Mapping[int, Sequence[Row]],
    run: Mapping[str, Any],
) -> None:
    """Write ``results/pretrain.json`` and its table over all seeds, and print the table.

    Args:
        workdir: the run's folder.
        evaluator: of one of the seeds.
        config: the run's, for the protocol.
        rows: of each seed.
        run: what else identifies the run.
    """
    table = aggregate(rows)
    best, before = evaluator.headline(table)
    result = {
        "task": "pretrain",
        "metric": "accuracy",
        "value": best["mean"],
        "untrained": None if before is None else before["mean"],
        "protocol": {**evaluator.protocol(), "config": configs.to_dict(config)},
        "run": {**run, "seed": list(rows), **environment()},
        "table": table,
    }
    workdirs.write_json(workdir / "results" / "pretrain.json", result)
    markdown = report.markdown_table(table).encode()
    atomic_files.write(workdir / "results" / "pretrain.md", markdown)
    print(report.text_table(table), flush=True)


def kept_result(workdir: Path, task: str, key: Mapping[str, Any]) -> Path:
    """Return where the result of a task for some weights, data and protocol is kept."""
    return workdir / "results" / "judged" / f"{task}-{fingerprint(key)[:16]}.json"


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
