"""From batches of images to batches of features: what probes learn from when images change."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from nat_jax.evaluate.features import Apply


class FeatureBatch(NamedTuple):
    """A batch of features.

    Attributes:
        features: {layer: float[B, F]}; for a test [B, F], or [B, V, F] for V views of each record.
        labels: int[B].
        weight: float[B], 0 for records that do not count (padding, bad images). They still enter
            batch statistics, as they do in training.
    """

    features: Mapping[str, jax.Array | np.ndarray]
    labels: np.ndarray
    weight: np.ndarray


TrainEpoch = Callable[[int], Iterable[FeatureBatch]]


def featured(apply: Apply, batches: Iterable[Mapping[str, np.ndarray]]) -> Iterator[FeatureBatch]:
    """Run a frozen network over batches of images as they come.

    Training: `input_pipeline.train_batches` from step ``epoch * steps_per_epoch`` on, whose crops
    and flips are new in each epoch. Ten-crop test: `input_pipeline.eval_batches` with
    ``preprocess.eval_transform(..., ten_crops=True)``.

    Args:
        apply: jitted function of uint8[n, H, W, 3] that gives {layer: float[n, ...]}.
        batches: with "image" uint8[B, H, W, 3] or, for V views, [B, V, H, W, 3]; "label" int32[B];
            "weight" float32[B].

    Returns:
        Features flattened to [B, F], or [B, V, F]; still being computed, on the device.
    """
    for batch in batches:
        images = batch["image"]
        shape = images.shape[:-3]
        outputs = apply(images.reshape(-1, *images.shape[-3:]))
        yield FeatureBatch(
            {layer: values.reshape(*shape, -1) for layer, values in outputs.items()},
            batch["label"],
            batch["weight"],
        )
