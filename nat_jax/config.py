"""The configuration: its defaults, its checks, and what follows from it.

Every key that a run reads is in ``default()``; ``validate`` finds every mistake that can be found
without touching a device or a record.
"""

import importlib.util
import inspect
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from nat_jax import assign, losses, optim, targets
from nat_jax.errors import InputError
from nat_jax.input import transforms
from nat_jax.input.color_jitter import ColorJitter
from nat_jax.input.sources import SPLITS
from nat_jax.runtime import sharding
from nat_jax.setting_checks import at_least, check_eval, check_lists, one_of

LABELS_ALL = 0

_MAY_BE_ZERO = ("optim.warmup_",)


def default() -> ConfigDict:
    """Return the defaults: the paper's method on the digits that ship with scikit-learn."""
    c = ConfigDict()
    c.task = "pretrain"
    c.network = ""  # for other tasks: "" the workdir's | untrained | folder of a bundle or a run
    c.seeds = (0,)  # one independent run each; several share one table (mean and deviation)
    c.epochs = 0.0  # length of the run; exactly one of epochs and steps, the other 0
    c.steps = 0
    c.batch_size = 256  # global: over all devices and processes

    c.data = ConfigDict()
    c.data.source = "digits"  # digits | folder:PATH | arrays:PATH | tfds:NAME | arrayrecord:GLOB
    c.data.per_class = 0  # of its training images only the first so many of each class; 0: all
    c.data.image_size = 8
    c.data.resize = 0  # shortest side before the crop; 0: scale to image_size, whatever the aspect
    c.data.crop = "random_crop"  # of the resized image | random_resized_crop (Inception's)
    c.data.min_area = 0.08  # smallest share of the image that random_resized_crop takes
    c.data.pad = 0  # shift images that are scaled as a whole by up to this many pixels
    c.data.flip = False  # mirror half of the images
    c.data.color_jitter = 0.0  # strength of changes of colour, after SimCLR: there 0.5 on CIFAR-10
    c.data.grey = 0.0  # share of the images that lose their colours; 0.2 in SimCLR
    c.data.views = 1  # images made of each record, sharing its target (above 1: beyond the paper)
    c.data.on_bad_record = "grey"  # grey: keep its place, weight 0, 1 % at most | error
    c.data.threads = 2  # decoding threads per process, over all its workers
    c.data.workers = 0  # processes that decode, for hosts with many cores; 0: threads alone
    c.data.prefetch = 8  # batches prepared ahead, per process
    c.data.timeout = 300.0  # seconds that reading one record may take
    c.data.augment_on = "auto"  # shifts and flips of images in memory: host | device | auto

    c.model = ConfigDict()
    c.model.name = "convnet"
    c.model.dim = 16  # D, the dimension of features and targets
    c.model.frontend = "sobel"  # rgb | highpass | sobel
    c.model.dtype = "float32"  # compute dtype: float32 | bfloat16
    c.model.bn_groups = 1  # parts of the batch, each with batch statistics of its own
    c.model.options = ConfigDict()  # arguments of the network's function

    c.targets = ConfigDict()
    c.targets.kind = "sphere"  # sphere | basis (the paper's discrete targets; k = model.dim) |
    # labels (supervised: one-hot rows of the classes, never re-matched; model.dim is their number)
    c.targets.storage = "auto"  # table | virtual | auto (a table up to 1 GiB)

    c.assign = ConfigDict()
    c.assign.solver = "auction"
    c.assign.reassign_every_epochs = 3  # epochs 0, 3, 6, ... re-match every batch; 0: none
    c.assign.block = config_dict.placeholder(int)  # images matched together; None: the whole batch
    c.assign.placement = "auto"  # who solves: device | host | auto (the host beside GPUs, TPUs)
    c.assign.storage = "auto"  # the permutation: replicated | sharded | auto (sharded from 2**24)
    c.assign.options = ConfigDict()  # arguments of the solver, for instance eps

    c.optim = ConfigDict()
    c.optim.loss = "square"  # on unit features | softmax, on logits (with targets.kind = labels)
    c.optim.learning_rate = 5.12  # on 1/(2n) sum |z-c|^2: the authors' 0.01 on a summed loss
    c.optim.schedule = "constant"  # constant | inverse (the paper's) | cosine
    c.optim.decay_start = 0  # t0 in steps, for inverse
    c.optim.gamma = 0.0  # per step, for inverse
    c.optim.warmup_epochs = 0.0  # linear, from zero; at most one of the two
    c.optim.warmup_steps = 0
    c.optim.momentum = 0.0
    c.optim.weight_decay = 0.0

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices along the batch; -1: all that mesh.model leaves
    c.mesh.model = 1  # devices along the kernels of wide fully connected layers; -1: all others

    c.eval = ConfigDict()
    c.eval.source = ""  # judged on this source's test split; "": data.source
    c.eval.train_source = ""  # probes learn on this source's train split; "": eval.source
    c.eval.every_epochs = 0  # also judge during training; 0: at the end only
    c.eval.probes = ("knn", "linear_probe", "mlp_probe")
    c.eval.layers = ("z", "last_conv")  # names; last_conv: the last convolution; all: every layer
    c.eval.labels_per_class = (LABELS_ALL, 10)  # 0: all labels
    c.eval.max_train = 0  # records that probes learn on, drawn by seed; 0: all
    c.eval.max_features = 9600  # wider conv maps are average-pooled to at most this many values
    c.eval.batch_size = 256
    c.eval.knn_k = 20
    c.eval.knn_ks = (1, 5, 10, 20, 50, 100, 200)  # that the task knn compares
    c.eval.linear_fit = "auto"  # lbfgs | sgd | ridge | auto (lbfgs up to 2 GiB of features, or sgd)
    c.eval.mlp_width = 4096
    c.eval.mlp_epochs = 100
    c.eval.mlp_init = "torch"  # the authors' code | gaussian (the paper's words)
    c.eval.fresh_crops = True  # tasks mlp_probe, linear_probe by sgd: augment anew in each epoch
    c.eval.ten_crops = "auto"  # test them on ten crops: on | off | auto (on with data.resize)
    c.eval.few_labels = (0.01, 0.1, 10)  # task low_shot: shares below 1, else labels per class
    c.eval.few_splits = (0, 1, 2)  # and the seeds of its subsets
    c.eval.baselines = ("pixels",)  # raw pixels | patches (k-means), beside the untrained network
    c.eval.patch_centroids = 1600
    c.eval.beside = ()  # for tasks: folders of other runs or bundles to judge in the same way
    c.eval.queries = 8  # test images of the task retrieval
    c.eval.neighbours = 10  # and training images for each

    c.checkpoint = ConfigDict()
    c.checkpoint.every_epochs = 1.0  # exactly one of the two, the other 0
    c.checkpoint.every_steps = 0
    c.checkpoint.keep = 2

    c.log = ConfigDict()
    c.log.every_steps = 10
    c.log.tensorboard = False  # needs the extra nat_jax[tensorboard]

    c.suite = ConfigDict()  # read by the task `suite` alone
    c.suite.scale = ""  # of the paper's experiments: cifar10 | fashion_mnist | digits
    c.suite.experiments = ()  # which of configs/paper; (): all

    c.convert = ConfigDict()  # read by the task `convert` alone
    c.convert.to = ""  # the folder to write
    c.convert.shard_mb = 1024  # MiB in a shard, about

    c.export = ConfigDict()  # read by the task `export` alone
    c.export.to = ""  # the folder to write; "": bundle, in the workdir
    c.export.program = True  # also a StableHLO program of eval.layers, which needs no nat_jax

    c.features = ConfigDict()  # read by the task `features` alone
    c.features.to = ""  # the folder to write; "": features, in the workdir
    c.features.source = ""  # images to use; "": data.source
    c.features.splits = ("train", "test")  # of that source
    c.lock()  # a misspelt key fails where it is set
    c.model.options.unlock()
    c.assign.options.unlock()
    return c


