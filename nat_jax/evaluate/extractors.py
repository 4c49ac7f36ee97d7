"""Feature extractors of networks and of the baselines: raw pixels, k-means patches."""

import functools

import jax
import numpy as np

from nat_jax.evaluate import features
from nat_jax.evaluate.features import Apply
from nat_jax.evaluate.patches import PatchDictionary, learn_patches
from nat_jax.evaluate.probe_data import TRAIN, FeatureExtractor, ProbeData
from nat_jax.input.transforms import Transform
from nat_jax.models.frozen import Network
from nat_jax.report.rows import PATCHES, PIXELS

_WINDOWS_PER_SIDE = 32  # of a patch dictionary, about: those of CIFAR's images, for larger ones too

_raw_pixels = jax.jit(features.raw_pixels, static_argnames="max_features")


def network_extractor(
    name: str,
    network: Network,
    layers: tuple[str, ...],
    *,
    max_features: int,
    transform: Transform,
) -> FeatureExtractor:
    """Return the extractor of a network's layers; maps are pooled to ``max_features`` values."""
    return FeatureExtractor(
        name,
        layers,
        lambda chosen: network.extractor(chosen, max_features),
        transform,
        functools.cache(lambda: {"network": network.fingerprint(), "max_features": max_features}),
    )


def pixel_extractor(*, max_features: int, transform: Transform) -> FeatureExtractor:
    """Return the extractor of raw pixels, pooled as maps are: one layer, "pixels"."""
    return FeatureExtractor(
        PIXELS,
        ("pixels",),
        lambda _: lambda images: {"pixels": _raw_pixels(images, max_features)},
        transform,
        lambda: {"pixels": max_features},
    )


def patch_extractor(
    data: ProbeData, *, centroids: int, seed: int, max_train: int, transform: Transform
) -> FeatureExtractor:
    """Return the extractor of whitened k-means patches: one layer, "patches".

    They are learned from the training images when features are asked for that are not kept.

    Args:
        data: the images.
        centroids: K; features have 4 K values.
        seed: of what is drawn.
        max_train: what the training images were thinned to, which the features depend on too.
        transform: brings images to one size.
    """
    stride = max(1, round(transform.size / _WINDOWS_PER_SIDE))

    @functools.cache
    def dictionary() -> PatchDictionary:
        batches = data.batches(data.train, transform)
        good = (np.asarray(batch["image"])[batch["weight"] > 0] for batch in batches)
        return learn_patches(good, centroids=centroids, stride=stride, seed=seed)

    def apply(_: tuple[str, ...]) -> Apply:
        return lambda images: {"patches": dictionary()(images)}

    learned_from = {
        "patches": centroids,
        "stride": stride,
        "seed": seed,
        "max_train": max_train,
        **data.describe()[TRAIN],
    }
    return FeatureExtractor(PATCHES, ("patches",), apply, transform, lambda: learned_from)
