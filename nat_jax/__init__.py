"""Unsupervised image features by predicting noise (Bojanowski & Joulin, ICML 2017) in JAX.

Dimension letters used throughout the library: B global batch, N images in the data set,
D feature dimension, H height, W width, C channels.

Sub-modules load on first use, so that ``import nat_jax; nat_jax.assign.auction(cost)`` pulls in
jax and numpy only.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = frozenset(
    {
        "assign",
        "config",
        "evaluate",
        "export",
        "input",
        "losses",
        "models",
        "optim",
        "report",
        "runtime",
        "targets",
        "train",
        "train_step",
        "training",
    }
)

# Old names of modules that moved into packages; as attributes of nat_jax only.
_ALIASES = {
    "checkpoint": "training.checkpoint",
    "input_pipeline": "input.pipeline",
    "metrics": "training.metrics",
    "network": "models.frozen",
    "preemption": "runtime.preemption",
    "preprocess": "input.transforms",
    "records": "input.sources",
    "run": "training.setup",
    "sharding": "runtime.sharding",
}

__all__ = ["__version__", "load", *sorted(_SUBMODULES)]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES or name in _ALIASES:
        return importlib.import_module(f"nat_jax.{_ALIASES.get(name, name)}")
    if name == "load":
        return importlib.import_module("nat_jax.export").load
    raise AttributeError(f"module 'nat_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