def steps_from(config: ConfigDict, name: str, steps_per_epoch: int) -> int:
    """Return a duration in steps, given in a config as ``<name>epochs`` or ``<name>steps``.

    Args:
        config: the whole config.
        name: what the two keys have in common, for instance ``checkpoint.every_``; may be empty.
        steps_per_epoch: steps in one pass over the data.

    Returns:
        At least 1; 0 if both keys are 0, which only a warm-up may be.

    Raises:
        ValueError: both are set, one is negative, or both are 0 where a duration is needed.
    """
    flat = flatten(config)
    epochs, steps = flat[f"{name}epochs"], flat[f"{name}steps"]
    if epochs < 0 or steps < 0:
        raise InputError(f"{name}epochs and {name}steps: expected 0 or more; got {epochs}, {steps}")
    if (epochs and steps) or not (epochs or steps or name in _MAY_BE_ZERO):
        raise InputError(
            f"expected exactly one of {name}epochs and {name}steps above 0; got {epochs} and "
            f"{steps}. Set one, and the other to 0 (--config.{name}epochs=0)"
        )
    if not (epochs or steps):
        return 0
    return steps or max(1, round(epochs * steps_per_epoch))


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Return {"group.key": value}; tuples become lists, as JSON has them."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Return nested plain dicts and lists, ready for JSON."""
    return {
        key: to_dict(value)
        if isinstance(value, ConfigDict)
        else (list(value) if isinstance(value, tuple) else value)
        for key, value in config.items()
    }


