"""Features without a network or a gradient, learned from images: bars for networks without labels.

Each is chosen by its word in ``eval.baselines`` and scored as a network is, on the same records by
the same probes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from nat_jax.evaluate.baselines.codebooks import neural_gas, self_organising_map
from nat_jax.evaluate.baselines.diffrac import learn_diffrac
from nat_jax.evaluate.baselines.patches import learn_patches
from nat_jax.evaluate.baselines.sift import learn_fisher_vectors
from nat_jax.evaluate.baselines.smt import learn_sparse_manifold

__all__ = ["BASELINES", "Baseline"]


class Baseline(NamedTuple):
    """How a baseline is learned.

    Attributes:
        key: of the config that has its size.
        learn: (batches, size, *, stride, seed) -> a function from uint8[B, S, S, 3] to
            float32[B, F]. It may read the batches several times.
    """

    key: str
    learn: Callable[..., Callable[[np.ndarray], jax.Array]]

    @property
    def setting(self) -> str:
        """The key's name within ``eval``."""
        return self.key.removeprefix("eval.")


BASELINES: dict[str, Baseline] = {
    "patches": Baseline("eval.patch_centroids", learn_patches),
    "som": Baseline(
        "eval.patch_centroids", functools.partial(learn_patches, codebook=self_organising_map)
    ),
    "gas": Baseline("eval.patch_centroids", functools.partial(learn_patches, codebook=neural_gas)),
    "smt": Baseline("eval.smt_atoms", learn_sparse_manifold),
    "diffrac": Baseline("eval.diffrac_clusters", learn_diffrac),
    "sift": Baseline("eval.sift_gaussians", learn_fisher_vectors),
}
