"""A run of 15 steps on digits, whose compiled programs tests share; changes of a config."""

from typing import Any

from ml_collections import ConfigDict

from nat_jax import config


def tiny(**changes: Any) -> ConfigDict:
    """Return a run of 3 epochs of 5 steps, with changes; see ``changed``."""
    c = config.default()
    c.epochs = 3.0
    c.batch_size = 256
    c.data.pad = 1
    c.model.dim = 6
    c.model.options.widths = (4,)
    c.model.options.pools = 1
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.assign.reassign_every_epochs = 2
    c.eval.probes = ("knn",)
    c.eval.labels_per_class = (0,)
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 2
    return changed(c, **changes)


def changed(config: ConfigDict, **changes: Any) -> ConfigDict:
    """Change keys of a config, such as ``eval__knn_k``, in place."""
    for key, value in changes.items():
        *groups, last = key.split("__")
        node = config
        for group in groups:
            node = node[group]
        with node.ignore_type():
            node[last] = value
    return config
