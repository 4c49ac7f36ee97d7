"""Evaluation of networks by their features: probes, and the tasks that score them.

A `FeatureSet` has features and labels; a probe takes two of them and returns an accuracy.
"""

from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes import PROBES, Probe, protocol

__all__ = ["PROBES", "FeatureSet", "Probe", "protocol"]
