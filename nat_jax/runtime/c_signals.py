"""Signal handlers as C code sees them; Python can neither see nor put back those of others.

JAX's runtime has such handlers, and aborts in C code, where Python's handlers would run too late.
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def handled(number: int, act: Callable[[int], None] | None) -> Iterator[None]:
    """Handle a signal in another way for a while.

    Args:
        number: of the signal.
        act: called with it at once, in the thread that gets it; None for the system's default.
    """
    set_handler = ctypes.CDLL(None).signal
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)(act) if act else None
    before = set_handler(number, ctypes.cast(callback, ctypes.c_void_p) if callback else None)
    try:
        yield
    finally:
        set_handler(number, before)
