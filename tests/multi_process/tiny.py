"""A run of 24 steps in five epochs, judged by one cheap probe, for tests in several processes.

Its images come with ``--config.data.source``: random ones, as scikit-learn takes seconds to import.
"""

from ml_collections import ConfigDict

from nat_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.steps = 24
    c.batch_size = 64
    c.data.image_size = 8
    c.data.pad = 1
    c.model.dim = 6
    c.model.options.widths = (4,)
    c.model.options.pools = 1
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.eval.probes = ("knn",)
    c.eval.layers = ("z",)
    c.eval.labels_per_class = (0,)
    c.checkpoint.every_epochs = 0.0
    c.checkpoint.every_steps = 8
    c.log.every_steps = 1
    return c