def validate(config: ConfigDict, probes: Mapping[str, Any]) -> None:
    """Check everything that needs neither devices nor records.

    Args:
        config: the config to check.
        probes: the known probes by name.

    Raises:
        ValueError: one message for the first mistake: the key, what is expected, what it is.
    """
    _check_keys(config)
    flat = flatten(config)
    check_lists(flat, flatten(default()))
    if config.network and config.task == "pretrain":
        raise InputError(
            f"network: expected nothing when training, which begins anew; got {config.network!r}"
        )
    if not config.features.splits:
        raise InputError("features.splits: expected at least one; got none")
    for split in config.features.splits:
        one_of("features.splits", split, SPLITS)
    one_of("assign.solver", config.assign.solver, assign.SOLVERS)
    one_of("assign.placement", config.assign.placement, ("auto", "device", "host"))
    one_of("assign.storage", config.assign.storage, sharding.STORAGES)
    one_of("targets.kind", config.targets.kind, targets.KINDS)
    one_of("targets.storage", config.targets.storage, targets.STORAGES)
    one_of("optim.schedule", config.optim.schedule, optim.SCHEDULES)
    one_of("optim.loss", config.optim.loss, losses.LOSSES)
    if config.optim.loss == "softmax" and config.targets.kind != "labels":
        raise InputError(
            "optim.loss: 'softmax' is for supervised training; expected targets.kind = 'labels', "
            f"got {config.targets.kind!r}"
        )
    one_of("data.on_bad_record", config.data.on_bad_record, ("grey", "error"))
    one_of("data.crop", config.data.crop, transforms.CROPS)
    one_of("data.augment_on", config.data.augment_on, ("auto", "host", "device"))
    check_eval(flat, probes)
    at_least(flat, 1, "batch_size", "data.image_size", "data.threads", "data.prefetch")
    at_least(flat, 1, "data.views")
    for key in ("data.color_jitter", "data.grey"):
        if not 0 <= flat[key] <= 1:
            raise InputError(f"{key}: expected a number from 0 to 1; got {flat[key]}")
    at_least(flat, 0, "data.workers")
    if not config.data.timeout > 0:
        raise InputError(f"data.timeout: expected seconds above 0; got {config.data.timeout}")
    at_least(flat, 1, "checkpoint.keep", "log.every_steps")
    at_least(flat, 0, "assign.reassign_every_epochs", "data.per_class", "data.resize", "data.pad")
    at_least(flat, 0, "optim.momentum", "optim.weight_decay", "optim.gamma")
    at_least(flat, 0, "optim.decay_start")
    if not config.optim.learning_rate > 0 or not math.isfinite(config.optim.learning_rate):
        raise InputError(
            f"optim.learning_rate: expected a positive number; got {config.optim.learning_rate}"
        )
    for name in ("", "checkpoint.every_", "optim.warmup_"):
        steps_from(config, name, 1)
    _check_schedule(config)
    if (
        not config.seeds
        or len(set(config.seeds)) != len(config.seeds)
        or not all(0 <= seed < 2**32 for seed in config.seeds)
    ):
        raise InputError(f"seeds: expected distinct integers in [0, 2**32); got {config.seeds}")
    if 0 < config.data.resize < config.data.image_size:
        raise InputError(
            f"data.resize: expected 0 or at least data.image_size = {config.data.image_size}; "
            f"got {config.data.resize}"
        )
    if train_transform(config).colors and config.data.augment_on == "device":
        raise InputError(
            "data.augment_on: expected 'host' or 'auto' with data.color_jitter or data.grey, as "
            "colours change on the host; got 'device'"
        )
    _check_block(config)
    _check_mesh(config)
    _check_solver_options(config)
    if config.log.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise InputError(
            "log.tensorboard: needs tensorboardX, which is not installed: "
            "pip install 'nat_jax[tensorboard]', or set --config.log.tensorboard=False"
        )


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


