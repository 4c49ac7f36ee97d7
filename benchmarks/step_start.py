"""How long a new process takes to its first steps; part of ``benchmarks/step.py``.

    python benchmarks/step_start.py convnet

prints one line of JSON: the seconds of the imports, of making the state, and of the first step of
each kind, compilation included. Programs are kept where training keeps them
(``nat_jax.runtime.cache_dir``).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

_LIMIT = 600  # seconds that a process may take


def measure(problem: str, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Start two processes, one after the other, that keep their programs in one empty folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
    with tempfile.TemporaryDirectory() as folder:
        environment |= {"NAT_JAX_CACHE": folder}
        for programs in ("compiled", "kept"):
            done = subprocess.run(
                [sys.executable, __file__, problem],
                env=environment,
                capture_output=True,
                text=True,
                timeout=_LIMIT,
            )
            if done.returncode:
                raise RuntimeError(f"{problem}: {done.stderr[-2000:]}")
            row = {"programs": programs, **json.loads(done.stdout.splitlines()[-1])}
            say(f"first steps of {row['problem']}, programs {programs}: {row['seconds']}")
            yield row


def first_steps(name: str) -> dict[str, Any]:
    """Do the first step of each kind; return the seconds, each from the end of the one before."""
    begin = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(what: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[what], begin = round(now - begin, 2), now

    import jax
    import jax.numpy as jnp
    from step_contenders import PLAIN, PROBLEMS, make_batches, of_library

    from nat_jax.runtime import cache_dir

    cache_dir.keep_programs()
    jax.block_until_ready(jnp.zeros(1) + 1)
    lap("imports and JAX")
    problem = PROBLEMS[name]
    batches = make_batches(problem, seed=0)
    lap("data")
    kinds: dict[str, dict[str, Any]] = {
        PLAIN: {},
        f"{PLAIN}, re-matching, device": dict(reassign=True, placement="device"),
        f"{PLAIN}, re-matching, host": dict(reassign=True, placement="host"),
    }
    for kind, settings in kinds.items():
        contender = of_library(problem, batches, kind, seed=0, **settings)
        jax.block_until_ready(contender.state)
        lap(f"state of {kind}")
        contender.turn(1)
        lap(kind)
    return {"problem": problem.name, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(first_steps(sys.argv[1])))
