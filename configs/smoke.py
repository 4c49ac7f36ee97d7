"""Every part of a run in under a minute on a CPU: a few epochs of a tiny network on digits.

    python -m nat_jax.main --config=configs/smoke.py

Its accuracies mean nothing; it shows that an installation works.
"""

from ml_collections import ConfigDict

from nat_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.epochs = 4.0
    c.batch_size = 128
    c.data.source = "digits"
    c.data.image_size = 8
    c.data.pad = 1
    c.model.dim = 8
    c.model.options.widths = (8, 16)
    c.model.options.pools = 2
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.eval.every_epochs = 2
    c.eval.probes = ("knn", "linear_probe")
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 11
    return c
