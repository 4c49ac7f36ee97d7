"""The configuration: its defaults, its checks, and what follows from it.

What a single key means and may be is in ``schema``; here are the rules that several keys obey
together. ``validate`` finds every mistake that can be found without touching a device or a record.
What needs NumPy or JAX is imported where it is used, so that config files load quickly.
"""

import functools
import importlib.util
import inspect
import math
import numbers
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict, config_dict

from nat_jax.errors import InputError
from nat_jax.schema import KEYS, RENAMED, Key, renamed

if TYPE_CHECKING:
    from nat_jax.input.transforms import Transform


_OPTIONS = tuple(f"{name}." for name, key in KEYS.items() if key.type is dict)
_MAY_BE_ZERO = ("optim.warmup_",)


class Config(ConfigDict):
    """A ConfigDict in which old names of keys stand for the new ones."""

    def _current(self, key: Any) -> Any:
        if key not in self:
            for old, new in RENAMED.items():
                name = new.rpartition(".")[2]
                if key == old.rpartition(".")[2] and name in self:
                    return name
        return key

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(self._current(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(self._current(key), value)


def default() -> Config:
    """Return the defaults: the paper's method on the digits that ship with scikit-learn."""
    config = Config()
    for name, key in KEYS.items():
        group, _, last = name.rpartition(".")
        if group and group not in config:
            config[group] = Config()
        node = config[group] if group else config
        if key.type is dict:
            node[last] = ConfigDict()
        else:
            node[last] = config_dict.placeholder(int) if key.default is None else key.default
    config.lock()  # a misspelt key fails where it is set
    for name, key in KEYS.items():
        if key.type is dict:
            config[name].unlock()
    return config


def put(config: ConfigDict, key: str, value: Any) -> None:
    """Set a flat key such as "optim.momentum"; a list becomes a tuple, as configs have them.

    Raises:
        InputError: the config has no such key.
    """
    group, _, last = key.rpartition(".")
    if key not in KEYS and group not in KEYS:  # an option's group is a key
        raise InputError(
            f"config.json: unknown key {key!r}; the run was made by another version of nat_jax. "
            "Use that one"
        )
    node = config[group] if group else config
    node[last] = tuple(value) if isinstance(value, list) else value


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return {"group.key": value}; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def flatten_saved(saved: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Return the flat keys of a config that may be saved by an older version, by today's names."""
    return {RENAMED.get(key, key): value for key, value in flatten(saved).items()}


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Return nested plain dicts and lists, ready for JSON."""
    return {
        key: to_dict(value)
        if isinstance(value, ConfigDict)
        else (list(value) if isinstance(value, tuple) else value)
        for key, value in config.items()
    }


def steps_from(config: ConfigDict, name: str, steps_per_epoch: int) -> int:
    """Return a duration in steps, given in a config as ``<name>epochs`` or ``<name>steps``.

    Args:
        config: the complete config.
        name: what the two keys have in common, for instance ``checkpoint.every_``; may be empty.
        steps_per_epoch: steps in one pass over the data.

    Returns:
        At least 1; 0 if both keys are 0, which only a warm-up may be.

    Raises:
        InputError: both are set, one is negative, or both are 0 where a duration is needed.
    """
    flat = flatten(config)
    epochs, steps = flat[f"{name}epochs"], flat[f"{name}steps"]
    if not 0 <= epochs < math.inf or steps < 0:
        raise InputError(f"{name}epochs and {name}steps: expected 0 or more; got {epochs}, {steps}")
    if (epochs and steps) or not (epochs or steps or name in _MAY_BE_ZERO):
        raise InputError(
            f"expected exactly one of {name}epochs and {name}steps above 0; got {epochs} and "
            f"{steps}. Set one, and the other to 0 (--config.{name}epochs=0)"
        )
    if not (epochs or steps):
        return 0
    return steps or max(1, round(epochs * steps_per_epoch))


def model_arguments(config: ConfigDict) -> dict[str, Any]:
    """Return what ``models.make_model`` takes, but for the platform, as JSON has it."""
    settings = config.model
    return {
        "name": settings.name,
        "dim": settings.dim,
        "image_size": config.data.image_size,
        "frontend": settings.frontend,
        "dtype": settings.dtype,
        "bn_groups": settings.bn_groups,
        **to_dict(settings.options),
    }


def reading(config: ConfigDict) -> dict[str, Any]:
    """Return how a config's images are read, as arguments of ``pipeline``."""
    return {key: config.data[key] for key in ("threads", "workers", "prefetch", "timeout")}


def train_transform(config: ConfigDict, *, colors: bool = True) -> "Transform":
    """Return the transform of training images.

    Args:
        config: the complete config.
        colors: also change their colours, which probes do not, as SimCLR's do not.

    Raises:
        InputError: the settings in group ``data`` do not fit together.
    """
    from nat_jax.input import transforms
    from nat_jax.input.color_jitter import ColorJitter

    data = config.data
    jitter = ColorJitter(data.color_jitter, data.grayscale)
    try:
        return transforms.train_transform(
            image_size=data.image_size,
            resize=data.resize,
            pad=data.pad,
            flip=data.flip,
            crop=data.crop,
            min_area=data.min_area,
            colors=jitter if colors and jitter != ColorJitter() else None,
            white=data.white,
        )
    except ValueError as error:
        raise InputError(f"data: {error}") from error


def validate(config: ConfigDict, probes: Collection[str]) -> None:
    """Check everything that needs neither devices nor records.

    Args:
        config: the config to check.
        probes: the names of the known probes.

    Raises:
        InputError: one message for the first mistake: the key, what is expected, what it is.
    """
    _check_names(config)
    flat = flatten(config)
    for probe in flat["eval.probes"]:
        if isinstance(probe, str) and "," in probe:
            raise InputError(
                f"eval.probes: got {probe!r}; write several as "
                "--config.eval.probes=\"('knn', 'linear_probe')\""
            )
    for name, key in KEYS.items():
        if key.type is not dict:
            _check_value(key, flat[name], probes if name == "eval.probes" else key.known())
    for name in ("", "checkpoint.every_", "optim.warmup_"):
        steps_from(config, name, 1)
    _check_run(config)
    _check_data(config)
    _check_optimizer(config)
    _check_batch(config)
    _check_scope(config)
    _check_solver_options(config)
    for amount in config.eval.few_labels:
        if not amount > 0 or (amount >= 1 and amount != int(amount)):
            raise InputError(
                "eval.few_labels: expected shares in (0, 1) and numbers of labels per class from 1 "
                f"on; got {amount}"
            )
    if config.log.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "log.tensorboard: needs tensorboardX, which is not installed: "
            "pip install 'nat_jax[tensorboard]', or set --config.log.tensorboard=False"
        )


def check_devices(config: ConfigDict, mesh_shape: Mapping[str, int], processes: int) -> None:
    """Check what depends on the number of devices and processes.

    Raises:
        InputError: the global batch cannot be divided evenly among them.
    """
    for count, what in ((math.prod(mesh_shape.values()), "devices"), (processes, "processes")):
        if config.batch_size % count:
            below = config.batch_size // count * count
            hint = f"{below} or {below + count}" if below else f"{count}"
            raise InputError(
                f"batch_size: expected a multiple of the {count} {what}; got "
                f"{config.batch_size}. Set --config.batch_size={hint}"
            )


def _check_names(config: ConfigDict) -> None:
    for name, value in flatten(config).items():
        if name in RENAMED:
            raise InputError(renamed(name))
        if name in KEYS and value is None and KEYS[name].default is not None:
            raise InputError(f"{name}: expected a value such as {KEYS[name].default!r}; got None")
        if name not in KEYS and not name.startswith(_OPTIONS):
            group = name.rpartition(".")[0]
            siblings = [known for known in sorted(KEYS) if known.rpartition(".")[0] == group]
            raise InputError(f"config: unknown key {name!r}. Known there: {', '.join(siblings)}")


def _check_value(key: Key, value: Any, known: Collection[str]) -> None:
    """Check one key's value, or the entries of a tuple, against the schema."""
    entries = [value]
    if isinstance(key.default, tuple):
        entries = value
        _check_entries(key, entries)
    for entry in entries:
        if known and entry not in known:
            raise InputError(f"{key.name}: unknown {entry!r}. Known: {', '.join(known)}")
        if None not in (key.least, entry) and entry < key.least:
            raise InputError(f"{key.name}: expected at least {key.least}; got {entry}")


def _check_entries(key: Key, entries: Collection[Any]) -> None:
    """Check that a tuple holds words, whole numbers or numbers, as its default does."""
    types = {type(entry) for entry in key.default} or {str}
    kind: type = numbers.Integral
    what = "whole numbers"
    if str in types:
        kind, what = str, "words"
    elif float in types:
        kind, what = numbers.Real, "numbers"
    for entry in entries:
        if not isinstance(entry, kind):
            example = key.default or ("a", "b")
            raise InputError(
                f"{key.name}: expected {what}, for instance "
                f'--config.{key.name}="{example}"; got {entry!r}'
            )
    if not entries and not key.optional:
        raise InputError(f"{key.name}: expected at least one; got none")


def _check_run(config: ConfigDict) -> None:
    if config.network and config.task == "pretrain":
        raise InputError(
            "network: expected nothing when training, which starts from random weights; got "
            f"{config.network!r}"
        )
    if len(set(config.seeds)) != len(config.seeds) or not all(0 <= s < 2**32 for s in config.seeds):
        raise InputError(f"seeds: expected distinct integers in [0, 2**32); got {config.seeds}")


def _check_data(config: ConfigDict) -> None:
    data = config.data
    for name in ("color_jitter", "grayscale"):
        if not 0 <= data[name] <= 1:
            raise InputError(f"data.{name}: expected a number from 0 to 1; got {data[name]}")
    if not data.timeout > 0:
        raise InputError(f"data.timeout: expected seconds above 0; got {data.timeout}")
    if 0 < data.resize < data.image_size:
        raise InputError(
            f"data.resize: expected 0 or at least data.image_size = {data.image_size}; "
            f"got {data.resize}"
        )
    if train_transform(config).colors and data.augment_on == "device":
        raise InputError(
            "data.augment_on: expected 'host' or 'auto' with data.color_jitter or data.grayscale, "
            "as colours change on the host; got 'device'"
        )


def _check_optimizer(config: ConfigDict) -> None:
    settings = config.optim
    if settings.loss == "softmax" and config.targets.kind != "labels":
        raise InputError(
            "optim.loss: 'softmax' is for supervised training; expected targets.kind = 'labels', "
            f"got {config.targets.kind!r}"
        )
    if not settings.learning_rate > 0 or not math.isfinite(settings.learning_rate):
        raise InputError(
            f"optim.learning_rate: expected a positive number; got {settings.learning_rate}"
        )
    decays = settings.gamma > 0 or settings.decay_start > 0
    if settings.schedule == "inverse" and not settings.gamma > 0:
        raise InputError(
            "optim.gamma: expected a number above 0 with schedule 'inverse'; got "
            f"{settings.gamma}. The paper does not publish its own"
        )
    if settings.schedule != "inverse" and decays:
        raise InputError(
            "optim.gamma and optim.decay_start belong to schedule 'inverse'; got "
            f"{settings.gamma} and {settings.decay_start} with {settings.schedule!r}"
        )


def _check_batch(config: ConfigDict) -> None:
    """Check into what a batch is divided: blocks, devices, parts with their own statistics."""
    batch, block, groups = config.batch_size, config.assign.block, config.model.bn_groups
    if block is not None and block > batch:
        raise InputError(
            f"assign.block: expected at most batch_size = {batch}; got {block}. "
            "Lower assign.block or raise batch_size"
        )
    for name, parts in (("assign.block", block), ("model.bn_groups", groups)):
        if parts is not None and (parts < 1 or batch % parts):
            raise InputError(
                f"{name}: expected a positive divisor of batch_size = {batch}; got {parts}"
            )
    for name, size in config.mesh.items():
        if size < 1 and size != -1:
            raise InputError(
                f"mesh.{name}: expected devices, or -1 for all that are left; got {size}"
            )
    if config.mesh.data == config.mesh.model == -1:
        raise InputError("mesh.data and mesh.model: expected -1 for one at the most; got it twice")


def _check_scope(config: ConfigDict) -> None:
    """Check that nothing is set that matching of all images together does not use."""
    if config.assign.scope == "batch":
        return
    flat = flatten(config)
    for key, expected in {
        "assign.solver": ("auction",),
        "assign.block": (None,),
        "assign.placement": ("auto", "device"),
        "targets.kind": ("sphere", "basis"),
    }.items():
        if flat[key] not in expected:
            raise InputError(
                f"{key}: expected {' or '.join(map(repr, expected))} with assign.scope = 'dataset',"
                " where nat_jax.assign.match_points matches all images on the devices; got "
                f"{flat[key]!r}. Set --config.{key}={expected[0]} or --config.assign.scope=batch"
            )
    if not config.assign.reassign_every_epochs:
        raise InputError(
            "assign.reassign_every_epochs: expected 1 or more with assign.scope = 'dataset', which "
            "keeps features for matching; got 0. To never match, set --config.assign.scope=batch"
        )


def _check_solver_options(config: ConfigDict) -> None:
    import jax

    from nat_jax import assign

    name, solve = config.assign.solver, assign.SOLVERS[config.assign.solver]
    known = inspect.signature(solve).parameters
    mine = [key for key in known if key not in ("cost", "maximize", "prices")]
    if config.assign.scope == "dataset":
        name, solve, mine = "match_points", _match_no_points, ["budget"]
    for option in config.assign.options:
        if option not in mine:
            raise InputError(
                f"assign.options: {name} has no option {option!r}. Known: "
                f"{', '.join(mine) or 'none'}"
            )
    solve = functools.partial(solve, **config.assign.options)
    try:
        jax.eval_shape(solve, jax.ShapeDtypeStruct((0, 0), "float32"))  # runs the solver's checks
    except (TypeError, ValueError) as error:
        raise InputError(f"assign.options: {error}") from error


def _match_no_points(cost: Any, **options: Any) -> Any:
    import numpy as np

    from nat_jax import assign

    return assign.match_points(*np.zeros((2, 0, 1)), **options).col4row
