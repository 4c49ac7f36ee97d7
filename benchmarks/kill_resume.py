"""Kill a training run at random moments and start it again, many times.

    python benchmarks/kill_resume.py --kills 50 --output docs/results/kill_resume.json

Each round starts the smoke config in a new folder, kills the process (SIGKILL) at a random moment
(one time in five while it starts, else between its first line of output and the end of a run of
usual length), and starts the same command line again, until a run is left to end. The final
checkpoint's state, the metrics and the scores must equal those of an uninterrupted run bit for bit,
and a start that finds a checkpoint must resume from it or a later one.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

from nat_jax.training.checkpoint import Checkpoints
from nat_jax.training.metrics import read_rows

KILLED = -9


def command(workdir: Path, epochs: int) -> list[str]:
    """Return the command line: training alone, saved every third step."""
    return [
        *(sys.executable, "-m", "nat_jax.main"),
        f"--config={measure.ROOT / 'configs' / 'smoke.py'}",
        f"--workdir={workdir}",
        f"--config.epochs={epochs}",
        "--config.eval.every_epochs=0",
        "--config.eval.probes=('knn',)",
        "--config.eval.layers=('z',)",
        "--config.eval.labels_per_class=(0,)",
        "--config.checkpoint.every_epochs=0",
        "--config.checkpoint.every_steps=3",
    ]


def final_state(workdir: Path) -> dict[str, Any]:
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


def run_for(share: float | None, line: list[str], log: Path, *, usual: float) -> int:
    """Run a command line, killed unless it ends before; return its exit status.

    Args:
        share: moment of the kill: below 0 the share of a second from the start; else the share of
            ``usual`` from the first line of output. None lets the run end.
        line: the command line.
        log: file for its output.
        usual: seconds between the first line and the end.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            line, stdout=stream, stderr=stream, env=measure.child_environment()
        )
    if share is not None and share >= 0:
        while not log.stat().st_size and process.poll() is None:
            time.sleep(0.01)
    try:
        seconds = None if share is None else -share if share < 0 else share * usual
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def resumed(log: Path, at_least: int) -> bool:
    """Return whether a start that found a checkpoint went on from it, as far as its log tells."""
    text = log.read_text()
    if found := re.search(r"(?:resumed .* at step|finished .*: all) (\d+) ", text):
        return int(found[1]) >= at_least
    return at_least == 0 or "loss" not in text  # killed before it could log that


def main() -> None:
    """Run the rounds and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=12, help="of a run; the judging is short")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    scratch = Path(tempfile.mkdtemp(prefix="kill_resume_"))

    def run(workdir: Path, share: float | None, log: Path, usual: float = 0) -> tuple[int, float]:
        begin = time.monotonic()
        code = run_for(share, command(workdir, options.epochs), log, usual=usual)
        return code, time.monotonic() - begin

    log = scratch / "log"
    for name in ("first", "second"):  # the first one fills a compilation cache
        code, duration = run(scratch / name, None, log)
        if code:
            sys.exit(log.read_text())
    usual = duration - run(scratch / "start_up", 0, log)[1]
    expected = final_state(scratch / "second")
    if final_state(scratch / "first") != expected:
        sys.exit("two uninterrupted runs differ: nothing to compare with")
    print(f"uninterrupted run: {duration:.1f} s, {expected['step']} steps", flush=True)

    rounds, faults, steps_at_kill = 0, [], []
    while len(steps_at_kill) < options.kills:
        rounds += 1
        workdir, log = scratch / f"round{rounds}", scratch / f"round{rounds}.log"
        code, good = KILLED, True
        while code == KILLED and good:
            saved = saved_step(workdir)
            moment = rng.uniform(-1, 0) if rng.random() < 0.2 else rng.random()
            moment = moment if len(steps_at_kill) < options.kills else None
            code, _ = run(workdir, moment, log, usual)
            good = resumed(log, saved)
            if code == KILLED:
                steps_at_kill.append(saved_step(workdir))
        if good and code == 0 and final_state(workdir) == expected:
            shutil.rmtree(workdir)
        else:
            faults.append(f"round {rounds}, exit status {code}: {log.read_text()[-2000:]}")
        print(f"round {rounds}: {len(steps_at_kill)} kills, {len(faults)} faults", flush=True)
    kills = len(steps_at_kill)
    print(f"{kills} kills in {rounds} runs: {rounds - len(faults)} ended as the uninterrupted one")
    result = {"benchmark": "kill_resume", **measure.environment("nat_jax", "jax")}
    result |= {"seed": options.seed, "kills": kills, "rounds": rounds, "failures": len(faults)}
    result |= {"uninterrupted_seconds": round(duration, 1), "saved_steps_at_kill": steps_at_kill}
    measure.write(options.output, result)
    measure.finish(faults)


if __name__ == "__main__":
    main()
