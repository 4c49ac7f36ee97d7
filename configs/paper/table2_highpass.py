"""Table 2 of the paper, second line: AlexNet with labels, high-pass filtered images.

    python -m nat_jax.main --config=configs/paper/table2_highpass.py
    python -m nat_jax.main --config=configs/paper/table2_highpass.py:cifar10

The paper: ImageNet, AlexNet with batch norm, supervised; images high-pass filtered; the filter
is not in the paper, see nat_jax/models/frontend.py for ours.
The authors' code: has no such filter.
Chosen here: the softmax loss and its rate of table1_softmax.
Expected: 58.5 % top-1 on ImageNet.
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "imagenet") -> ConfigDict:
    return scales.supervised(scale, "softmax", "highpass")
