"""The authors' whole protocol in small: crops, flips, a frozen network, ten crops."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from nat_jax import models
from nat_jax.evaluate.features import FeatureBatch, featured
from nat_jax.evaluate.probes.linear import linear_probe_stream
from nat_jax.evaluate.probes.mlp import mlp_probe_stream
from nat_jax.input import pipeline, transforms
from nat_jax.input.sources import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noisy images of 14 pixels, whose class is the colour of a bar that a crop may lose."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 300), ("test", 60)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 160, (count, 14, 14, 3), np.uint8)
        images[np.arange(count), :, :5, labels] += 60
        arrays |= {f"x_{split}": images, f"y_{split}": labels}
    path = tmp_path_factory.mktemp("bars") / "bars.npz"
    np.savez(path, **arrays)
    return f"arrays:{path}"


@pytest.mark.slow
def test_probes_learn_from_augmented_images_through_a_frozen_network(source: str) -> None:
    model = models.make_model(
        "convnet", dim=4, image_size=12, frontend="rgb", widths=(6, 8), pools=1
    )
    weights = model.init(jax.random.key(0))
    train, test = (open_source(source, split) for split in ("train", "test"))
    steps, crops = pipeline.steps_per_epoch(len(train), 64), []

    @jax.jit
    def apply(images: jax.Array) -> dict[str, jax.Array]:
        outputs, _ = model.apply(*weights, images)
        return {layer: outputs[layer] for layer in ("conv1", "conv2")}

    def train_epoch(epoch: int) -> Iterator[FeatureBatch]:
        batches = pipeline.train_batches(
            train,
            transforms.train_transform(image_size=12, resize=14),
            batch_size=64,
            seed=0,
            start_step=epoch * steps,
            num_steps=(epoch + 1) * steps,
            threads=0,
        )
        for number, batch in enumerate(featured(apply, batches)):
            if number == 0:
                crops.append(np.asarray(batch.features["conv1"]))
            yield batch

    def ten_crops() -> Iterator[FeatureBatch]:
        transform = transforms.eval_transform(image_size=12, resize=14, ten_crops=True)
        batches = pipeline.eval_batches(test, transform, batch_size=32, threads=0)
        return featured(apply, batches)

    shapes = [batch.features["conv2"].shape[:2] for batch in ten_crops()]
    assert shapes == [(32, 10), (32, 10)]  # four rows of the second are padding
    options = {"num_classes": 3, "epochs": 8}
    linear = linear_probe_stream(train_epoch, ten_crops(), **options)
    assert set(linear) == {"conv1", "conv2"} and min(linear.values()) > 0.8
    assert linear == linear_probe_stream(train_epoch, ten_crops(), **options)
    assert len(crops) == 16 and not np.array_equal(crops[0], crops[1])  # new in each epoch
    np.testing.assert_array_equal(crops[0], crops[8])
    top = functools.partial(map, lambda x: x._replace(features={"z": x.features["conv2"]}))
    mlp = mlp_probe_stream(
        lambda epoch: top(train_epoch(epoch)), top(ten_crops()), hidden=16, **options
    )
    assert set(mlp) == {"z"} and mlp["z"] > 0.6
