"""What a run says about itself: rows on disk, the progress on the terminal, and its health."""

import collections
import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from scipy.special import betaincinv

# Steps of each kind whose durations are compared to find the share of matching.
_DURATIONS = 50

# Columns of a terminal that does not report its width.
_USUAL_WIDTH = 100

# Features count as collapsed when their effective rank lies this near to 1, on the way from 1 (all
# coincide) to that of points spread evenly over the sphere.
_COLLAPSED_SHARE = 0.05

# An average cosine this much above chance is more than the noise of one batch.
_ABOVE_CHANCE = 0.02


class MetricsWriter:
    """Append rows to ``metrics.jsonl``, and to TensorBoard when asked; process 0 alone writes."""

    def __init__(
        self, workdir: Path, *, resume_step: int | None, tensorboard: bool = False
    ) -> None:
        """Open a run's rows, without those that a resumed run is about to write again.

        Args:
            workdir: folder of the run; created if missing.
            resume_step: rows of later steps are dropped; None keeps them all. A last line torn by
                a kill is dropped in either case.
            tensorboard: also write event files to ``workdir/tensorboard``.

        Raises:
            ImportError: if TensorBoard is asked for and tensorboardX is not installed.
        """
        self._file: TextIO | None = None
        self._events: Any = None
        if jax.process_index() != 0:
            return
        if tensorboard:
            self._events = _open_events(workdir / "tensorboard", resume_step)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        if path.exists():
            _drop_rows(path, resume_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, float]) -> None:
        """Append one row; what is not finite is written as null.

        Args:
            row: metric names to numbers; must hold "step".

        Raises:
            ValueError: if "step" is missing.
        """
        if "step" not in row:
            raise ValueError(f"metrics row: expected a 'step'; got {sorted(row)}")
        if self._file is None:
            return
        clean = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._events is not None:
            for key, value in row.items():
                if key != "step":
                    self._events.add_scalar(key, value, int(row["step"]))

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()


def _drop_rows(path: Path, resume_step: int | None) -> None:
    kept = [
        line + "\n"
        for row, line in _whole_rows(path)
        if resume_step is None or row["step"] <= resume_step
    ]
    new = path.with_suffix(".jsonl.new")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)


def _open_events(folder: Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "log.tensorboard=True needs tensorboardX, which is not installed: "
            "pip install 'nat_jax[tensorboard]', or set --config.log.tensorboard=False"
        ) from error
    purge = None if resume_step is None else resume_step + 1
    return SummaryWriter(str(folder), purge_step=purge)


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's ``metrics.jsonl``; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    return [row for row, _ in _whole_rows(path)] if path.exists() else []


