"""Kill a training run at random moments and start it again, many times.

    python benchmarks/kill_resume.py --kills 50 --output docs/results/kill_resume.json

Each round starts the smoke config in a fresh folder, kills the process (SIGKILL) after a random
time, and starts the same command line again, until a run is left to end. The final checkpoint's
state and the table of scores must equal those of an uninterrupted run bit for bit; a round also
fails when a start after a kill does not resume. Prints a table and writes it as JSON.
"""

import argparse
import datetime
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def command(workdir: Path) -> list[str]:
    """Return the command line: training alone, saved every third step."""
    return [
        sys.executable,
        "-m",
        "nat_jax.main",
        f"--config={ROOT / 'configs' / 'smoke.py'}",
        f"--workdir={workdir}",
        "--config.eval.every_epochs=0",
        "--config.eval.probes=('knn',)",
        "--config.eval.layers=('z',)",
        "--config.eval.labels_per_class=(0,)",
        "--config.checkpoint.every_epochs=None",
        "--config.checkpoint.every_steps=3",
    ]


def final_state(workdir: Path) -> dict:
    """Return the digests of the final checkpoint's leaves, the metrics and the scores."""
    newest = max((workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    record = json.loads((newest / "record" / "metadata").read_text())["record"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": int(newest.name),
        "leaves": {name: leaf["sha256"] for name, leaf in record["leaves"].items()},
        "metrics": [{k: v for k, v in row.items() if "time/" not in k} for row in rows],
        "table": json.loads((workdir / "results" / "table.json").read_text())["table"],
    }


def start(workdir: Path, log: Path) -> subprocess.Popen:
    """Start the run, its output going to a file."""
    with log.open("ab") as stream:
        return subprocess.Popen(command(workdir), stdout=stream, stderr=stream)


def main() -> None:
    """Run the rounds and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    scratch = Path(tempfile.mkdtemp(prefix="kill_resume_"))

    whole = scratch / "whole"
    begin = time.monotonic()
    subprocess.run(command(whole), check=True, capture_output=True)
    duration = time.monotonic() - begin
    expected = final_state(whole)
    print(f"uninterrupted run: {duration:.1f} s, {expected['step']} steps", flush=True)

    kills = rounds = failures = 0
    moments = []
    while kills < arguments.kills:
        rounds += 1
        workdir, log = scratch / f"round{rounds}", scratch / f"round{rounds}.log"
        while True:
            process = start(workdir, log)
            moment = rng.uniform(0.1, 1.2) * duration
            try:
                code = process.wait(timeout=moment if kills < arguments.kills else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                moments.append(round(moment, 2))
        same = code == 0 and final_state(workdir) == expected
        failures += not same
        print(f"round {rounds}: {kills} kills so far, {'equal' if same else 'FAILED'}", flush=True)
        if same:
            shutil.rmtree(workdir)
        else:
            print(log.read_text()[-2000:])
    result = {
        "benchmark": "kill_resume",
        "kills": kills,
        "rounds": rounds,
        "failures": failures,
        "uninterrupted_seconds": round(duration, 1),
        "kill_moments_seconds": moments,
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
