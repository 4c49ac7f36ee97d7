"""Table 2 of the paper, third line: AlexNet with labels, Sobel gradients.

    python -m nat_jax.main --config=configs/paper/table2_sobel.py
    python -m nat_jax.main --config=configs/paper/table2_sobel.py:cifar10

The paper: ImageNet, AlexNet with batch norm, supervised; images grey, as their horizontal and
vertical gradients.
The authors' code: the gradient layer's bias stays at a random constant; ours is zero.
Chosen here: the softmax loss and its rate of table1_softmax.
Expected: 57.4 % top-1 on ImageNet.
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "imagenet") -> ConfigDict:
    return scales.supervised(scale, "softmax", "sobel")
