"""The task `export`: a bundle of a run's network, with a program of its features."""

import logging
from pathlib import Path

from ml_collections import ConfigDict

from nat_jax.export.loading import network_of, task_config
from nat_jax.export.program import PROGRAM, program
from nat_jax.models.frozen import resolve_layers
from nat_jax.runtime import atomic_files
from nat_jax.training import workdir as workdirs

logger = logging.getLogger(__name__)


def export(config: ConfigDict, workdir: Path) -> Path:
    """Write a bundle of the network in a workdir, or of the one that ``network`` names.

    Args:
        config: ``export`` says where to, and whether with a program of ``eval.layers`` pooled to
            ``eval.max_features``; of ``seeds`` the first is taken; the model is the run's.
        workdir: the run's folder.

    Returns:
        The bundle's folder.

    Raises:
        ValueError: there is no such network or layer, or the folder cannot be written to.
        BundleError: the bundle cannot be written.
        CheckpointError: the run has no good checkpoint.
    """
    place = Path(config.export.to or Path(workdir) / "bundle").expanduser()
    workdirs.check_writable(place, "export.to", "Choose another")
    network = network_of(config, workdir, seed=config.seeds[0])
    settings = task_config(config, network)
    extras = {}
    layers = resolve_layers(settings.eval.layers, network.model)
    if settings.export.program:
        extras[PROGRAM] = program(network, layers, settings.eval.max_features)
    network.save(place, extras)
    size = sum(file.stat().st_size for file in place.iterdir())
    logger.info(
        "%s: seed %d, step %d, %s; open it with nat_jax.load(%r)",
        place,
        network.run["seed"],
        network.run["step"],
        atomic_files.size_text(size),
        str(place),
    )
    return place
