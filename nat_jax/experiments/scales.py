"""Configs shared by the paper's experiments: data, network and schedule of each scale.

``imagenet`` is the paper's setting, that of configs/alexnet.py; the others test on a CPU, with a
thousandth of the work, whether its claims hold.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax.cli import config_files
from nat_jax.errors import InputError


def parse(argument: str, values: Callable[[str], tuple[int, ...]]) -> tuple[str, int]:
    """Return (scale, value) of a sweep's argument: "cifar10,5" is ("cifar10", 5).

    Args:
        argument: the text after the colon; without a value it means the sweep's first one.
        values: the sweep's values at a scale.

    Raises:
        ValueError: the value is not one of the sweep.
    """
    scale, _, value = argument.partition(",")
    known = values(scale)
    if value and value not in map(str, known):
        raise InputError(f"value: expected one of {', '.join(map(str, known))}; got {value!r}")
    return scale, int(value or known[0])


def base(scale: str) -> ConfigDict:
    """Return NAT as in the paper, with a Sobel front end and re-matching in every third epoch.

    Args:
        scale: a key of SCALES.

    Raises:
        ValueError: unknown scale.
    """
    if scale not in SCALES:
        raise InputError(f"scale: unknown {scale!r}. Known: {', '.join(SCALES)}")
    c = SCALES[scale]()
    c.assign.reassign_every_epochs = 3
    c.model.frontend = "sobel"
    return c


def supervised(scale: str, loss: str, frontend: str) -> ConfigDict:
    """Return supervised training with the rest as in ``base``.

    Args:
        scale: a key of SCALES.
        loss: "softmax", or "square" on unit features.
        frontend: of the network.

    Raises:
        ValueError: unknown scale.
    """
    c = base(scale)
    c.model.frontend = frontend
    c.targets.kind = "labels"
    c.model.dim = _CLASSES.get(c.data.source, 10)
    c.eval.layers = ("z", "last_conv")  # z holds the network's own decisions
    c.optim.loss = loss
    c.optim.learning_rate = _SUPERVISED_RATES[c.model.name][loss]
    return c


def _imagenet() -> ConfigDict:
    config: ConfigDict = config_files.load("alexnet.py").get_config()
    return config


def _small() -> ConfigDict:
    """Return what the small scales share; momentum and cosine schedule are not in the paper."""
    c = configs.default()
    c.seeds = (0, 1, 2)
    c.epochs = 12.0  # the fewest in which "every 10 epochs" is neither "never" nor at the very end
    c.data.per_class = 1000
    c.data.flip = True
    c.model.options.pools = 3
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.optim.schedule = "cosine"
    c.eval.labels_per_class = (0,)
    c.eval.baselines = ()
    c.eval.layers = ("last_conv",)
    c.eval.probes = ("linear_probe", "mlp_probe")
    c.eval.linear_fit = "ridge"
    c.eval.mlp_width = 256
    c.eval.mlp_epochs = 10
    c.checkpoint.every_epochs = 3.0
    c.checkpoint.keep = 1
    c.log.every_steps = 39
    return c


def _cifar10() -> ConfigDict:
    c = _small()
    c.data.source = "tfds:cifar10"
    c.data.image_size = 32
    c.data.pad = 4
    c.model.dim = 64
    c.model.options.widths = (16, 32, 64, 128)
    return c


def _fashion_mnist() -> ConfigDict:
    c = _small()
    c.data.source = "tfds:fashion_mnist"
    c.data.image_size = 28
    c.data.pad = 2
    c.model.dim = 32
    c.model.options.widths = (16, 32, 64)
    return c


def _digits() -> ConfigDict:
    """Return a scale that runs in seconds, to try the suite; its numbers mean nothing."""
    c = _small()
    c.epochs = 2.0
    c.batch_size = 64
    c.data.source = "digits"
    c.data.per_class = 32
    c.data.image_size = 8
    c.data.pad = 1
    c.data.flip = False
    c.model.dim = 8
    c.model.options.widths = (4, 8)
    c.model.options.pools = 2
    c.eval.mlp_width = 16
    c.eval.mlp_epochs = 40
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 5
    return c


SCALES: dict[str, Callable[[], ConfigDict]] = {
    "imagenet": _imagenet,
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "digits": _digits,
}
SMALL = ("cifar10", "fashion_mnist", "digits")

_CLASSES = {"tfds:imagenet2012": 1000}  # the others have 10

# Learning rates by network and loss; see the headers of configs/paper/table1_*.
_SUPERVISED_RATES = {
    "alexnet": {"softmax": 0.05, "square": 5.12},
    "convnet": {"softmax": 0.05, "square": 0.1},
}
