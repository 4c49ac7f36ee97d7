"""Table 2 of the paper, first line: AlexNet with labels, images unchanged.

    python -m nat_jax.main --config=configs/paper/table2_clean.py
    python -m nat_jax.main --config=configs/paper/table2_clean.py:cifar10

The paper: ImageNet, AlexNet with batch norm, supervised; images standardised image by image, and
nothing else.
The authors' code: has no such layer; it standardises each crop.
Chosen here: the softmax loss and its rate of table1_softmax.
Expected: 59.7 % top-1 on ImageNet.
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "imagenet") -> ConfigDict:
    return scales.supervised(scale, "softmax", "rgb")
