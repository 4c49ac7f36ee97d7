"""Metrics of a run: rows on disk, the progress on the terminal, timing."""

import collections
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import jax

from nat_jax.errors import UserError
from nat_jax.runtime import atomic_files

# Steps of each kind whose durations are compared to find the share of matching.
_DURATIONS = 50

# Columns of a terminal that does not report its width.
_USUAL_WIDTH = 100

# Between two lines on a loop inside an evaluation, where there is no terminal.
SECONDS = 10.0

T = TypeVar("T")


class MissingPackage(UserError, ImportError):
    """An optional package is needed and not installed."""


class MetricsWriter:
    """Append rows to ``metrics.jsonl``, and to TensorBoard if enabled; only process 0 writes."""

    def __init__(
        self, workdir: Path, *, resume_step: int | None, tensorboard: bool = False
    ) -> None:
        """Open a run's rows, and drop those that a resumed run will write again.

        Args:
            workdir: folder of the run; created if missing.
            resume_step: rows of later steps are dropped; None keeps them all. An incomplete last
                line, left by a kill, is dropped in either case.
            tensorboard: also write event files to ``workdir/tensorboard``.

        Raises:
            MissingPackage: TensorBoard is enabled and tensorboardX is not installed.
        """
        self._file: TextIO | None = None
        self._path = workdir / "metrics.jsonl"
        self._events: Any = None
        if jax.process_index() != 0:
            return
        if tensorboard:
            self._events = _open_events(workdir / "tensorboard", resume_step)
        workdir.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            _drop_rows(self._path, resume_step)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; values that are not finite are written as null.

        Args:
            row: metric names to numbers; must hold "step".

        Raises:
            ValueError: if "step" is missing.
            CannotWrite: the disk is full, for instance.
        """
        if "step" not in row:
            raise ValueError(f"metrics row: expected a 'step'; got {sorted(row)}")
        if self._file is None:
            return
        clean = {key: value if math.isfinite(value) else None for key, value in row.items()}
        with atomic_files.writing(self._path):
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        if self._events is not None:
            for key, value in row.items():
                if key != "step":
                    self._events.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            with atomic_files.writing(self._path):  # the row that could not be written, again
                self._file.close()
        if self._events is not None:
            self._events.close()


def _drop_rows(path: Path, resume_step: int | None) -> None:
    kept = [
        line + "\n"
        for row, line in _complete_rows(path)
        if resume_step is None or row["step"] <= resume_step
    ]
    atomic_files.write(path, "".join(kept).encode())


def _open_events(folder: Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingPackage(
            "log.tensorboard=True needs tensorboardX, which is not installed: "
            "pip install 'nat_jax[tensorboard]', or set --config.log.tensorboard=False"
        ) from error
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    return [row for row, _ in _complete_rows(path)] if path.exists() else []


def _complete_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a file with their text, without an incomplete last line."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            yield row, line


class Timer:
    """Measure the loop since the last window: images per second, and where the time went."""

    def __init__(self) -> None:
        self._durations: dict[bool, collections.deque[float]] = {
            matched: collections.deque(maxlen=_DURATIONS) for matched in (False, True)
        }
        self._last_step: float | None = None
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._paused = 0.0
        self._images = self._matched = self._steps = 0
        self._solving: float | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside, of an evaluation for instance, from all measurements."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start
        self._last_step = None

    def step(self, images: int, *, matched: bool) -> None:
        """Count a finished step over ``images`` images; ``matched`` if it reassigned rows."""
        now = time.perf_counter()
        if self._last_step is not None:
            self._durations[matched].append(now - self._last_step)
        self._last_step = now
        self._images += images
        self._steps += 1
        self._matched += matched

    def solved(self, seconds: float) -> None:
        """Count seconds of matching in which no step ran."""
        self._solving = (self._solving or 0.0) + seconds

    def window(self) -> dict[str, float]:
        """Return the measurements since the last call, and start a new window.

        Returns:
            time/images_per_second; time/data_share, the share of time spent waiting for data; and
            time/match_share, the share of time for matching between steps or on the host; if the
            devices match in their steps, the share that matching added, from the median durations
            of steps with and without it, once both have been seen.
        """
        elapsed = max(time.perf_counter() - self._start - self._paused, 1e-9)
        row = {
            "time/images_per_second": self._images / elapsed,
            "time/data_share": min(self._waited / elapsed, 1.0),
        }
        if self._solving is not None:
            row["time/match_share"] = min(self._solving / elapsed, 1.0)
        elif self._matched and all(self._durations.values()):
            plain, matching = (statistics.median(self._durations[kind]) for kind in (False, True))
            added = max(0.0, 1.0 - plain / max(matching, 1e-9))
            row["time/match_share"] = added * self._matched / self._steps
        self._restart()
        return row


class Progress:
    """Show how far a loop is: a bar on a terminal, else lines; only process 0 does."""

    def __init__(
        self,
        *,
        start: int,
        total: int,
        unit: str = "step",
        title: str = "",
        every: float = 0.0,
        stream: TextIO | None = None,
        bar: bool | None = None,
    ) -> None:
        """Start the display.

        Args:
            start: units done before.
            total: units of the complete loop; 0 if they are not known.
            unit: what is counted.
            title: what is done, in front of the numbers; a bar with a title disappears at the end.
            every: seconds between two lines, at least; 0 for a line at each update.
            stream: output; standard error by default.
            bar: True for a bar, False for lines; by default a bar if ``stream`` is a terminal.
        """
        self._stream = stream or sys.stderr
        self.total, self._unit = total, unit
        self._title, self._every = title, every
        self._first: tuple[int, float] | None = None
        self._last_line = time.perf_counter()
        self._latest: dict[str, float] = {}
        self._bar: Any = None
        self._shown = jax.process_index() == 0
        if self._shown and (self._stream.isatty() if bar is None else bar):
            from tqdm import tqdm

            known = _has_width(self._stream)
            self._bar = tqdm(
                desc=title or None,
                total=total or None,
                initial=start,
                unit=unit,
                leave=not title,
                file=self._stream,
                dynamic_ncols=known,
                ncols=None if known else _USUAL_WIDTH,
                nrows=None if known else 2,
            )

    def update(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics; a row of an evaluation always gets its own line."""
        step = int(row["step"])
        scores = {k.split("/", 1)[1]: v for k, v in row.items() if k.startswith("eval/")}
        if scores and self._shown:
            shown = [f"{k.removesuffix('/all')} {v:.3f}" for k, v in scores.items() if "/all" in k]
            self._line(
                f"step {step}/{self.total}  evaluated: " + "  ".join(shown or ["few labels"])
            )
        elif not scores:
            self._latest |= row  # steps that do not match have no cosines: a bar shows the last
            brief = self._bar is not None
            self.show(step, _summary(self._latest if brief else row, brief=brief))

    def show(self, done: int, text: str = "") -> None:
        """Show that so many units are done, and a text."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.total = self.total or None
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.perf_counter()
        self._first = self._first or (done, now)
        if now - self._last_line >= self._every:
            self._last_line = now
            counted = f"{self._unit} {done}" + (f"/{self.total}" if self.total else "")
            title = f"{self._title}: " if self._title else ""
            self._line("  ".join(filter(None, (title + counted, text, self._eta(done, now)))))

    def close(self) -> None:
        """End the display; the bar of a run stays visible."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _eta(self, done: int, now: float) -> str:
        """Return the remaining time, estimated without the first unit, which includes compiling."""
        assert self._first is not None
        start, since = self._first
        if done == start or not self.total:
            return ""
        seconds = round((now - since) / (done - start) * max(self.total - done, 0))
        return f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def shown(items: Iterable[T], total: int, title: str, unit: str = "batch") -> Iterator[T]:
    """Yield the items of a loop that may take long, and show how many are done."""
    progress = Progress(start=0, total=total, unit=unit, title=title, every=SECONDS)
    with contextlib.closing(progress):
        for done, item in enumerate(items, 1):
            yield item
            progress.show(done)


def _has_width(stream: TextIO) -> bool:
    """Return whether a terminal reports its width; if it reports 0, tqdm draws nothing."""
    try:
        return os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _summary(row: Mapping[str, float], *, brief: bool = False) -> str:
    parts = []
    if "train/loss" in row:
        parts.append(f"loss {row['train/loss']:.4f}")
    if "assign/cosine_before" in row and "assign/cosine_after" in row:
        before, after = row["assign/cosine_before"], row["assign/cosine_after"]
        parts.append(f"cosine {before:.3f} -> {after:.3f}")
    if "assign/moved" in row and not brief:
        parts.append(f"moved {row['assign/moved']:.0%}")
    if "time/images_per_second" in row:
        parts.append(f"{row['time/images_per_second']:,.0f} img/s")
    for name in () if brief else ("data", "match"):
        if (share := row.get(f"time/{name}_share")) is not None:
            parts.append(f"{name} {share:.0%}")
    return "  ".join(parts)
