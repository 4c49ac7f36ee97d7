"""The user's cache folder: indexes of large data sets, compiled programs."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

# Programs that take longer to compile are cached, in seconds. JAX's default of 1 s leaves out most
# programs of a small network, which together are most of a small run's start.
_MIN_COMPILE_SECONDS = 0.1


def place(kind: str) -> Path | None:
    """Return the folder for one kind of cached files, which may not exist yet.

    It is in ``$NAT_JAX_CACHE``, else ``$XDG_CACHE_HOME/nat_jax``, else ``~/.cache/nat_jax``; None
    if there is no home folder.
    """
    base = os.environ.get("NAT_JAX_CACHE") or ""
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nat_jax")
    base = os.path.expanduser(base)
    return None if base.startswith("~") else Path(base).absolute() / kind


def enable_compilation_cache() -> None:
    """Let JAX cache compiled programs here, unless it is configured to cache elsewhere or nowhere.

    If the folder cannot be written, this is logged.
    """
    import jax  # ``place`` does without

    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if configured is not None:  # by $JAX_COMPILATION_CACHE_DIR for instance; "" is nowhere
        return
    folder = place("programs")
    try:
        if folder is None:
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as error:
        logger.info(
            "compiled programs are not kept (%s): each start compiles them again; set "
            "NAT_JAX_CACHE to a folder that can be written",
            error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
