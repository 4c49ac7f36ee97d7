"""What the benchmarks share: clocks, turns, medians, tables, the machine, child processes, JSON.

Standard library only, because programs of other environments (PyTorch, TensorFlow) import it.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


def words(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def log(line: str) -> None:
    """Print progress to standard error."""
    print(line, file=sys.stderr, flush=True)


def core_numbers() -> list[int]:
    """Return the numbers of the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def use_cores(count: int) -> int:
    """Bind this process and its future children to the last `count` cores; return the number."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, core_numbers()[-count:])
    return len(core_numbers())


def cpu_name() -> str:
    """Return the processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def environment(*packages: str) -> dict[str, Any]:
    """Return date, machine, Python and the versions of those packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    count = len(core_numbers())
    of = f"{count} core{'s' * (count > 1)} of {cpu_name()}"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, {of}",
        "python": platform.python_version(),
        **versions,
    }


def described(results: Mapping[str, Any], *packages: str) -> str:
    """Return machine, date and versions of some results as one line."""
    parts = [f"{key} {results[key]}" for key in ("python", *packages) if key in results]
    return f"{results['machine']}, {results['date']}; {', '.join(parts)}"


def cpu_seconds(process: int | None = None) -> float:
    """Return the processor seconds of a process and its living children; 0 without /proc."""
    place = Path("/proc", str(process or os.getpid()))
    try:
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        children = [task.read_text().split() for task in place.glob("task/*/children")]
    except OSError:  # the process has ended, or this is not Linux
        return 0.0
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return own + sum(cpu_seconds(int(child)) for group in children for child in group)


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Call a function that waits for its results; return them, and wall and processor seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def interleave(runners: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield the runners in turn, A B C C B A, so that each follows and precedes the same ones."""
    for number in range(rounds):
        yield from runners if number % 2 == 0 else reversed(runners)


def short(value: float, digits: int = 4) -> float:
    """Round to some significant digits."""
    return float(f"{value:.{digits}g}")


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile, to four digits."""
    if len(values) == 1:
        return [short(values[0])] * 3
    return [short(q) for q in statistics.quantiles(values, n=4, method="inclusive")]


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """Return the quartiles of ratios taken round by round: a slow round slows both sides."""
    return quartiles([a / b for a, b in zip(numerators, denominators, strict=True) if b])


def number(value: float) -> str:
    """Write a number with three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Write a number of bytes with its unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    return text.replace("|  |", "| |").replace("|  |", "| |")


def pivot(corner: str, cells: Mapping[tuple[str, str], str], columns: Iterable[str] = ()) -> str:
    """Return a table of cells by (row, column), empty where there is none."""
    chosen = list(columns) or list(dict.fromkeys(column for _, column in cells))
    rows = dict.fromkeys(row for row, _ in cells)
    return table(
        [corner, *chosen], ([row, *(cells.get((row, c), "") for c in chosen)] for row in rows)
    )


def write(output: Path | None, results: Mapping[str, Any], text: str = "") -> None:
    """Write results as JSON, and their tables to a .md file of the same name, if there are any.

    A program that is killed while it writes leaves the old JSON.
    """
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({k: v for k, v in results.items() if k != "rows"}, indent=1)
        if "rows" in results:  # which may be long: each on a line of its own
            rows = ",\n".join(f"  {json.dumps(row)}" for row in results["rows"])
            head = head.removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}'
        partial = output.with_name(f"{output.name}.part")
        partial.write_text(head + "\n", encoding="utf-8")
        partial.replace(output)
        if text:
            output.with_suffix(".md").write_text(text, encoding="utf-8")


def finish(faults: Sequence[str]) -> None:
    """Exit with status 1 and the faults on standard error, or with 0 if there are none."""
    for fault in faults:
        log(f"FAILED: {fault}")
    sys.exit(bool(faults))


def child_environment(**variables: str) -> dict[str, str]:
    """Return this process's environment with the repository importable."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **variables}


def run_child(program: str, *arguments: str, **variables: str) -> Iterator[dict[str, Any]]:
    """Run a program of this folder in a new process; yield the JSON objects that it prints.

    Raises:
        RuntimeError: its exit status is not 0.
    """
    command = [sys.executable, str(Path(__file__).with_name(program)), *arguments]
    with subprocess.Popen(
        command, env=child_environment(**variables), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"{program} {' '.join(arguments)}: exit status {process.returncode}")
