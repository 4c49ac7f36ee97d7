"""Programs that take turns on the same cores, and what their turns say.

Each program runs in processes of its own (``input_serve.py``) and waits between its turns. Rates
are compared within a round, so that a machine that slows down slows everybody.
"""

import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_END = 60  # seconds that a program may take to end


class Failed(RuntimeError):
    """A program has ended; the message is the end of what it said."""


@dataclasses.dataclass
class Contender:
    """A program, or several at once, and the turns it has done.

    Args:
        name: what tables call it.
        program: file beside this one.
        specs: JSON arguments, one for each process; all work at the same time.
        python: the interpreter of its environment.
        about: what to say of it in the results.
    """

    name: str
    program: str
    specs: Sequence[dict[str, Any]]
    python: str = sys.executable
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    turns: list[dict[str, float]] = dataclasses.field(default_factory=list)
    images: int = 0  # in each turn, over all processes

    def start(self) -> None:
        """Start the processes and wait until they can take turns."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (goes with the processes)
        self._processes = [
            subprocess.Popen(
                [self.python, str(HERE / self.program), json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            )
            for spec in self.specs
        ]
        for process in self._processes:
            self.about.update(self._answer(process))

    def turn(self, images: int) -> dict[str, float]:
        """Let the processes do a share of the images each."""
        share = math.ceil(images / len(self._processes))
        for process in self._processes:
            assert process.stdin is not None
            print(share, file=process.stdin, flush=True)
        answers = [self._answer(process) for process in self._processes]
        return {
            "images": sum(answer["images"] for answer in answers),
            "seconds": max(answer["seconds"] for answer in answers),
            "cpu": sum(answer["cpu"] for answer in answers),
        }

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        process.wait(timeout=_END)
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        raise Failed(f"{self.name}: {said[-1] if said else 'ended without a word'}")

    def stop(self) -> None:
        """End the processes."""
        for process in getattr(self, "_processes", ()):
            if process.stdin is not None:
                process.stdin.close()
        for process in getattr(self, "_processes", ()):
            try:
                process.wait(timeout=_END)
            except subprocess.TimeoutExpired:
                process.kill()

    def rates(self) -> list[float]:
        """Return the images per second of each turn."""
        return [turn["images"] / turn["seconds"] for turn in self.turns]


def take_turns(
    contenders: Iterable[Contender], *, rounds: int, seconds: float, multiple: int
) -> tuple[list[Contender], list[str]]:
    """Run the contenders, A B C A B C.

    Args:
        contenders: not started.
        rounds: turns of each that count, after one or two that warm it up.
        seconds: that a turn should take; its number of images is chosen accordingly.
        multiple: of this many images, so that no thread is idle while another makes the last batch.

    Returns:
        Those that ran, and for each of the others a line that says why not.
    """
    running, skipped = [], []
    begin = time.monotonic()
    try:
        for contender in contenders:
            try:
                contender.start()
                first = contender.turn(multiple)
                rate = first["images"] / first["seconds"]
                contender.images = max(1, round(rate * seconds / multiple)) * multiple
                if contender.images > multiple:  # the first turn said too little about the speed
                    again = contender.turn(contender.images)
                    rate = again["images"] / again["seconds"]
                    contender.images = max(1, round(rate * seconds / multiple)) * multiple
            except (Failed, OSError) as error:
                skipped.append(str(error))
                contender.stop()
                continue
            running.append(contender)
        for _ in range(rounds):
            for contender in list(running):
                try:
                    contender.turns.append(contender.turn(contender.images))
                except Failed as error:
                    skipped.append(str(error))
                    contender.stop()
                    running.remove(contender)
    finally:
        for contender in running:
            contender.stop()
    print(f"{time.monotonic() - begin:.0f} s: {len(running)} programs", file=sys.stderr)
    return running, skipped


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return [values[0]] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def summary(contender: Contender, cores: int) -> dict[str, Any]:
    """Return what a contender's turns come to."""
    low, median, high = (_short(q / cores) for q in quartiles(contender.rates()))
    cpu = statistics.median(turn["cpu"] / turn["images"] for turn in contender.turns)
    busy = statistics.median(turn["cpu"] / turn["seconds"] for turn in contender.turns)
    return {
        "name": contender.name,
        "images_per_second_per_core": median,
        "quartiles": [low, high],
        "cpu_us_per_image": round(1e6 * cpu, 1),
        "share_of_cores": round(busy / cores, 3),
        "images_per_turn": contender.images,
        "turns": len(contender.turns),
        **contender.about,
    }


def ratio(one: Contender, other: Contender) -> dict[str, Any]:
    """Return how many times as fast one is as the other, round by round.

    Returns:
        quartiles: of the ratios of images per second; cpu: the median ratio of images per second of
        processor time, which other work on the machine disturbs less.
    """
    pairs = zip(one.rates(), other.rates(), strict=True)
    spent = ([turn["cpu"] / turn["images"] for turn in who.turns] for who in (other, one))
    cpu = [theirs / mine for theirs, mine in zip(*spent, strict=True) if mine]
    return {
        "one": one.name,
        "other": other.name,
        "quartiles": [_short(q) for q in quartiles([mine / theirs for mine, theirs in pairs])],
        "cpu": _short(statistics.median(cpu)) if cpu else None,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
