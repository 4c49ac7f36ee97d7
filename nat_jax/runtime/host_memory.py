"""How malloc treats the memory in which a CPU computes."""

import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8
_HUGE_PAGE = 2 << 20


def only_cpu() -> bool:
    """Whether JAX, which is not started by this, has nothing but a CPU to find."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def keep_freed_pages() -> bool:
    """Let malloc keep what is freed, in huge pages; return whether it will.

    XLA:CPU allocates the memory of a program anew at each call. glibc hands such large blocks back
    to the kernel, which then clears them page by page at the next call: a third of a training step.
    Afterwards this process keeps them, so that its resident memory stays at its peak.

    To be called before JAX starts its threads, each of which gets a heap of its own otherwise. Does
    nothing without Linux and glibc, nor where GLIBC_TUNABLES or a variable MALLOC_... is set, which
    decide then.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        if not libc.mallopt(option, value):
            return False
    # Addresses without memory, by which the heap grows once; all of them can be marked then.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if block := libc.malloc(size):
        start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, block + size - start, mmap.MADV_HUGEPAGE)
        libc.free(block)
    return True
