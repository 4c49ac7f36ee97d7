"""The task retrieval (the paper's figure 3): some test images and their nearest training images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from nat_jax import report
from nat_jax.evaluate import neighbours
from nat_jax.evaluate.neighbours import Found
from nat_jax.evaluate.probe_data import ProbeData, Subject
from nat_jax.export.loading import UNTRAINED


def draw_neighbours(
    settings: ConfigDict,
    data: ProbeData,
    subjects: Mapping[str, Subject],
    judged: str,
    workdir: Path,
) -> dict[str, Any]:
    """Draw ``pictures/retrieval_<layer>.png`` for each layer of a network, and say what is on it.

    Args:
        settings: the group ``eval``: how many queries and neighbours.
        data: the records; they need no labels.
        subjects: what can be judged, by name; the same is asked of the untrained network.
        judged: the name of the one whose neighbours are drawn.
        workdir: the pictures' place.

    Returns:
        "metric", "value" and "untrained": the share of the neighbours in the first layer that have
        the query's label (None without labels); "layers": for each its value and the neighbours
        with names, record numbers and cosines; "pictures": their names.
    """
    folder = workdir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"queries": settings.queries, "count": settings.neighbours}
    layers, pictures = {}, []
    for layer in subjects[judged].layers:
        found = neighbours.find(data, subjects[judged], layer, **wanted)
        before = neighbours.find(data, subjects[UNTRAINED], layer, **wanted)
        pictures.append(f"retrieval_{layer}.png")
        drawn = report.neighbours(found.query_images, found.images, found.correct)
        (folder / pictures[-1]).write_bytes(drawn)
        layers[layer] = {
            "value": _share(found),
            "untrained": _share(before),
            "found": _listed(found, data),
        }
    first = layers[subjects[judged].layers[0]]
    return {
        "metric": f"share of the {settings.neighbours} nearest training images that have the "
        f"query's label, over the queries, in {subjects[judged].layers[0]}",
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
