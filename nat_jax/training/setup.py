"""Construction of one seed's run from a config: records, network, targets and state."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import models, optim, targets
from nat_jax.errors import InputError
from nat_jax.input import pipeline
from nat_jax.input.device_images import DeviceImages
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Source, open_source
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, TrainState, create_state, state_shardings
from nat_jax.training import checkpoint, host_matching
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)


class Sources(NamedTuple):
    """Sources of images: for training, and for the probes to train and test on."""

    train: Source
    probe_train: Source
    probe_test: Source


@dataclasses.dataclass(frozen=True)
class Run:
    """One seed's training: its data, computation, length and folder."""

    config: ConfigDict
    seed: int
    workdir: Path
    sources: Sources
    cache: ImageCache
    step: Step
    targets: targets.Targets
    steps_per_epoch: int
    total_steps: int

    def reassigns(self, step: int) -> bool:
        """Return whether a step reassigns its batch, as those of epochs 0, 3, 6, ... do.

        With labels, the assignment is unused.
        """
        if self.step.supervised or self.step.scope == "dataset":
            return False
        return self._is_due(step // self.steps_per_epoch)

    def matches_all_before(self, step: int) -> bool:
        """Return whether all images are matched before a step, the first after epoch 0, 3, 6, ...

        They are not after the last epoch, as nothing would be trained with the result; a run that
        is extended does it first.
        """
        epochs, done = divmod(step, self.steps_per_epoch)
        return self.step.scope == "dataset" and not done and epochs > 0 and self._is_due(epochs - 1)

    def _is_due(self, epoch: int) -> bool:
        every = self.config.assign.reassign_every_epochs
        return every > 0 and epoch % every == 0

    def identity(self) -> dict[str, Any]:
        """Return the entries of a checkpoint's ``meta`` that must equal this run's."""
        return {
            "num_records": len(self.sources.train),
            "dim": self.step.model.dim,
            "targets": self.config.targets.kind,
            "seed": self.seed,
            "data": self.sources.train.fingerprint,
        }


def open_sources(config: ConfigDict) -> Sources:
    """Open the sources for training and for the probes.

    Raises:
        InputError: a source that is unknown, missing or malformed, or fewer records than a batch.
    """
    few = config.data.per_class
    train = open_source(config.data.source, "train", per_class=few)
    pipeline.steps_per_epoch(len(train), config.batch_size)
    test_spec = config.eval.source or config.data.source
    test = open_source(test_spec, "test")
    probe_spec = config.eval.train_source or test_spec
    same = probe_spec == config.data.source
    probe_train = train if same else open_source(probe_spec, "train")
    return Sources(train, probe_train, test)


def set_up(
    config: ConfigDict,
    seed: int,
    workdir: Path,
    *,
    mesh: Mesh,
    sources: Sources,
    cache: ImageCache,
) -> Run:
    """Return one seed's run from a config."""
    steps_per_epoch = pipeline.steps_per_epoch(len(sources.train), config.batch_size)
    total_steps = configs.steps_from(config, "", steps_per_epoch)
    settings = config.optim
    _check_classes(config, sources.train)
    optimizer = optim.Optimizer(
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        decay_start=settings.decay_start,
        gamma=settings.gamma,
        warmup_steps=configs.steps_from(config, "optim.warmup_", steps_per_epoch),
        total_steps=total_steps if settings.schedule == "cosine" else 0,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    platform = mesh.devices.flat[0].platform
    model = make_model(config, platform)
    whole = config.assign.scope == "dataset"
    step = Step(
        model=model,
        optimizer=optimizer,
        mesh=mesh,
        loss=config.optim.loss,
        supervised=config.targets.kind == "labels",
        solver=config.assign.solver,
        solver_options=tuple(sorted(config.assign.options.items())),
        block=config.assign.block,
        scope=config.assign.scope,
        placement=host_matching.resolve(config.assign.placement, platform),
        storage=sharding.permutation_storage(
            config.assign.storage, len(sources.train), mesh, dim=config.model.dim if whole else 0
        )[0],
    )
    noise, storage = targets.make_targets(
        config.targets.kind,
        len(sources.train),
        config.model.dim,
        jax.random.fold_in(jax.random.key(seed), 1),
        storage=config.targets.storage,
        sharding=sharding.over_data(mesh),
    )
    logger.info(
        "seed %d%s: %s images, %s steps of %d on %d x %s, targets on the %s (%s), in %s",
        seed,
        f" ({config.seeds.index(seed) + 1} of {len(config.seeds)})" if config.seeds[1:] else "",
        f"{len(sources.train):,}",
        f"{total_steps:,}",
        config.batch_size,
        mesh.size,
        platform,
        config.targets.kind,
        storage,
        workdir,
    )
    return Run(config, seed, workdir, sources, cache, step, noise, steps_per_epoch, total_steps)


def _check_classes(config: ConfigDict, train: Source) -> None:
    if config.targets.kind != "labels":
        return
    if train.num_classes is None:
        raise InputError(
            f"targets.kind: 'labels' needs a class for every record; {train.name} has none. Train "
            "without labels: --config.targets.kind=sphere"
        )
    if train.labels is not None and (without := int(np.sum(train.labels < 0))):
        raise InputError(
            f"targets.kind: 'labels' needs a class for every record; {without} of {len(train)} "
            f"records of {train.name} have none. Leave these out, or train without labels: "
            "--config.targets.kind=sphere"
        )
    if config.model.dim != train.num_classes:
        raise InputError(
            f"model.dim: expected the number of classes of {train.name}, {train.num_classes}, with "
            f"targets.kind='labels'; got {config.model.dim}"
        )


def make_model(config: ConfigDict, platform: str) -> models.Model:
    """Return the config's network."""
    return models.make_model(**configs.model_arguments(config), platform=platform)


def place_images(run: Run) -> DeviceImages | None:
    """Copy the training images to the devices if they are augmented there, else return None.

    Raises:
        InputError: ``data.augment_on`` is "device", but the images are not kept in memory.
    """
    data, mesh, source = run.config.data, run.step.mesh, run.sources.train
    on_host = data.augment_on == "auto" and mesh.devices.flat[0].platform == "cpu"
    transform = configs.train_transform(run.config)
    if on_host or data.augment_on == "host" or transform.colors:
        return None
    images = pipeline.read_all(
        source, transform, run.cache, threads=data.threads, timeout=data.timeout
    )
    if images is not None:
        return DeviceImages(images, transform.pad, mesh)
    if data.augment_on == "device":
        raise InputError(
            "data.augment_on: expected 'host' or 'auto', as the images of "
            f"{source.name} are not kept in memory (1 GiB at most, and no random crops); got "
            "'device'"
        )
    return None


def initial_state(run: Run) -> TrainState:
    """Return a run's state before its first step, on the devices of its mesh."""
    create = first_state(run.step, run.config.targets.kind, len(run.sources.train))
    return create(jax.random.key(run.seed))


@functools.cache
def first_state(step: Step, kind: str, number: int) -> Callable[[jax.Array], TrainState]:
    """Return a compiled function of a seed's key that returns a state; all seeds share it.

    Args:
        step: the settings.
        kind: of targets.
        number: of training images.
    """
    _, length = sharding.permutation_storage(step.storage, number, step.mesh)

    def create(key: jax.Array) -> TrainState:
        assignment = targets.initial_assignment(
            kind, number, jax.random.fold_in(key, 2), length=length
        )
        return create_state(
            step.model, step.optimizer, assignment, jax.random.fold_in(key, 0), step.scope
        )

    return jax.jit(create, out_shardings=state_shardings(step))


def restore_or_create(run: Run, checkpoints: checkpoint.Checkpoints) -> TrainState:
    """Return the state of the newest good checkpoint, or the initial one if there is none.

    Raises:
        CheckpointError: the checkpoints are damaged or belong to another run.
    """
    if checkpoints.latest_step() is None:
        return initial_state(run)
    shapes = jax.eval_shape(lambda: initial_state(run))
    abstract = sharding.abstract(shapes, state_shardings(run.step))
    state, meta = checkpoints.restore(abstract, expect=run.identity())
    workdirs.check_same_run(meta["config"], run.config, run.workdir)
    done = int(state.step)
    if done == run.total_steps:
        logger.info("finished %s: all %d steps are done", run.workdir, done)
    else:
        logger.info("resumed %s at step %d of %d", run.workdir, done, run.total_steps)
    return state
