"""Table 3 of the paper: NAT by an MLP on the last convolution, and the untrained network.

    python -m nat_jax.main --config=configs/paper/table3_imagenet.py
    python -m nat_jax.main --config=configs/paper/table3_imagenet.py:cifar10

The paper: ImageNet, AlexNet with batch norm, D = 2048, batches of 256, 100 epochs, re-matching in
every third; a rate that decays as l0 / (1 + gamma * max(t - t0, 0)), without its constants.
The authors' code: plain SGD at the constant 0.01 on a summed loss, which is 5.12 on the paper's;
batch norm over the 128 images of each of 2 GPUs; a random constant as the Sobel layer's bias.
Chosen here: the authors' rate, batch norm over the complete batch, no bias. Every layer is
evaluated, by a linear probe too. Small scales have momentum and a cosine schedule, and an MLP of
width 256 for 10 epochs.
Expected: 36.0 % top-1 on ImageNet, against 12.0 % for a random network.
Hardware and time: not run at the paper's scale; `:cifar10` takes minutes a seed on 2 CPU cores.
"""

from ml_collections import ConfigDict

from nat_jax.experiments import scales


def get_config(scale: str = "imagenet") -> ConfigDict:
    c = scales.base(scale)
    c.eval.layers = ("all",)
    c.eval.probes = ("knn", "linear_probe", "mlp_probe")
    c.eval.baselines = ("pixels",)
    return c
