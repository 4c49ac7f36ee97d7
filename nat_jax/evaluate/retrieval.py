"""The task retrieval (the paper's figure 3): some test images and their nearest training images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from nat_jax import report
from nat_jax.evaluate.probe_data import TEST, TRAIN, FeatureExtractor, ProbeData
from nat_jax.evaluate.probes.knn import nearest
from nat_jax.report.rows import UNTRAINED
from nat_jax.runtime import atomic_files


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


def find(
    data: ProbeData, extractor: FeatureExtractor, layer: str, *, queries: int, count: int
) -> Found:
    """Find the nearest training images by cosine in one layer, for evenly spread test images.

    Args:
        data: the records.
        extractor: computes the features.
        layer: one of its layers.
        queries: test images, at most as many as there are.
        count: neighbours of each, at most as many as there are training images.
    """
    train = data.extract(extractor, TRAIN, (layer,))[layer]
    test = data.extract(extractor, TEST, (layer,))[layer]
    assert train.index is not None and test.index is not None
    chosen = np.linspace(0, len(test.index) - 1, min(queries, len(test.index))).astype(int)
    some = test.of(chosen)
    cosine, rows = nearest(some.features, train.features, min(count, len(train.index)))
    neighbours = train.index[rows]
    images = data.images(TRAIN, neighbours.reshape(-1), extractor.transform)
    labelled = data.num_classes is not None
    return Found(
        test.index[chosen],
        data.images(TEST, test.index[chosen], extractor.transform),
        neighbours,
        images.reshape(*rows.shape, *images.shape[1:]),
        cosine,
        train.labels[rows] == some.labels[:, None] if labelled else None,
    )


def draw_neighbours(
    settings: ConfigDict,
    data: ProbeData,
    extractors: Mapping[str, FeatureExtractor],
    evaluated: str,
    workdir: Path,
) -> dict[str, Any]:
    """Draw ``pictures/retrieval_<layer>.png`` for each layer of a network.

    Args:
        settings: the group ``eval``: how many queries and neighbours.
        data: the records; they need no labels.
        extractors: by name, the untrained network's among them.
        evaluated: the name of the one whose neighbours are drawn.
        workdir: the pictures' place.

    Returns:
        "metric", "value" and "untrained": the share of the neighbours in the first layer that have
        the query's label (None without labels); "layers": for each its value and the neighbours
        with names, record numbers and cosines; "pictures": their names.
    """
    wanted = {"queries": settings.queries, "count": settings.neighbours}
    layers, pictures = {}, []
    for layer in extractors[evaluated].layers:
        found = find(data, extractors[evaluated], layer, **wanted)
        before = find(data, extractors[UNTRAINED], layer, **wanted)
        pictures.append(f"retrieval_{layer}.png")
        drawn = report.neighbours(found.query_images, found.images, found.correct)
        atomic_files.write(workdir / "pictures" / pictures[-1], drawn)
        layers[layer] = {
            "value": _share(found),
            "untrained": _share(before),
            "found": _listed(found, data),
        }
    first = layers[extractors[evaluated].layers[0]]
    return {
        "metric": f"share of the {settings.neighbours} nearest training images that have the "
        f"query's label, over the queries, in {extractors[evaluated].layers[0]}",
        "value": first["value"],
        "untrained": first["untrained"],
        "layers": layers,
        "pictures": pictures,
    }


def _share(found: Found) -> float | None:
    return None if found.correct is None else float(np.mean(found.correct))


def _listed(found: Found, data: ProbeData) -> list[dict[str, Any]]:
    return [
        {
            "query": int(query),
            "name": data.test.record_name(int(query)),
            "neighbours": [int(i) for i in rows],
            "names": [data.train.record_name(int(i)) for i in rows],
            "cosine": [round(float(c), 6) for c in cosine],
        }
        for query, rows, cosine in zip(found.queries, found.neighbours, found.cosine, strict=True)
    ]
