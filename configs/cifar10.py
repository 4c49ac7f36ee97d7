"""CIFAR-10: 50,000 colour images of 32x32 pixels.

    python -m nat_jax.main --config=configs/cifar10.py
    python -m nat_jax.main --config=configs/cifar10.py --config.data.source=folder:PATH

The first line reads the data set as TFDS prepared it, the second a folder or zip of image files in
train/<class>/ and test/<class>/. Beyond the paper: colours instead of Sobel gradients, re-matching
in every epoch, momentum with a cosine schedule.

Takes a quarter of an hour on 2 CPU cores; on JPEG images kNN on the last convolution reaches 52.2 %
(48.0 % untrained) and the MLP probe 57.9 % (48.9 %), see docs/results/cifar10.json.
"""

from ml_collections import ConfigDict

from nat_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.epochs = 6.0
    c.data.source = "tfds:cifar10"
    c.data.image_size = 32
    c.data.pad = 4
    c.data.flip = True
    c.model.dim = 64
    c.model.frontend = "rgb"
    c.model.options.widths = (32, 64, 128, 256)
    c.model.options.pools = 3
    c.assign.reassign_every_epochs = 1
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.optim.schedule = "cosine"
    c.eval.max_train = 20_000
    c.eval.mlp_width = 512
    c.eval.mlp_epochs = 20
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 39
    return c