def train_transform(config: ConfigDict, *, colors: bool = True) -> transforms.Transform:
    """Return what becomes of training images.

    Args:
        config: the whole config.
        colors: also what changes their colours, which probes leave out, as SimCLR's do.

    Raises:
        ValueError: the settings in group ``data`` do not fit together.
    """
    data = config.data
    jitter = ColorJitter(data.color_jitter, data.grey)
    try:
        return transforms.train_transform(
            image_size=data.image_size,
            resize=data.resize,
            pad=data.pad,
            flip=data.flip,
            crop=data.crop,
            min_area=data.min_area,
            colors=jitter if colors and jitter != ColorJitter() else None,
        )
    except ValueError as error:
        raise InputError(f"data: {error}") from error


def _check_schedule(config: ConfigDict) -> None:
    settings = config.optim
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


def _check_solver_options(config: ConfigDict) -> None:
    known = inspect.signature(assign.SOLVERS[config.assign.solver]).parameters
    mine = [name for name in known if name not in ("cost", "maximize", "prices")]
    for name in config.assign.options:
        if name not in mine:
            raise InputError(
                f"assign.options: {config.assign.solver} has no option {name!r}. "
                f"Known: {', '.join(mine) or 'none'}"
            )


def _check_block(config: ConfigDict) -> None:
    block, batch = config.assign.block, config.batch_size
    if block is None:
        return
    if block > batch:
        raise InputError(
            f"assign.block: expected at most batch_size = {batch}; got {block}. "
            "Lower assign.block or raise batch_size"
        )
    if block < 1 or batch % block:
        raise InputError(
            f"assign.block: expected a positive divisor of batch_size = {batch}; got {block}"
        )


def _check_mesh(config: ConfigDict) -> None:
    sizes = {"mesh.data": config.mesh.data, "mesh.model": config.mesh.model}
    for key, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(f"{key}: expected devices, or -1 for all that are left; got {size}")
    if max(sizes.values()) == -1:
        raise InputError("mesh.data and mesh.model: expected -1 for one at the most; got it twice")
    groups = config.model.bn_groups
    if groups < 1 or config.batch_size % groups:
        raise InputError(
            f"model.bn_groups: expected a positive divisor of batch_size = {config.batch_size}; "
            f"got {groups}"
        )


def check_devices(config: ConfigDict, mesh_shape: Mapping[str, int], processes: int) -> None:
    """Check what depends on the number of devices and processes.

    Raises:
        ValueError: if the global batch cannot be dealt evenly to them.
    """
    for count, what in ((math.prod(mesh_shape.values()), "devices"), (processes, "processes")):
        if config.batch_size % count:
            below = config.batch_size // count * count
            hint = f"{below} or {below + count}" if below else f"{count}"
            raise InputError(
                f"batch_size: expected a multiple of the {count} {what}; got "
                f"{config.batch_size}. Set --config.batch_size={hint}"
            )


def _check_keys(config: ConfigDict) -> None:
    known, free = flatten(default()), ("model.options.", "assign.options.")
    for key in flatten(config):
        if key not in known and not key.startswith(free):
            group = key.rpartition(".")[0]
            siblings = [k for k in known if k.rpartition(".")[0] == group]
            raise InputError(f"config: unknown key {key!r}. Known there: {', '.join(siblings)}")
