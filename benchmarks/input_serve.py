"""The far side of ``input_turns.py``: a program that works when it is told to, and says how long.

Standard library only, because programs of other environments (PyTorch, TensorFlow) use it too. A
turn is a line on standard input with a number of images; the answer is a line of JSON. Between
turns the program waits, so that programs can take turns on the same cores.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Batches that are ready would count as made in no time. So many are thrown away first, for so many
# seconds at least.
_DRAIN = (16, 1.5)
_SETTLE = 10.0  # seconds at most until nothing more is made ahead


def cpu_seconds(process: int | None = None) -> float:
    """Return the processor time of a process and its living children; 0 where /proc is missing."""
    place = Path("/proc", str(process or os.getpid()))
    try:
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        children = [task.read_text().split() for task in place.glob("task/*/children")]
    except OSError:  # it has ended, or this is no Linux
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for group in children for child in group)


def whole_turn(work: Callable[[], int]) -> dict[str, float]:
    """Time work that begins with nothing made and leaves nothing over; it returns the images."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    images = work()
    seconds = time.perf_counter() - wall
    return {"images": images, "seconds": seconds, "cpu": cpu_seconds() - cpu}


def stream_turn(batches: Iterator[Any], count: int, batch_size: int) -> dict[str, float]:
    """Time `count` batches of an endless stream, after those that were waiting are gone."""
    least, seconds = _DRAIN
    begin, thrown = time.perf_counter(), 0
    while thrown < least or time.perf_counter() - begin < seconds:
        next(batches)
        thrown += 1

    def work() -> int:
        for _ in range(count):
            next(batches)
        return count * batch_size

    answer = whole_turn(work)
    _settle()
    return answer


def _settle() -> None:
    """Wait until what is made ahead is made: the next turn is another program's."""
    end = time.perf_counter() + _SETTLE
    before = cpu_seconds()
    while time.perf_counter() < end:
        time.sleep(0.2)
        now = cpu_seconds()
        if now - before < 0.05:
            return
        before = now


def serve(start: Callable[[], tuple[dict[str, Any], Callable[[int], dict[str, Any]]]]) -> None:
    """Answer turns until the input ends.

    Args:
        start: sets up, and returns what it is (versions and the like) and the function that does a
            turn of so many images.
    """
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        about, turn = start()
        print(json.dumps(about), file=answers, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for line in sys.stdin:
                print(json.dumps(turn(int(line))), file=answers, flush=True)