def _whole_rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Give the rows of a file with their text, without a last one torn by a kill."""
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
        """Leave the time inside, an evaluation for instance, out of everything."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start
        self._last_step = None

    def step(self, images: int, *, matched: bool, solving: float | None = None) -> None:
        """Count a finished step over ``images`` images; ``matched`` if it re-dealt rows.

        ``solving`` is for how many seconds the host solved and the devices waited, where it did.
        """
        now = time.perf_counter()
        if self._last_step is not None:
            self._durations[matched].append(now - self._last_step)
        self._last_step = now
        self._images += images
        self._steps += 1
        self._matched += matched
        if solving is not None:
            self._solving = (self._solving or 0.0) + solving

    def window(self) -> dict[str, float]:
        """Return the measurements since the last call, and start anew.

        Returns:
            time/images_per_second; time/data_share, the share of time spent waiting for data; and
            time/match_share: the share of time that the host solved; where the devices solve, the
            share that matching added, from the median durations of steps with and without it, once
            both have been seen.
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
    """Show a run's progress: a bar on a terminal, else one plain line per row; process 0 alone."""

    def __init__(
        self, *, start: int, total: int, stream: TextIO | None = None, bar: bool | None = None
    ) -> None:
        """Begin to show.

        Args:
            start: steps that were done before.
            total: steps of the whole run.
            stream: where to write; standard error by default.
            bar: True for a bar, False for lines; by default a bar if ``stream`` is a terminal.
        """
        self._stream = stream or sys.stderr
        self._total = total
        self._first: tuple[int, float] | None = None
        self._latest: dict[str, float] = {}
        self._bar: Any = None
        self._shown = jax.process_index() == 0
        if self._shown and (self._stream.isatty() if bar is None else bar):
            from tqdm import tqdm

            known = _has_width(self._stream)
            self._bar = tqdm(
                total=total,
                initial=start,
                unit="step",
                file=self._stream,
                dynamic_ncols=known,
                ncols=None if known else _USUAL_WIDTH,
                nrows=None if known else 2,
            )

    def update(self, row: Mapping[str, float]) -> None:
        """Show a row of metrics; one of an evaluation is always a line of its own."""
        if not self._shown:
            return
        step = int(row["step"])
        scores = {k.split("/", 1)[1]: v for k, v in row.items() if k.startswith("eval/")}
        if scores:
            shown = [f"{k.removesuffix('/all')} {v:.3f}" for k, v in scores.items() if "/all" in k]
            self._line(f"step {step}/{self._total}  judged: " + "  ".join(shown or ["few labels"]))
            return
        if self._bar is None:
            self._line(f"step {step}/{self._total}  {_summary(row)}{self._eta(step)}")
            return
        self._latest |= row  # steps that do not match have no cosines: the bar shows the last ones
        self._bar.set_postfix_str(_summary(self._latest, brief=True), refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def _eta(self, step: int) -> str:
        """Estimate from the rows after the first, which compilation makes slow."""
        now = time.perf_counter()
        if self._first is None:
            self._first = step, now
            return ""
        start, since = self._first
        seconds = round((now - since) / max(step - start, 1) * max(self._total - step, 0))
        return f"  ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _has_width(stream: TextIO) -> bool:
    """Say whether a terminal reports its width; where it says 0, tqdm would draw nothing."""
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


def chance_cosine(n: int, dim: int) -> float:
    """Return the average cosine that matching reaches between features and rows without relation.

    The 1 - 1/n quantile of the cosine between a random direction and a fixed one in ``dim``
    dimensions, (1 + cosine) / 2 being Beta((D-1)/2, (D-1)/2): what the best of n rows offers. An
    optimal matching of uniform points comes within a few percent of it. For large D it falls as
    sqrt(2 ln n / D), which exceeds 1 when D is small.

    Args:
        n: images that are matched together, at least 1.
        dim: D, the feature dimension, at least 1.
    """
    if n < 1 or dim < 1:
        raise ValueError(f"chance_cosine: expected n >= 1 and dim >= 1; got n={n}, dim={dim}")
    if n == 1:
        return 0.0
    if dim == 1:
        return 1.0
    half = (dim - 1) / 2
    return float(2 * betaincinv(half, half, 1 - 1 / n) - 1)


def health(
    row: Mapping[str, float],
    *,
    n: int,
    dim: int,
    kind: str = "sphere",
    matched_epoch: int | None = None,
) -> list[str]:
    """Say in words how a run is doing; what needs attention begins with "warning:".

    Args:
        row: the latest value of each metric; what is missing or not finite is not judged, a loss
            that is not finite is reported.
        n: images that are matched together (``assign.block``, or the global batch).
        dim: D, the feature dimension.
        kind: of the targets; the chance level is known for "sphere" only.
        matched_epoch: the last epoch that re-matched its batches, counted from 0.
    """
    finite = {k: v for k, v in row.items() if v is not None and math.isfinite(v)}
    said = []
    if "train/loss" in row and "train/loss" not in finite:
        said.append("warning: the loss is not finite; lower optim.learning_rate")
    spread, collapsed = _spread_health(finite, n, dim)
    if not collapsed:
        said += _matching_health(finite, n, dim, kind, matched_epoch)
    said += spread
    if finite.get("assign/worst_status", 0):
        said.append(
            "warning: the solver did not reach its optimum in every block (rows are still a "
            "permutation); see assign/gap and assign.options"
        )
    return said


def _matching_health(
    row: Mapping[str, float], n: int, dim: int, kind: str, matched_epoch: int | None
) -> list[str]:
    if not {"assign/cosine_before", "assign/cosine_after"} <= row.keys():
        return []
    before, after = row["assign/cosine_before"], row["assign/cosine_after"]
    when = "" if matched_epoch is None else f" in epoch {matched_epoch}"
    text = (
        f"before re-matching{when}, features pointed to the targets that their images already "
        f"owned with cosine {before:.3f} (without learning 0)"
    )
    if matched_epoch == 0:
        said = ["batches were re-matched in epoch 0 only, which is too early to judge"]
    elif kind != "sphere":
        said = [text]
    elif before < max(_ABOVE_CHANCE, 3 / math.sqrt(n * dim)):
        said = [f"{text}: nothing is learnt yet, which is normal in the first epochs only"]
    else:
        said = [f"{text}: it is learning"]
    if kind == "sphere":
        said.append(
            f"re-matching raised it to {after:.3f}; features without any learning reach about "
            f"{chance_cosine(n, dim):.3f}"
        )
    if after < before - 1e-4:
        said.append("warning: matching lowered the cosine, which no correct matching can do")
    if "assign/moved" in row:
        said.append(
            f"{row['assign/moved']:.0%} of the images took another target; all do at the start, "
            "fewer as the matching settles"
        )
    return said


def _spread_health(row: Mapping[str, float], n: int, dim: int) -> tuple[list[str], bool]:
    """Return what to say of the features' spread, and whether they collapsed."""
    if "features/effective_rank" not in row:
        return [], False
    rank = row["features/effective_rank"]
    even = 1 / (1 / n + (1 - 1 / n) / dim)
    text = f"effective rank of the features {rank:.1f}, of {even:.1f} when spread evenly"
    if rank - 1 < _COLLAPSED_SHARE * (even - 1):
        return [
            f"warning: {text}: the features collapse. Lower optim.learning_rate, or match more "
            "images together (batch_size, assign.block)"
        ], True
    return [text], False
