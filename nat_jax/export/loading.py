"""Networks for evaluation or export, from a run's folder, from a bundle, or untrained."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import models, optim
from nat_jax.errors import InputError
from nat_jax.export.bundle import Bundle, is_bundle, load
from nat_jax.runtime import sharding
from nat_jax.train_step import create_state
from nat_jax.training import checkpoint
from nat_jax.training import workdir as workdirs

UNTRAINED = "untrained"

logger = logging.getLogger(__name__)

_DATA = ("num_records", "data", "targets")  # of a checkpoint's record: what it was trained on


def load_network(
    where: str | os.PathLike[str], *, seed: int | None = None, untrained: bool = False
) -> Bundle:
    """Return the network of a run or a bundle, in memory; nothing on disk is changed.

    Of a run it is the newest good checkpoint's, which may be training still.

    Args:
        where: a run's folder (``--workdir``), or a bundle's.
        seed: which of a run's seeds; its first if None.
        untrained: the same network before its first step instead.

    Raises:
        ValueError: there is neither a run nor a bundle, or the run has no such seed.
        BundleError: the bundle is damaged or of another version.
        CheckpointError: the run has no good checkpoint.
    """
    folder = Path(where).expanduser()
    if is_bundle(folder):
        bundle = load(folder)
        if seed is not None and seed != bundle.run["seed"]:
            raise InputError(
                f"seeds: {folder} is a bundle of seed {bundle.run['seed']}; got {seed}"
            )
        if untrained:
            return untrained_network(_config_of(bundle.config), bundle.run["seed"])
        return bundle
    saved = workdirs.read_json(folder / "config.json")
    if saved is None:
        raise InputError(
            f"{folder} holds neither a run (config.json) nor a bundle (bundle.json). Train first "
            "(the same line without --config.task), name another --workdir, or set "
            "--config.network=untrained"
        )
    config = _config_of(saved)
    if seed is None:
        seed = config.seeds[0]
    if seed not in config.seeds:
        raise InputError(
            f"seeds: the run in {folder} has {config.seeds}; got {seed}. Name one of them, as in "
            f"--config.seeds='({config.seeds[0]},)'"
        )
    if untrained:
        return untrained_network(config, seed)
    return _trained(config, saved, seed, workdirs.seed_folder(config, folder, seed))


def untrained_network(config: ConfigDict, seed: int) -> Bundle:
    """Return the network with which a run of this config and seed begins."""
    model = _model(config)
    # Only the weights are kept: what the optimiser and the permutation are makes no difference.
    state = create_state(
        model,
        optim.Optimizer(learning_rate=1.0),
        jnp.zeros(1, jnp.int32),
        jax.random.fold_in(jax.random.key(seed), 0),
    )
    weights = jax.device_get((state.params, state.batch_stats))
    return _bundle(config, model, *weights, run={"seed": seed, "step": 0})


def network_of(config: ConfigDict, workdir: Path, *, seed: int | None = None) -> Bundle:
    """Return the network that a task's config names.

    Args:
        config: ``network`` is "" for the run in the workdir, "untrained" for that run's network
            before training (or this config's, if there is no run), or a bundle's or run's folder.
        workdir: the task's folder.
        seed: which of a run's seeds, its first if None; a bundle has one alone.

    Raises:
        ValueError: see ``load_network``, which raises BundleError and CheckpointError too.
    """
    if config.network != UNTRAINED:
        where = config.network or workdir
        return load_network(where, seed=None if is_bundle(where) else seed)
    if (Path(workdir) / "config.json").exists():
        return load_network(workdir, seed=seed, untrained=True)
    return untrained_network(config, config.seeds[0] if seed is None else seed)


def task_config(config: ConfigDict, network: Bundle) -> ConfigDict:
    """Return the config of a task that uses a network.

    Model, targets and data are those that the network was trained with; the task, ``eval``, and how
    data is read are the command line's.
    """
    return workdirs.of_run(network.config, config)


def _config_of(saved: Mapping[str, Any]) -> ConfigDict:
    return workdirs.of_run(saved, configs.default())


def _model(config: ConfigDict) -> models.Model:
    return models.make_model(**configs.model_arguments(config))


def _trained(config: ConfigDict, saved: Mapping[str, Any], seed: int, folder: Path) -> Bundle:
    model = _model(config)
    params, batch_stats = jax.eval_shape(model.init, jax.random.key(0))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = sharding.abstract({"params": params, "batch_stats": batch_stats}, here)
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints", read_only=True)
    try:
        state, step, meta = checkpoints.restore_parts(wanted)
    finally:
        checkpoints.close()
    logger.info("%s: step %d, seed %d", folder, step, seed)
    run = {"seed": seed, "step": step, **{key: meta[key] for key in _DATA}}
    weights = jax.device_get((state["params"], state["batch_stats"]))
    return _bundle(config, model, *weights, run=run)


def _bundle(
    config: ConfigDict,
    model: models.Model,
    params: models.Params,
    batch_stats: models.Params,
    *,
    run: Mapping[str, Any],
) -> Bundle:
    return Bundle(
        model,
        params,
        batch_stats,
        arguments=configs.model_arguments(config),
        resize=config.data.resize,
        white=config.data.white,
        config=configs.to_dict(config),
        run=run,
    )
