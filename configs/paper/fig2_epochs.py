"""Figure 2 of the paper, right: accuracy along one long training.

    python -m nat_jax.main --config=configs/paper/fig2_epochs.py
    python -m nat_jax.main --config=configs/paper/fig2_epochs.py:cifar10

The paper: NAT on ImageNet, evaluated by the MLP on conv5 during training; the figure has no table.
The authors' code: a constant rate, where the paper's text has one that decays.
Chosen here: the constant rate, so that an epoch shows what a run of that length reaches. Small
scales train three times as long as the other experiments.
Expected: accuracy rises and has settled after about 100 epochs.
Hardware and time: not run at the paper's scale; `:cifar10` takes some minutes on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "imagenet") -> ConfigDict:
    c = scales.base(scale)
    if scale == "imagenet":
        c.eval.every_epochs = 10
        return c
    c.seeds = (0,)
    c.epochs *= 3
    c.optim.schedule = "constant"
    c.eval.every_epochs = max(1, round(c.epochs / 9))
    return c
