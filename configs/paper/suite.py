"""All of the paper's experiments at a small scale, with a verdict on each of its claims.

    python -m nat_jax.main --config=configs/paper/suite.py:cifar10
    python -m nat_jax.main --config=configs/paper/suite.py:cifar10 --config.data.source=folder:PATH
    python -m nat_jax.main --config=configs/paper/suite.py:fashion_mnist
    python -m nat_jax.main --config=configs/paper/suite.py:digits

It trains the members of configs/paper on the first 1,000 images of each class and writes
results/suite.json, results/suite.md and report.html. What the command line changes here changes in
every run whose experiment does not set it. The same line resumes after a stop. `:digits` tests
that everything runs; its numbers mean nothing.

Hardware and time: 40 runs; `:cifar10` took two hours of processor time, so an hour on 2 CPU cores
at the best. Expected: three claims hold, four are within noise, one does not; see docs/paper.md.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "cifar10") -> ConfigDict:
    c = scales.base(scale)
    c.task = "suite"
    c.suite.scale = scale
    return c
