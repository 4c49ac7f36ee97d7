"""The networks of a task: the one that the config names, the same untrained, and others."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax.errors import InputError
from nat_jax.export import Bundle
from nat_jax.export.bundle import is_bundle
from nat_jax.export.loading import (
    UNTRAINED,
    load_network,
    network_of,
    task_config,
    untrained_network,
)
from nat_jax.input.sources import Source
from nat_jax.report.rows import NAT, SUPERVISED
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)

_ORIGIN = ("seed", "step", "data")  # of a network, in a result


@dataclasses.dataclass(frozen=True)
class Networks:
    """Networks by the names that tables have for them.

    Attributes:
        all: "untrained" first, then the one that is evaluated, then those it is compared with.
        evaluated: the name of that one.
        folders: where those that it is compared with come from, by their names.
        settings: the task's config: model and data of that one, ``eval`` of the command line.
    """

    all: Mapping[str, Bundle]
    evaluated: str
    folders: Mapping[str, str]
    settings: ConfigDict

    @property
    def network(self) -> Bundle:
        """The one that is evaluated."""
        return self.all[self.evaluated]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return which weights these are, and how they were trained, for the result."""
        return {
            name: {
                "fingerprint": network.fingerprint(),
                **{key: network.run[key] for key in _ORIGIN if key in network.run},
                **({"folder": self.folders[name]} if name in self.folders else {}),
                "config": workdirs.training(network.config),
            }
            for name, network in self.all.items()
        }


def trained_name(config: ConfigDict) -> str:
    """Return how rows name the network of a config: by what it was trained with."""
    return SUPERVISED[config.optim.loss] if config.targets.kind == "labels" else NAT


def seeds_of(config: ConfigDict, workdir: Path) -> tuple[int, ...]:
    """Return the seeds to evaluate: those of the config that the run has; of a bundle, its own.

    Raises:
        InputError: the run has none of them.
    """
    where = _where(config, workdir)
    if is_bundle(where):
        return (int(load_network(where).run["seed"]),)
    saved = workdirs.read_json(where / "config.json")
    if saved is None:
        return tuple(config.seeds)
    common = tuple(seed for seed in config.seeds if seed in saved["seeds"])
    if not common:
        raise InputError(
            f"seeds: the run in {where} has {tuple(saved['seeds'])}; got {config.seeds}. Name some "
            f"of them, as in --config.seeds='({saved['seeds'][0]},)'"
        )
    if len(common) < len(saved["seeds"]):
        logger.info("evaluating seed %s of the run's %s", common, tuple(saved["seeds"]))
    return common


def load_networks(config: ConfigDict, workdir: Path, seed: int) -> Networks:
    """Load the networks of a task, for one seed.

    Args:
        config: ``network`` names the one that is evaluated, see ``loading.network_of``;
            ``eval.compare`` the folders of others, of whose seeds the first is taken.
        workdir: the task's folder.
        seed: which of a run's seeds.

    Raises:
        InputError: there is no such network, or one of the others takes other images or is named
            twice.
        BundleError, CheckpointError: see ``loading.load_network``.
    """
    network = network_of(config, workdir, seed=seed)
    settings = task_config(config, network)
    name = UNTRAINED if not network.run["step"] else trained_name(settings)
    found = {UNTRAINED: network if name == UNTRAINED else _untrained(network), name: network}
    folders: dict[str, str] = {}
    for folder in config.eval.compare:
        other = load_network(folder)
        if other.transform != network.transform:
            raise InputError(
                f"eval.compare: expected a network for images of {network.model.image_size} pixels "
                f"with data.resize = {network.resize} and data.white = {network.white}, as the "
                f"evaluated one; {folder} takes {other.model.image_size} with {other.resize} and "
                f"{other.white}"
            )
        named = _name(other, config, folder, found)
        found[named], folders[named] = other, str(folder)
    return Networks(found, name, folders, settings)


def data_of(network: Bundle, config: ConfigDict, open_source: Callable[..., Source]) -> str:
    """Return where the data that a network was trained on lies now.

    That is the command line's source if it has the same records, else the one of training.

    Args:
        network: trained or not.
        config: the task's, whose ``data.source`` may name another place.
        open_source: opens a source by its name, split and ``per_class``.

    Raises:
        InputError: it is in neither; the message names the keys to set.
    """
    settings, wanted = task_config(config, network), config.data.source
    own, trained_on = settings.data.source, network.run.get("data")
    if trained_on is None and wanted == own:
        return own
    reason = ""
    if trained_on is not None and wanted != own:
        try:
            found = open_source(wanted, per_class=settings.data.per_class)
            if found.fingerprint == trained_on:
                return wanted
            reason = f"; {wanted} has other records"
        except ValueError as error:  # what is not there matters only if the other is not
            reason = f"; {error}"
    try:
        open_source(own, "test")
    except ValueError as error:
        raise InputError(
            f"{error}. The network was trained on that{reason}; say where it lies now with "
            "--config.data.source=..., or evaluate on other data with --config.eval.source=..."
        ) from error
    return own


def _where(config: ConfigDict, workdir: Path) -> Path:
    named = config.network if config.network != UNTRAINED else ""
    return Path(named or workdir).expanduser()


def _untrained(network: Bundle) -> Bundle:
    config = workdirs.of_run(network.config, configs.default())
    return untrained_network(config, network.run["seed"])


def _name(network: Bundle, config: ConfigDict, folder: str, taken: Mapping[str, Bundle]) -> str:
    """Name a network by its kind, with as much of its path as tells it from the others."""
    kind = trained_name(task_config(config, network)) if network.run["step"] else UNTRAINED
    if kind not in taken:
        return kind
    place = Path(folder).expanduser().resolve()
    for depth in range(1, len(place.parts)):
        name = f"{kind}: {'/'.join(place.parts[-depth:])}"
        if name not in taken:
            return name
    raise InputError(f"eval.compare: expected each folder once; got {folder} again")
