"""The command line of nat_jax, which also keeps each process's own copy of the final state.

The tests slow its steps down, so that there is time to interrupt them, and damage a copy:

* STEP_SECONDS: seconds that are added to every step;
* JUDGE_SECONDS: seconds that are added to the last judging;
* DAMAGE_AT: a step before which the last process swaps two rows of its copy of the assignment;
* DIE_AT: a step whose save the last process begins and does not live to end.

Beside that state it writes how many programs came out of JAX's cache of compiled ones.
"""

import collections
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from processes import leaves_of

from nat_jax import main, train
from nat_jax.training import checkpoint


def _keep(config, workdir):
    state = _train(config, workdir)
    np.savez(Path(workdir) / f"state-{jax.process_index()}.npz", **leaves_of(state))
    kept = Path(workdir) / f"programs-{jax.process_index()}"
    kept.write_text(str(events["/jax/compilation_cache/cache_hits"]))
    return state


def _dispatch(self, step, state, batch):
    time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
    if step == int(os.environ.get("DAMAGE_AT", -1)):
        state = dataclasses.replace(state, assignment=_damaged(state.assignment))
    return _dispatch_as_it_is(self, step, state, batch)


def _save(self, step, *arguments):
    _save_as_it_is(self, step, *arguments)
    if step == int(os.environ.get("DIE_AT", -1)) and _is_last():
        os.kill(os.getpid(), signal.SIGKILL)


def _judge_run(*arguments):
    print("judging begins", flush=True)
    time.sleep(float(os.environ.get("JUDGE_SECONDS", 0)))
    return _judge_run_as_it_is(*arguments)


def _damaged(assignment):
    if not _is_last():
        return assignment
    rows = np.asarray(assignment).copy()
    rows[:2] = rows[1::-1]
    copies = [jax.device_put(rows, device) for device in jax.local_devices()]
    return jax.make_array_from_single_device_arrays(rows.shape, assignment.sharding, copies)


def _is_last():
    return jax.process_index() == jax.process_count() - 1


if __name__ == "__main__":
    events = collections.Counter()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    _train, train.train_and_evaluate = train.train_and_evaluate, _keep
    _dispatch_as_it_is, train._Loop._dispatch = train._Loop._dispatch, _dispatch
    _judge_run_as_it_is, train._judge_run = train._judge_run, _judge_run
    _save_as_it_is, checkpoint.Checkpoints.save = checkpoint.Checkpoints.save, _save
    main.run()
