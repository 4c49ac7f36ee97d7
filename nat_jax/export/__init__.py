"""Trained networks as bundles: folders that hold all that is needed to use them elsewhere.

``nat_jax.load(folder)`` opens one. ``nat_jax.export.loading`` makes one of a run, and
``nat_jax.export.program`` writes its features as a program that needs JAX alone.
"""

from nat_jax.export.bundle import Bundle, BundleError, load

__all__ = ["Bundle", "BundleError", "load"]
