"""Errors that the user can fix: the program prints their message, and a traceback of all others."""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, or a condition outside the program, that the user can correct.

    The message states what is wrong, what was expected, what was found, and how to fix it.
    Subclasses are also a ValueError or a RuntimeError, so that callers may catch those.

    Attributes:
        leaves_a_thread: a thread hangs, for which Python would wait before it ends.
    """

    leaves_a_thread = False


class InputError(UserError, ValueError):
    """A setting, a file, a data set or an argument is not what it must be."""


def some_of(names: Iterable[object], most: int, separator: str = ", ") -> str:
    """Return the first names of several for a message, and how many more there are."""
    texts = [*map(str, names)]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
