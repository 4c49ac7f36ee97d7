"""Figure 2 of the paper, left: how often to re-match. Every 1, 2, 3, 5 or 10 epochs; 0 is never.

    python -m nat_jax.main --config=configs/paper/fig2_period.py:imagenet,5
    python -m nat_jax.main --config=configs/paper/fig2_period.py:cifar10,5

The paper: NAT on ImageNet, evaluated by the MLP on conv5; the figure has no table.
The authors' code: epochs 0, 3, 6, ... re-match every batch; so do ours, with other periods alike.
Chosen here: "never" keeps the random targets that images begin with; it is not in the paper's
figure.
Expected: 3 is best, and every period is above 30 %.
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def values(scale: str) -> tuple[int, ...]:
    return 3, 1, 2, 5, 10, 0


def get_config(argument: str = "imagenet") -> ConfigDict:
    scale, value = scales.parse(argument, values)
    c = scales.base(scale)
    c.assign.reassign_every_epochs = value
    return c
