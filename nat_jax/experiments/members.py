"""The runs of a suite: every experiment, value and seed; what is trained alike is one run."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax.cli import config_files
from nat_jax.errors import InputError
from nat_jax.experiments import scales
from nat_jax.training import workdir as workdirs

# In the order in which a seed's are run: what most claims rest on comes first.
EXPERIMENTS = (
    "table3_imagenet",
    "fig2_period",
    "discrete_targets",
    "table1_softmax",
    "table1_square",
    "table2_clean",
    "table2_highpass",
    "table2_sobel",
    "fig2_epochs",
)

# What a run is asked to judge is the union of what its members ask for.
_JOINED = ("layers", "probes", "baselines")

# Keys of a suite that are its own.
_OWN = ("task", "suite.scale", "suite.experiments")


class Member(NamedTuple):
    """One place in a suite's tables: an experiment, a value of its sweep or "", a seed."""

    experiment: str
    value: str
    seed: int


class Planned(NamedTuple):
    """A run: its config, its folder below the suite's, and the members that it serves."""

    config: ConfigDict
    folder: str
    members: tuple[Member, ...]


def values_of(experiment: str, scale: str) -> tuple[str, ...]:
    """Return the values of an experiment's sweep; ("",) for one that is none."""
    module = _load(experiment)
    return tuple(map(str, module.values(scale))) if hasattr(module, "values") else ("",)


def plan(suite: ConfigDict) -> list[Planned]:
    """Return the runs of a suite, seed by seed.

    Args:
        suite: its config. A key that differs from the scale's base is set in every run whose
            experiment leaves it as the base has it.

    Raises:
        ValueError: unknown scale or experiment.
    """
    scale, names = suite.suite.scale, tuple(suite.suite.experiments) or EXPERIMENTS
    if scale not in scales.SMALL:
        raise InputError(f"suite.scale: unknown {scale!r}. Known: {', '.join(scales.SMALL)}")
    for name in names:
        if name not in EXPERIMENTS:
            raise InputError(
                f"suite.experiments: unknown {name!r}. Known: {', '.join(EXPERIMENTS)}"
            )
    base = scales.base(scale)
    changes = _changes(base, suite)
    members = [
        (Member(name, value, seed), config)
        for name in EXPERIMENTS
        if name in names
        for value in values_of(name, scale)
        for config in (_member_config(name, value, scale, base, changes),)
        for seed in config.seeds
    ]
    return _shared(sorted(members, key=lambda pair: pair[0].seed))


def _member_config(
    name: str, value: str, scale: str, base: ConfigDict, changes: Mapping[str, Any]
) -> ConfigDict:
    config: ConfigDict = _load(name).get_config(f"{scale},{value}" if value else scale)
    own, before = configs.flatten(config), configs.flatten(base)
    for key, changed in changes.items():
        if own.get(key) == before.get(key):
            workdirs.put(config, key, changed)
    return config


def _changes(base: ConfigDict, suite: ConfigDict) -> dict[str, Any]:
    before, after = configs.flatten(base), configs.flatten(suite)
    return {k: v for k, v in after.items() if k not in _OWN and before.get(k) != v}


def _shared(members: Iterable[tuple[Member, ConfigDict]]) -> list[Planned]:
    """Give members that are trained alike one run, which judges all that they ask for."""
    runs: dict[str, Planned] = {}
    for member, asked in members:
        config = asked.copy_and_resolve_references()
        config.seeds = (member.seed,)
        key = json.dumps(workdirs.training(config), sort_keys=True)
        if key not in runs:
            runs[key] = Planned(config, _folder(member), (member,))
            continue
        known = runs[key]
        for name in _JOINED:
            both = (*known.config.eval[name], *config.eval[name])
            known.config.eval[name] = tuple(dict.fromkeys(both))
        runs[key] = known._replace(members=(*known.members, member))
    return list(runs.values())


def _folder(member: Member) -> str:
    value = f"{member.value}-" if member.value else ""
    return str(Path(member.experiment) / f"{value}seed{member.seed}")


def _load(experiment: str) -> ModuleType:
    return config_files.load(f"paper/{experiment}.py")
