"""The paper's discrete targets: k one-hot rows, each shared by N / k images, instead of noise.

    python -m nat_jax.main --config=configs/paper/discrete_targets.py:imagenet,10000
    python -m nat_jax.main --config=configs/paper/discrete_targets.py:cifar10,100

The paper: ImageNet with k = 10^3, 10^4 and 10^5, so 1,281, 128 and 13 images to a target.
The authors' code: has noise targets only.
Chosen here: k = D outputs, everything else as for NAT. The small scales keep the paper's images to
a target: k = 10, 100 and 1,000 for 10,000 images, so 1,000, 100 and 10.
Expected: 19 % for the best k, where NAT has 33.5 % (both from the paper's text, MLP on conv5).
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def values(scale: str) -> tuple[int, ...]:
    return (1_000, 10_000, 100_000) if scale == "imagenet" else (10, 100, 1_000)


def get_config(argument: str = "imagenet") -> ConfigDict:
    scale, value = scales.parse(argument, values)
    c = scales.base(scale)
    c.targets.kind = "basis"
    c.model.dim = value
    return c
