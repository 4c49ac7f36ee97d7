"""Kill a training run at random moments and start it again, many times.

    python benchmarks/kill_resume.py --kills 50 --output docs/results/kill_resume.json

Each round starts the smoke config in a fresh folder, kills the process (SIGKILL) at a random moment
(one time in five while it starts, else between its first line of output and the end of a run of
usual length), and starts the same command line again, until a run is left to end. The final
checkpoint's state, the metrics and the scores must equal those of an uninterrupted run bit for bit,
and a start that finds a checkpoint must say that it resumed from it or a later one. Prints what
happened to each round, and writes the sums as JSON.
"""

import argparse
import datetime
import json
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nat_jax.training.checkpoint import Checkpoints
from nat_jax.training.metrics import read_rows

ROOT = Path(__file__).parents[1]


def command(workdir: Path) -> list[str]:
    """Return the command line: training alone, saved every third step."""
    return [
        sys.executable,
        "-m",
        "nat_jax.main",
        f"--config={ROOT / 'configs' / 'smoke.py'}",
        f"--workdir={workdir}",
        "--config.epochs=12",  # long beside the judging that follows
        "--config.eval.every_epochs=0",
        "--config.eval.probes=('knn',)",
        "--config.eval.layers=('z',)",
        "--config.eval.labels_per_class=(0,)",
        "--config.checkpoint.every_epochs=0",
        "--config.checkpoint.every_steps=3",
    ]


def final_state(workdir: Path) -> dict:
    """Return the digests of the final checkpoint's leaves, the metrics and the scores."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    rows = read_rows(workdir)
    return {
        "step": checkpoints.latest_step(),
        "leaves": checkpoints.digests(),
        "metrics": [{k: v for k, v in row.items() if "time/" not in k} for row in rows],
        "table": json.loads((workdir / "results" / "pretrain.json").read_text())["table"],
    }


def saved_step(workdir: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    names = [path.name for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(map(int, names), default=0)


def run_for(share: float | None, workdir: Path, log: Path, *, usual: float) -> int:
    """Run the command line, killed unless it ends before; return its code.

    Args:
        share: moment of the kill: below 0 the share of a second from the start; else the share of
            ``usual`` from the first line of output. None lets the run end.
        workdir: of the run.
        log: file for its output.
        usual: seconds between the first line and the end.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(command(workdir), stdout=stream, stderr=stream)
    if share is not None and share >= 0:
        while not log.stat().st_size and process.poll() is None:
            time.sleep(0.01)
    try:
        seconds = None if share is None else -share if share < 0 else share * usual
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def start_up(scratch: Path) -> float:
    """Return the seconds from a process's start to its first line of output."""
    begin = time.monotonic()
    run_for(0, scratch / "start_up", scratch / "log", usual=0)
    return time.monotonic() - begin


def resumed(log: Path, at_least: int) -> bool:
    """Say whether a start that found a checkpoint went on from it, as far as its output tells."""
    text = log.read_text()
    found = re.search(r"(?:resumed .* at step|finished .*: all) (\d+) ", text)
    if found:
        return int(found[1]) >= at_least
    return at_least == 0 or "loss" not in text  # killed before it could say


def main() -> None:
    """Run the rounds and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    scratch = Path(tempfile.mkdtemp(prefix="kill_resume_"))

    for whole in (scratch / "first", scratch / "whole"):  # the first one fills a compilation cache
        begin = time.monotonic()
        if run_for(None, whole, scratch / "log", usual=0):
            sys.exit((scratch / "log").read_text())
        duration = time.monotonic() - begin
    usual = duration - start_up(scratch)
    expected = final_state(whole)
    if final_state(scratch / "first") != expected:
        sys.exit("two uninterrupted runs differ: nothing to compare with")
    print(
        f"uninterrupted run: {duration:.1f} s, {usual:.1f} s of it after its first line, "
        f"{expected['step']} steps",
        flush=True,
    )

    kills = rounds = failures = 0
    steps_at_kill = []
    while kills < arguments.kills:
        rounds += 1
        workdir, log = scratch / f"round{rounds}", scratch / f"round{rounds}.log"
        code, good = -9, True
        while code == -9 and good:
            saved = saved_step(workdir)
            moment = rng.uniform(-1, 0) if rng.random() < 0.2 else rng.random()
            moment = moment if kills < arguments.kills else None
            code = run_for(moment, workdir, log, usual=usual)
            good = resumed(log, saved)
            if code == -9:
                kills += 1
                steps_at_kill.append(saved_step(workdir))
        good = good and code == 0 and final_state(workdir) == expected
        failures += not good
        print(f"round {rounds}: {kills} kills so far, {'equal' if good else 'FAILED'}", flush=True)
        if good:
            shutil.rmtree(workdir)
        else:
            print(log.read_text()[-2000:])
    result = {
        "benchmark": "kill_resume",
        "kills": kills,
        "rounds": rounds,
        "failures": failures,
        "uninterrupted_seconds": round(duration, 1),
        "saved_steps_at_kill": steps_at_kill,
        "seed": arguments.seed,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
    }
    print(f"{kills} kills in {rounds} runs: {rounds - failures} ended as the uninterrupted one")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
