"""The tasks that judge: a run, an untrained network or a bundle, by one protocol, into one result.

``python -m nat_jax.main --config=configs/X.py --config.task=knn`` and so on; docs/protocols.md has
the protocols.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate, report
from nat_jax.errors import InputError
from nat_jax.evaluate import judge, subjects
from nat_jax.evaluate.contenders import Contenders, find_contenders, seeds_of
from nat_jax.evaluate.draw_filters import draw_filters
from nat_jax.evaluate.feature_cache import FeatureCache, fingerprint
from nat_jax.evaluate.features import few_labels
from nat_jax.evaluate.probe_data import Subject
from nat_jax.evaluate.retrieval import draw_neighbours
from nat_jax.evaluate.scoring import SCORED, Asked, Task
from nat_jax.export.loading import UNTRAINED
from nat_jax.input import transforms
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Source, open_source
from nat_jax.models.frozen import resolve_layers
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

Result = dict[str, Any]

_OF_EACH = ("layers", "max_train", "max_features", "batch_size")


class Seed(NamedTuple):
    """What is judged for one seed: the networks, and of tasks that look at images the records."""

    seed: int
    contenders: Contenders
    records: Asked | None

    @property
    def asked(self) -> Asked:
        """The records of a task that looks at images."""
        assert self.records is not None
        return self.records


def judge_task(config: ConfigDict, workdir: Path) -> Path:
    """Do the task that a config names, and write ``results/<task>.json``.

    Every result ever found is kept in ``results/judged``; the same task on the same weights, data
    and protocol is read back from there.

    Args:
        config: ``task``, ``network``, ``seeds`` and ``eval`` are read, and how data is read; model
            and data are the network's.
        workdir: the run's folder, in which features are kept too.

    Returns:
        The result's file.

    Raises:
        ValueError: a mistake in the config, no such network, or records that cannot be judged on.
    """
    configs.validate(config, evaluate.PROBES)
    workdir = Path(workdir)
    seeds = _set_up(config, workdir)
    result: Result = {
        "task": config.task,
        "protocol": _protocol(config.task, seeds[0]),
        "run": {
            "seed": [one.seed for one in seeds],
            "networks": [one.contenders.describe() for one in seeds],
            **judge.environment(),
        },
    }
    kept = workdir / "results" / "judged" / f"{config.task}-{fingerprint(result)[:16]}.json"
    place = workdir / "results" / f"{config.task}.json"
    known, old = workdirs.read_json(kept), workdirs.read_json(place)
    if known is not None and ("pictures" not in known or _are_drawn(known, old, workdir)):
        logger.info("%s: read back, as weights, data and protocol are the same", kept)
        result = known
    else:
        result = _ordered({**result, **_ACTIONS[config.task](seeds, workdir)})
        workdirs.write_json(kept, result)
    if old is not None and old != result:
        logger.info("%s: replaces the result of another protocol or network", place)
    workdirs.write_json(place, result)
    if "table" in result:
        print(report.text_table(result["table"]), flush=True)
    if (workdir / "config.json").exists():
        print(f"report: {report.write_report(workdir)}", flush=True)
    return place


def _set_up(config: ConfigDict, workdir: Path) -> list[Seed]:
    """Load the networks and open the records; every mistake is found here."""
    images, seeds = ImageCache(), []
    keep = FeatureCache(workdir / "features_cache")
    opened: dict[tuple[str, str, int], Source] = {}

    def source(spec: str, split: str, per_class: int = 0) -> Source:
        key = (spec, split, per_class)
        if key not in opened:
            opened[key] = open_source(spec, split, per_class=per_class)
        return opened[key]

    several = seeds_of(config, workdir)
    for seed in several if config.task in SCORED else several[:1]:  # of pictures one is enough
        contenders = find_contenders(config, workdir, seed)
        if config.task not in _LOOKING:
            seeds.append(Seed(seed, contenders, None))
            continue
        settings = contenders.settings
        named = settings.eval.source
        own = settings.data.source if named else _own_data(config, contenders, source)
        test = named or own
        learn = settings.eval.train_source or test
        data = judge.probe_data(
            settings,
            source(learn, "train", settings.data.per_class if learn == own else 0),
            source(test, "test"),
            seed=seed,
            cache=images,
            keep=keep,
        )
        augment = configs.train_transform(settings, colors=False)
        asked = Asked(settings.eval, data, seed, augment, settings.data.resize)
        _check(config.task, asked)
        _subjects(asked, contenders)  # finds layers that a network does not have
        seeds.append(Seed(seed, contenders, asked))
    return seeds


def _own_data(config: ConfigDict, contenders: Contenders, source: Callable[..., Source]) -> str:
    """Return where the data that the network was trained on lies now.

    That is where the command line says, if the same records are there; else where it was.

    Raises:
        ValueError: it is nowhere; the message says what to set.
    """
    asked, own = config.data.source, contenders.settings.data.source
    if asked == own:
        return own
    trained_on = contenders.networks[contenders.judged].run.get("data")
    with contextlib.suppress(ValueError):  # what is not there matters only if the other is not
        few = contenders.settings.data.per_class
        if trained_on is not None and source(asked, "train", few).fingerprint == trained_on:
            return asked
    try:
        source(own, "test")
    except ValueError as error:
        raise InputError(
            f"{error}. The network was trained on that; say where it lies now with "
            "--config.data.source=..., or judge on other data with --config.eval.source=..."
        ) from error
    logger.info("judging on %s, as in training; --config.eval.source=... is for other data", own)
    return own


def _check(task: str, asked: Asked) -> None:
    """Find out before any work whether the records can be judged on."""
    data, settings = asked.data, asked.settings
    if task in SCORED and data.num_classes is None:
        without = data.train if data.train.num_classes is None else data.test
        raise InputError(
            f"task {task}: expected labelled records; {without.name} has no classes. Name a source "
            "that has with --config.eval.source=..., or run retrieval, filters or features, which "
            "need none"
        )
    if task == "knn":
        most = max(*settings.knn_ks, settings.knn_k)
        if most > len(data.train):
            raise InputError(
                f"eval.knn_ks: expected at most {len(data.train)}, the training records of "
                f"{data.train.name}; got {most}. Set --config.eval.knn_ks='(1, 5)' and "
                "--config.eval.knn_k=5, for instance"
            )
    if task == "low_shot" and data.train.labels is not None:
        for amount in settings.few_labels:
            few_labels(data.train.labels, amount, seed=0)  # finds classes with too few
    if task in SCORED:
        SCORED[task].state(asked)  # finds settings that do not fit together


def _subjects(asked: Asked, contenders: Contenders) -> list[Subject]:
    """Return the baselines, the untrained network, the one that is judged, and those beside it."""
    settings = contenders.settings
    transform = transforms.eval_transform(
        image_size=settings.data.image_size, resize=settings.data.resize
    )
    chosen = judge.baselines(asked.settings, asked.data, transform, asked.seed)
    for name, network in contenders.networks.items():
        layers = resolve_layers(asked.settings.layers, network.model)
        chosen.append(
            subjects.of_network(
                name,
                network,
                layers,
                max_features=asked.settings.max_features,
                transform=transform,
            )
        )
    return chosen


def _protocol(task: str, one: Seed) -> dict[str, Any]:
    """Return everything that two numbers must share to be compared."""
    if one.records is None:
        return {"networks": "their weights alone"}
    settings, asked = one.contenders.settings, one.asked
    keys = [*_OF_EACH, *(["baselines"] if task in SCORED else ())]
    if "baselines" in keys and "patches" in settings.eval.baselines:
        keys.append("patch_centroids")
    stated = {
        "eval": {key: configs.to_dict(settings.eval)[key] for key in keys},
        "image_size": settings.data.image_size,
        "resize": settings.data.resize,
        **asked.data.describe(),
    }
    if task in SCORED:
        return {**stated, **SCORED[task].state(asked)}
    return {**stated, "queries": asked.settings.queries, "neighbours": asked.settings.neighbours}


def _scored(seeds: Sequence[Seed], workdir: Path) -> Result:
    """Return the table and the headline of a task that scores by labels."""
    del workdir
    task = SCORED[seeds[0].contenders.settings.task]
    judged: dict[Any, list[judge.Row]] = {}
    for one in seeds:
        for subject in _subjects(one.asked, one.contenders):
            if one is not seeds[0] and subject.name in one.contenders.beside:
                continue  # it is the same network for every seed
            logger.info("judging %s", report.network_name(subject.name))
            for drawn, rows in task.score(one.asked, subject).items():
                tag = f"seed {one.seed}, {drawn}" if drawn else one.seed
                judged.setdefault(tag, []).extend(rows)
    table = judge.aggregate(judged)
    return {**_headline(task, seeds[0], table), "table": table}


def _headline(task: Task, one: Seed, table: Sequence[judge.Row]) -> Result:
    settings, name = one.asked.settings, one.contenders.judged
    network = one.contenders.networks[name]
    layers = resolve_layers(settings.layers, network.model)
    wanted = resolve_layers((task.layer,), network.model)[0]
    layer = wanted if wanted in layers else layers[0]
    probe, labels = task.probe(settings), task.labels(settings)

    def value(network: str) -> float:
        key = (layer, network, probe, labels)
        names = ("features", "network", "probe", "labels")
        return next(r["mean"] for r in table if tuple(r[n] for n in names) == key)

    return {
        "metric": f"top-1 accuracy, {probe} on {layer}, {labels}",
        "value": value(name),
        "untrained": value(UNTRAINED),
    }


def _retrieved(seeds: Sequence[Seed], workdir: Path) -> Result:
    asked, contenders = seeds[0].asked, seeds[0].contenders
    named = {subject.name: subject for subject in _subjects(asked, contenders)}
    return draw_neighbours(asked.settings, asked.data, named, contenders.judged, workdir)


def _filters(seeds: Sequence[Seed], workdir: Path) -> Result:
    contenders = seeds[0].contenders
    return draw_filters(contenders.networks, contenders.judged, workdir)


_ACTIONS: Mapping[str, Callable[[Sequence[Seed], Path], Result]] = {
    **dict.fromkeys(SCORED, _scored),
    "retrieval": _retrieved,
    "filters": _filters,
}
TASKS = tuple(_ACTIONS)

# Those that look at images.
_LOOKING = (*SCORED, "retrieval")


def _are_drawn(result: Result, last: Result | None, workdir: Path) -> bool:
    """Say whether a result's pictures are there, and not those of another one."""
    there = all((workdir / "pictures" / name).exists() for name in result["pictures"])
    return last == result and there


def _ordered(result: Result) -> Result:
    """Put what a reader looks for first on top; the same as what JSON gives back."""
    first = ("task", "metric", "value", "untrained", "protocol", "run")
    ordered = {key: result[key] for key in first}
    return json.loads(json.dumps({**ordered, **result}))
