"""Checkpoints of processes that are killed in the middle of a save, or that save together."""

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import free_port, run_program

from nat_jax.training.checkpoint import Checkpoints

SAVE_FOR_EVER = """
import pathlib, sys
import jax, jax.numpy as jnp
from nat_jax.training.checkpoint import Checkpoints

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
step = checkpoints.latest_step() or 0
while True:
    step += 1
    rows = jnp.roll(jnp.arange(64, dtype=jnp.int32), step)
    w = jnp.full((8, 200_000), step, jnp.float32)
    checkpoints.save(step, {"w": w, "key": jax.random.key(step), "assignment": rows}, {})
    checkpoints.wait()
    print(step, flush=True)
"""


def test_kill_during_a_save_leaves_the_older_one(tmp_path: Path) -> None:
    like = {
        "w": jnp.zeros((8, 200_000)),
        "key": jax.random.key(0),
        "assignment": jnp.arange(64, dtype=jnp.int32),
    }
    leftovers = 0
    for attempt in range(8):
        saver = run_program(SAVE_FOR_EVER, str(tmp_path))
        assert saver.stdout is not None
        done = int(saver.stdout.readline())
        while not (half := list(tmp_path.glob("*.orbax-checkpoint-tmp*"))):
            pass  # a save is a few milliseconds long: wait for the next to begin
        saver.send_signal(signal.SIGKILL)
        saver.wait()
        done = max([done, *map(int, saver.stdout.read().split())])
        saver.stdout.close()
        leftovers += any(path.exists() for path in half)

        opened = Checkpoints(tmp_path)
        assert all(path.name.isdecimal() for path in tmp_path.iterdir())
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like
        )
        state, _ = opened.restore(abstract, expect={})
        step = opened.latest_step()
        opened.close()
        assert step is not None and step >= done
        assert (state["w"] == step).all()
        assert np.array_equal(state["assignment"], np.roll(np.arange(64), step))
        if leftovers and attempt:
            break
    assert leftovers, "no save was under way when the process was killed"


TWO_PROCESSES = """
import pathlib, sys
import jax
folder, port, rank = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from nat_jax.training.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split, copy = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

def put(array, sharding):
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

def state(step):
    return {
        "w": put(np.random.default_rng(step).normal(size=(64, 50)), copy),
        "key": jax.jit(lambda: jax.random.key(step), out_shardings=copy)(),
        "assignment": put(np.roll(np.arange(1024, dtype=np.int32), step), split),
    }

def restored():
    checkpoints = Checkpoints(folder)
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0))
    out, meta = checkpoints.restore(like, expect={})
    rows = multihost_utils.process_allgather(out["assignment"], tiled=True)
    assert np.array_equal(rows, np.roll(np.arange(1024), meta["seed"])), rows
    return checkpoints, meta["seed"]

checkpoints = Checkpoints(folder)
for step in (1, 2):
    checkpoints.save(step, state(step), {"seed": step})
checkpoints.close()
if rank == 0:
    for path in (folder / "2" / "state").rglob("d/*"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 16
        path.write_bytes(data)
multihost_utils.sync_global_devices("damaged")
checkpoints, seed = restored()
assert seed == 1, seed
checkpoints.save(2, state(7), {"seed": 7})
checkpoints.close()
checkpoints, seed = restored()
assert seed == 7, seed
checkpoints.close()
print("restored on", rank)
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_save_and_fall_back_together(tmp_path: Path) -> None:
    port = str(free_port())
    ranks = [
        run_program(TWO_PROCESSES, str(tmp_path), port, str(rank), devices=2) for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, output in enumerate(outputs):
        assert f"restored on {rank}" in output
    assert (tmp_path / "2.damaged").is_dir()
