"""The user's folder for what can be made again: indexes of large data sets, compiled programs."""

import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

# Seconds of compiling. JAX's second is longer than most programs of a small network take, which
# together are most of a small run's start.
_WORTH_KEEPING = 0.1


def place(kind: str) -> Path | None:
    """Return the folder for one kind of things, which may not exist yet.

    It is in ``$NAT_JAX_CACHE``, else ``$XDG_CACHE_HOME/nat_jax``, else ``~/.cache/nat_jax``. None
    where there is no home.
    """
    base = os.environ.get("NAT_JAX_CACHE") or ""
    if not base:
        base = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nat_jax")
    base = os.path.expanduser(base)
    return None if base.startswith("~") else Path(base).absolute() / kind


def keep_programs() -> None:
    """Let JAX keep compiled programs here, unless it was told to keep them elsewhere or nowhere.

    Where nothing can be written one line says so.
    """
    import jax  # not needed by those who ask for a place only

    told = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if told is not None:  # by $JAX_COMPILATION_CACHE_DIR for instance; "" is nowhere
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
            "compiled programs are not kept (%s): each start compiles anew; set NAT_JAX_CACHE to a "
            "folder that can be written",
            error,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
