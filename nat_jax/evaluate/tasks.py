"""The tasks that evaluate a run, an untrained network or a bundle by one protocol.

``python -m nat_jax.main --config=configs/X.py --config.task=knn`` and so on; docs/protocols.md has
the protocols.
"""

import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate, report
from nat_jax.evaluate.draw_filters import draw_filters
from nat_jax.evaluate.evaluator import Evaluator, Result, environment, kept_result
from nat_jax.evaluate.networks import Networks, data_of, load_networks, seeds_of
from nat_jax.evaluate.protocols import PROTOCOLS
from nat_jax.evaluate.retrieval import draw_neighbours
from nat_jax.evaluate.store import FeatureStore
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import open_source
from nat_jax.report.rows import Row, aggregate, current
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)


class Seed(NamedTuple):
    """The networks of one seed, and the evaluator of a task that looks at images."""

    seed: int
    networks: Networks
    evaluator: Evaluator | None

    @property
    def records(self) -> Evaluator:
        """The evaluator, for a task that has one."""
        assert self.evaluator is not None
        return self.evaluator


def judge_task(config: ConfigDict, workdir: Path) -> Path:
    """Do the task that a config names, and write ``results/<task>.json``.

    Every result is also kept in ``results/judged``; the same task on the same weights, data and
    protocol is read back from there.

    Args:
        config: ``task``, ``network``, ``seeds`` and ``eval`` are read, and how data is read; model
            and data are the network's. ``eval.to`` names another folder for all that is written.
        workdir: the run's folder, in which features are kept too.

    Returns:
        The result's file.

    Raises:
        InputError: a mistake in the config, no such network, a folder that cannot be written to,
            or records that the task cannot be done on.
    """
    configs.validate(config, evaluate.PROBES)
    output = Path(config.eval.to or workdir).expanduser()
    key = "eval.to" if config.eval.to else "--workdir"
    workdirs.check_writable(output, key, "Name a folder for results with --config.eval.to=DIR")
    seeds = _set_up(config, Path(workdir), output)
    inputs: Result = {
        "task": config.task,
        "protocol": seeds[0].evaluator.protocol() if seeds[0].evaluator else _WEIGHTS_ALONE,
        "run": {
            "seed": [one.seed for one in seeds],
            "networks": [one.networks.describe() for one in seeds],
            **environment(),
        },
    }
    options = inputs["protocol"].get(config.task, {})
    if numbers := [f"{name} {v}" for name, v in options.items() if isinstance(v, int | float)]:
        logger.info("%s: %s", config.task, ", ".join(numbers))
    kept = kept_result(output, config.task, inputs)
    place = output / "results" / f"{config.task}.json"
    known, old = workdirs.read_json(kept), workdirs.read_json(place)
    if known is not None and ("pictures" not in known or _are_drawn(known, old, output)):
        logger.info("%s: read back, as weights, data and protocol are the same", kept)
        result = known
    else:
        result = _ordered({**inputs, **_ACTIONS[config.task](seeds, output)})
        workdirs.write_json(kept, result)
    if "table" in result:
        result["table"] = current(result["table"])
    if old is not None and old != result:
        logger.info("%s: replaces the result of another protocol or network", place)
    workdirs.write_json(place, result)
    if "table" in result:
        print(report.text_table(result["table"]), flush=True)
    if (output / "config.json").exists():
        print(f"report: {report.write_report(output)}", flush=True)
    return place


def _set_up(config: ConfigDict, workdir: Path, output: Path) -> list[Seed]:
    """Load the networks and open the records; every mistake is found here."""
    images, seeds = ImageCache(), []
    store = FeatureStore(output / "features_cache")
    source = functools.cache(open_source)
    several = seeds_of(config, workdir)
    for seed in several if config.task in PROTOCOLS else several[:1]:  # of pictures one is enough
        networks = load_networks(config, workdir, seed)
        evaluator = None
        if config.task != _FILTERS:
            settings = networks.settings
            named = settings.eval.source
            own = settings.data.source if named else data_of(networks.network, config, source)
            if not named and own != config.data.source:
                logger.info(
                    "evaluating on %s, as in training; --config.eval.source=... is for other data",
                    own,
                )
            test = named or own
            learn = settings.eval.train_source or test
            evaluator = Evaluator(
                settings,
                source(learn, per_class=settings.data.per_class if learn == own else 0),
                source(test, "test"),
                networks.network.model,
                task=config.task,
                seed=seed,
                cache=images,
                store=store,
            )
            evaluator.extractors(networks.all)  # finds layers that a network does not have
        seeds.append(Seed(seed, networks, evaluator))
    return seeds


def _scored(seeds: Sequence[Seed], workdir: Path) -> Result:
    """Return the table and the headline of a task that scores by labels."""
    del workdir
    rows: dict[Any, list[Row]] = {}
    for one in seeds:
        for extractor in one.records.extractors(one.networks.all):
            if one is not seeds[0] and extractor.name in one.networks.folders:
                continue  # it is the same network for every seed
            for drawn, scored in one.records.score(extractor).items():
                tag = f"seed {one.seed}, {drawn}" if drawn else one.seed
                rows.setdefault(tag, []).extend(scored)
    table = aggregate(rows)
    best, before = seeds[0].records.headline(table, seeds[0].networks.evaluated)
    assert before is not None
    return {
        "metric": f"top-1 accuracy, {best['probe']} on {best['layer']}, {best['labels']}",
        "value": best["mean"],
        "untrained": before["mean"],
        "table": table,
    }


def _retrieved(seeds: Sequence[Seed], workdir: Path) -> Result:
    inputs, networks = seeds[0].records.inputs, seeds[0].networks
    named = {one.name: one for one in seeds[0].records.extractors(networks.all)}
    result = draw_neighbours(inputs.settings, inputs.data, named, networks.evaluated, workdir)
    if result["value"] is not None:
        shares = f"{result['value']:.3f} (untrained {result['untrained']:.3f})"
        logger.info("%s: %s", result["metric"], shares)
    for name in result["pictures"]:
        logger.info("picture: %s", workdir / "pictures" / name)
    return result


def _drawn(seeds: Sequence[Seed], workdir: Path) -> Result:
    return draw_filters(seeds[0].networks.all, seeds[0].networks.evaluated, workdir)


_FILTERS = "filters"  # looks at no images
_WEIGHTS_ALONE = {"networks": "their weights alone"}  # its protocol
_ACTIONS: Mapping[str, Callable[[Sequence[Seed], Path], Result]] = {
    **{task: _scored for task in PROTOCOLS if task != "pretrain"},
    "retrieval": _retrieved,
    _FILTERS: _drawn,
}
TASKS = tuple(_ACTIONS)


def _are_drawn(result: Result, last: Result | None, workdir: Path) -> bool:
    """Return whether a result's pictures are there, and not those of another one."""
    there = all((workdir / "pictures" / name).exists() for name in result["pictures"])
    return last == result and there


def _ordered(result: Result) -> Result:
    """Return a result as JSON reads it back, with the keys that matter most on top."""
    first = ("task", "metric", "value", "untrained", "protocol", "run")
    ordered = {key: result[key] for key in first}
    return json.loads(json.dumps({**ordered, **result}))
