"""Table 1 of the paper, second line: AlexNet with labels and the square loss on unit features.

    python -m nat_jax.main --config=configs/paper/table1_square.py
    python -m nat_jax.main --config=configs/paper/table1_square.py:cifar10

The paper: as for softmax, but features of unit norm are drawn to the one-hot row of their class.
The authors' code: trains NAT only; how the supervised networks were trained is not published.
Chosen here: colours unchanged, as for softmax; NAT's rate for AlexNet; 0.1 for the small network,
with which four epochs (seed 0) reached 38 % on CIFAR-10, with 0.03, 0.3 and 1.0 34, 36 and 26 %.
Expected: 58.4 % top-1 on ImageNet, against 59.2 % with softmax.
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "imagenet") -> ConfigDict:
    return scales.supervised(scale, "square", "rgb")
