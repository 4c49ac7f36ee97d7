"""Fashion-MNIST: 60,000 grey images of 28x28 pixels.

    python -m nat_jax.main --config=configs/fashion_mnist.py
    python -m nat_jax.main --config=configs/fashion_mnist.py --config.data.source=arrays:PATH

The first line reads the data set as TFDS prepared it, the second a folder with the four idx files
(train-images-idx3-ubyte.gz, ...). The paper's Sobel front end and re-matching in every third epoch;
beyond the paper, momentum with a cosine schedule.

Takes a quarter of an hour on 2 CPU cores; kNN on z reaches 83.5 % (78.3 % untrained), the MLP probe
on the last convolution 89.2 % (87.6 %), see docs/results/fashion_mnist.json.
"""

from ml_collections import ConfigDict

from nat_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.epochs = 9.0
    c.data.source = "tfds:fashion_mnist"
    c.data.image_size = 28
    c.data.pad = 2
    c.data.flip = True
    c.model.dim = 32
    c.model.options.widths = (32, 64, 128)
    c.model.options.pools = 3
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.optim.schedule = "cosine"
    c.eval.max_train = 20_000
    c.eval.mlp_width = 512
    c.eval.mlp_epochs = 20
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 26
    return c
