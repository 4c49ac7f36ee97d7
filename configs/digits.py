"""The embedded demo: 1,437 real handwritten digits of 8x8 pixels, no download.

    python -m nat_jax.main --config=configs/digits.py

Three seeds of 50 epochs, evaluated on 360 digits by other writers. D = 10 and a small convolutional
network; the paper's Sobel front end and its re-matching in every third epoch. Beyond the paper:
momentum with a cosine schedule, and crops that shift by up to a pixel.

Takes a minute on 2 CPU cores; kNN on z reaches 90.0 +- 0.3 % (68.6 % untrained), see
docs/results/digits.json.
"""

from ml_collections import ConfigDict

from nat_jax import config


def get_config() -> ConfigDict:
    c = config.default()
    c.seeds = (0, 1, 2)
    c.epochs = 50.0
    c.batch_size = 128
    c.data.source = "digits"
    c.data.image_size = 8
    c.data.pad = 1
    c.model.dim = 10
    c.model.options.widths = (32, 64, 128)
    c.model.options.pools = 2
    c.optim.learning_rate = 0.1
    c.optim.momentum = 0.9
    c.optim.schedule = "cosine"
    c.eval.mlp_width = 256
    c.eval.mlp_epochs = 50
    c.checkpoint.every_epochs = 25.0
    c.log.every_steps = 55  # five epochs
    return c
