"""What surrounds a task: logging, and errors as messages and exit codes.

Nothing here imports JAX, so that a mistake on the command line is answered quickly.
"""

import codecs
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import TextIO

from absl import flags
from absl import logging as absl_logging

from nat_jax.errors import UserError
from nat_jax.runtime import host_memory

# What is printed where the output's encoding lacks a sign; "?" for others.
_ASCII = {"±": "+-", "–": "-", "→": "->"}


def set_up() -> None:
    """Set up output, logging to stderr, SIGTERM, memory, and the environment that 'scipy' needs."""
    take_any_text(sys.stdout)
    signal.signal(signal.SIGTERM, _terminate)
    sys.unraisablehook = _print_unraisable
    absl_logging.set_verbosity(absl_logging.WARNING)
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
        os.environ.setdefault("NPROC", "2")  # on one thread 'scipy' would wait for itself
    if host_memory.only_cpu():
        host_memory.keep_freed_pages()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("nat_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False


def take_any_text(stream: TextIO) -> None:
    """Let a stream replace what its encoding lacks, where it would raise an error."""
    codecs.register_error("nat_jax", _in_ascii)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="nat_jax")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end]
    return "".join(_ASCII.get(sign, "?") for sign in signs), error.end


def _terminate(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that the lock of the workdir and temporary files are removed."""
    raise KeyboardInterrupt(number)


def _print_unraisable(error: "sys.UnraisableHookArgs") -> None:
    """Print an error that nothing can catch, but for those of writes that follow a failed one."""
    if str(error.exc_value) != "Event loop is closed":  # tensorstore's, below Orbax
        sys.__unraisablehook__(error)


def log_warnings_only(prefix: str) -> None:
    """Leave progress to the first process; warnings of this one begin with its number."""
    package = logging.getLogger("nat_jax")
    package.setLevel(logging.WARNING)
    package.handlers[0].setFormatter(logging.Formatter(f"{prefix}%(message)s"))


def guarded(function: Callable) -> Callable:
    """Print the message of an error that the user can fix; any other keeps its traceback."""

    def call(*args):
        try:
            return function(*args)
        except KeyboardInterrupt as stop:
            print("nat_jax: stopped; run the same command line again", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            number = stop.args[0] if stop.args else signal.SIGINT
            os._exit(128 + number)  # JAX's compiler threads may not survive a tear-down
        except Exception as error:
            startup = sys.modules.get("nat_jax.runtime.startup")
            if startup is None:  # no task has begun
                if not isinstance(error, flags.Error | UserError):
                    raise
                print(f"nat_jax: {error}", file=sys.stderr)
                sys.exit(2)
            if words := startup.lost_peer(error):
                message = (
                    f"another process of this run has ended or cannot be reached ({words}); its "
                    "own output says why. The same command line, started for all processes, goes "
                    "on from the last checkpoint"
                )
                print(f"nat_jax: {startup.message_prefix()}{message}", file=sys.stderr)
                startup.exit_process(startup.EXIT_LOST_PEER)
            from nat_jax.assign import AssignmentError

            message = startup.no_devices(error)
            if message or isinstance(error, flags.Error | UserError | AssignmentError):
                print(f"nat_jax: {startup.message_prefix()}{message or error}", file=sys.stderr)
                startup.exit_process(2, at_once=getattr(error, "leaves_a_thread", False))
            if startup.message_prefix():  # Python's own end would wait for the other processes
                traceback.print_exc()
                startup.exit_process(1)
            raise

    return call
