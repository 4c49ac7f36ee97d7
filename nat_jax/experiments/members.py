"""The runs of a suite: every experiment, value and seed; identical trainings are one run."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax.cli import config_files
from nat_jax.errors import InputError
from nat_jax.experiments import scales
from nat_jax.training import workdir as workdirs

# In the order in which each seed's are run: those that most claims need come first.
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

# Keys of ``eval`` of which a shared run has the union over its members.
_JOINED = ("layers", "probes", "baselines")

# Keys of a suite that its runs do not inherit.
_OWN = ("task", "suite.scale", "suite.experiments")


class Member(NamedTuple):
    """One place in a suite's tables: an experiment, a value of its sweep or "", a seed."""

    experiment: str
    value: str
    seed: int


class Planned(NamedTuple):
    """A run: its config, its folder below the suite's, and the members that use it."""

    config: ConfigDict
    folder: str
    members: tuple[Member, ...]


def values_of(experiment: str, scale: str) -> tuple[str, ...]:
    """Return the values of an experiment's sweep; ("",) if it has none."""
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
    if not suite.eval.probes:
        raise InputError("eval.probes: expected at least one for task suite; got none")
    for name in names:
        if name not in EXPERIMENTS:
            raise InputError(
                f"suite.experiments: unknown {name!r}. Known: {', '.join(EXPERIMENTS)}"
            )
    members = _members(scale, [name for name in EXPERIMENTS if name in names], suite)
    runs: dict[str, Planned] = {}
    for member, config in sorted(members, key=lambda pair: pair[0].seed):
        key = json.dumps(workdirs.training(config), sort_keys=True)
        if key in runs:
            shared = runs[key].config.eval
            for name in _JOINED:
                shared[name] = tuple(dict.fromkeys((*shared[name], *config.eval[name])))
            runs[key] = runs[key]._replace(members=(*runs[key].members, member))
        else:
            value = f"{member.value}-" if member.value else ""
            folder = str(Path(member.experiment) / f"{value}seed{member.seed}")
            runs[key] = Planned(config, folder, (member,))
    return list(runs.values())


def _members(
    scale: str, experiments: list[str], suite: ConfigDict
) -> Iterator[tuple[Member, ConfigDict]]:
    """Yield the members of a suite with the config that each would have by itself."""
    base = configs.flatten(scales.base(scale))
    changes: Mapping[str, Any] = {
        key: value
        for key, value in configs.flatten(suite).items()
        if key not in _OWN and base.get(key) != value
    }
    for name in experiments:
        for value in values_of(name, scale):
            config: ConfigDict = _load(name).get_config(f"{scale},{value}" if value else scale)
            before = configs.flatten(config)
            for key, changed in changes.items():
                if before.get(key) == base.get(key):
                    configs.put(config, key, changed)
            for seed in config.seeds:
                of_seed = config.copy_and_resolve_references()
                of_seed.seeds = (seed,)
                yield Member(name, value, seed), of_seed


def _load(experiment: str) -> ModuleType:
    return config_files.load(f"paper/{experiment}.py")
