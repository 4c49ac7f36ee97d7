"""The command line of nat_jax, which also keeps each process's own copy of the final state.

The tests slow its steps down, so that there is time to interrupt them, and damage a copy:

* STEP_SECONDS: seconds that are added to every step;
* JUDGE_SECONDS: seconds that are added to the last judging;
* DAMAGE_AT: a step before which the last process swaps two rows of its copy of the assignment.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax
import numpy as np

from nat_jax import main, train


def _keep(config, workdir):
    state = _train(config, workdir)
    flat = jax.tree_util.tree_flatten_with_path(
        dataclasses.replace(state, key=jax.random.key_data(state.key))
    )[0]
    leaves = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
    np.savez(Path(workdir) / f"state-{jax.process_index()}.npz", **leaves)
    return state


def _dispatch(self, step, state, batch):
    time.sleep(float(os.environ.get("STEP_SECONDS", 0)))
    if step == int(os.environ.get("DAMAGE_AT", -1)):
        state = dataclasses.replace(state, assignment=_damaged(state.assignment))
    return _dispatch_as_it_is(self, step, state, batch)


def _judge_run(*arguments):
    print("judging begins", flush=True)
    time.sleep(float(os.environ.get("JUDGE_SECONDS", 0)))
    return _judge_run_as_it_is(*arguments)


def _damaged(assignment):
    if jax.process_index() != jax.process_count() - 1:
        return assignment
    rows = np.asarray(assignment).copy()
    rows[:2] = rows[1::-1]
    copies = [jax.device_put(rows, device) for device in jax.local_devices()]
    return jax.make_array_from_single_device_arrays(rows.shape, assignment.sharding, copies)


if __name__ == "__main__":
    _train, train.train_and_evaluate = train.train_and_evaluate, _keep
    _dispatch_as_it_is, train._Loop._dispatch = train._Loop._dispatch, _dispatch
    _judge_run_as_it_is, train._judge_run = train._judge_run, _judge_run
    main.run()
