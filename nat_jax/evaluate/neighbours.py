"""The nearest training images of some test images."""

from typing import NamedTuple

import numpy as np

from nat_jax.evaluate.probe_data import TEST, TRAIN, ProbeData, Subject
from nat_jax.evaluate.probes.knn import nearest


class Found(NamedTuple):
    """Queries and their neighbours, most similar first.

    Attributes:
        queries: int32[Q], test records.
        query_images: uint8[Q, S, S, 3].
        neighbours: int32[Q, K], training records.
        images: uint8[Q, K, S, S, 3].
        cosine: float32[Q, K].
        correct: bool[Q, K], whether the labels agree; None without labels.
    """

    queries: np.ndarray
    query_images: np.ndarray
    neighbours: np.ndarray
    images: np.ndarray
    cosine: np.ndarray
    correct: np.ndarray | None


def find(data: ProbeData, subject: Subject, layer: str, *, queries: int, count: int) -> Found:
    """Find the nearest training images by cosine in one layer, for evenly spread test images.

    Args:
        data: the records.
        subject: gives the features.
        layer: one of its layers.
        queries: test images, at most as many as there are.
        count: neighbours of each, at most as many as there are training images.
    """
    train = data.extract(subject, TRAIN, (layer,))[layer]
    test = data.extract(subject, TEST, (layer,))[layer]
    chosen = np.linspace(0, len(test.index) - 1, min(queries, len(test.index))).astype(int)
    some = test.data.of(chosen)
    cosine, rows = nearest(some.features, train.data.features, min(count, len(train.index)))
    neighbours = train.index[rows]
    images = data.images(TRAIN, neighbours.reshape(-1), subject.transform)
    labelled = data.num_classes is not None
    return Found(
        test.index[chosen],
        data.images(TEST, test.index[chosen], subject.transform),
        neighbours,
        images.reshape(*rows.shape, *images.shape[1:]),
        cosine,
        train.data.labels[rows] == some.labels[:, None] if labelled else None,
    )
