"""How the train step is compiled: for the devices alone, or with the host solving between.

On the device a step is one program. On the host the solvers are the same ones of
``nat_jax.assign``, run by JAX's CPU backend between two programs of the devices: ``ahead`` ends
with the problems, ``behind`` begins with their solution. No callback is involved, and the network
is run once. Each process solves a share of the blocks; a sum over all devices, of about 4 bytes an
image, puts the shares together, so that every device gets the same rows even where the processors
of two hosts round differently. Were all costs exchanged and all blocks solved by every process, it
would take longer from two blocks on (measured in docs/training.md).
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax.errors import InputError
from nat_jax.runtime import sharding
from nat_jax.targets import Targets
from nat_jax.train_step import (
    Forward,
    Metrics,
    Solution,
    Step,
    TrainState,
    batch_shardings,
    deal,
    forward,
    pose,
    solve,
    state_shardings,
    train_step,
    update,
    write_down,
)

logger = logging.getLogger(__name__)

# Metric of steps whose matching the host solved: the seconds of it.
SOLVER_SECONDS = "time/solver_seconds"

Batch = Mapping[str, jax.Array]


def resolve(placement: str, platform: str) -> str:
    """Return "device" or "host" for ``assign.placement`` on the devices of a platform.

    "auto" is the host beside accelerators. There a round of an auction is a handful of small
    operations that wait for each other, and there are a thousand of them in a problem of 256: tens
    of milliseconds as launches on a GPU, by the arithmetic of docs/assignment.md, where a CPU takes
    a few. Nobody has timed it on one. Without a CPU backend, which ``JAX_PLATFORMS`` can leave out,
    it is the device.

    Raises:
        ValueError: the host shall solve, and JAX has no CPU backend.
    """
    if placement == "device" or (placement == "auto" and platform == "cpu"):
        return "device"
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as error:
        if placement == "auto":
            logger.info("the devices solve, as JAX has no CPU backend here (JAX_PLATFORMS)")
            return "device"
        raise InputError(
            f"assign.placement: the host cannot solve, as JAX has no CPU backend ({error}). "
            f"Set JAX_PLATFORMS={platform},cpu or --config.assign.placement=device"
        ) from error
    return "host"


@functools.cache
def compile_step(step: Step, *, reassign: bool) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return ``train_step`` as a compiled function of (state, targets, batch).

    The state is donated. The function is one of ``jax.jit``, or a ``HostStep``.
    """
    if reassign and step.placement == "host":
        return HostStep(step)
    at = state_shardings(step)
    return jax.jit(
        functools.partial(train_step, step, reassign=reassign),
        donate_argnums=0,
        in_shardings=(at, None, batch_shardings(step)),
        out_shardings=(at, sharding.replicated(step.mesh)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posed:
    """What a step hands over from ``ahead`` to ``behind``.

    Attributes:
        result: the forward pass, as ``_without`` packs it.
        rows: int32[B], the rows that the images own.
        cost: float32[K, b, b]; see ``pose``.
    """

    result: "_Packed"
    rows: jax.Array
    cost: jax.Array


def ahead(step: Step, state: TrainState, targets: Targets, batch: Batch) -> Posed:
    """Run the network and pose the assignment problems."""
    result = forward(step.model, state, batch["image"], keep_little=True)
    rows = state.assignment[batch["index"]]
    cost = pose(step, result.features, targets.gather(rows), batch["weight"])
    return Posed(_without(state, result), rows, cost)


def behind(
    step: Step, state: TrainState, targets: Targets, batch: Batch, posed: Posed, said: jax.Array
) -> tuple[TrainState, Metrics]:
    """Deal out the rows and learn from them; ``said`` is what ``HostSolver`` returned."""
    result: Forward = _with(state, posed.result)
    rows, metrics = deal(step, result.features, posed.rows, posed.cost, _together(said))
    state = write_down(state, batch["index"], rows)
    batch_targets = targets.gather(rows)
    state, update_metrics = update(step.optimizer, state, result, batch_targets, batch["weight"])
    return state, {**update_metrics, **metrics}


class HostStep:
    """A train step that re-matches, its problems solved on the host.

    Attributes:
        ahead: the first program, of (state, targets, batch).
        behind: the second, of (state, targets, batch without images, ``Posed``, the solution).
    """

    def __init__(self, step: Step):
        at, of_batch = state_shardings(step), sharding.of_batch(step.mesh)
        self.ahead = jax.jit(functools.partial(ahead, step), in_shardings=(at, None, of_batch))
        self.behind = jax.jit(
            functools.partial(behind, step),
            donate_argnums=0,
            keep_unused=True,  # the old batch statistics, which are donated with the rest
            in_shardings=(at, None, sharding.over_data(step.mesh), None, None),
            out_shardings=(at, sharding.replicated(step.mesh)),
        )
        self._solver = HostSolver(step)

    def __call__(
        self, state: TrainState, targets: Targets, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run a step; wait for the features and the solver, not for the update."""
        posed = self.ahead(state, targets, batch)
        said, seconds = self._solver(posed.cost)
        labels = {name: batch[name] for name in ("index", "weight")}
        state, metrics = self.behind(state, targets, labels, posed, said)
        return state, {**metrics, SOLVER_SECONDS: seconds}


class HostSolver:
    """Solves blocks that lie on the devices of a mesh, on the hosts beside them.

    All processes make the same calls. The blocks of a process's share are divided among the CPU
    devices that JAX has there (JAX_NUM_CPU_DEVICES; by default one), and solved in turn on each.
    """

    def __init__(self, step: Step):
        self._step = step
        owners = [device.process_index for device in step.mesh.devices.flat]
        self._processes = sorted(set(owners))
        self._mouth = owners.index(jax.process_index())  # the device that says what was found here

    def __call__(self, cost: jax.Array) -> tuple[jax.Array, float]:
        """Solve all blocks.

        Args:
            cost: float32[K, b, b], split along "data", or replicated.

        Returns:
            int32[devices, K, b + 3]: each block's packed solution from one device, zeros from the
            others; and the seconds that solving took in this process.
        """
        share = self._share(cost)
        start = time.perf_counter()
        found = self._solve(list(share.values()))
        seconds = time.perf_counter() - start
        packed = np.zeros((cost.shape[0], cost.shape[1] + _EXTRA), np.int32)
        if share:
            packed[list(share)] = found
        nothing = np.zeros_like(packed)

        def says(index: Any) -> np.ndarray:
            return (packed if (index[0].start or 0) == self._mouth else nothing)[None]

        mesh = self._step.mesh
        over_all = NamedSharding(mesh, P(mesh.axis_names))
        return jax.make_array_from_callback((mesh.size, *packed.shape), over_all, says), seconds

    def _share(self, cost: jax.Array) -> dict[int, np.ndarray]:
        """Fetch the blocks that this process shall solve, by number; each is in one share."""
        if cost.is_fully_replicated:
            every = np.asarray(cost.addressable_data(0))
            first = self._processes.index(jax.process_index())
            return {k: every[k] for k in range(first, len(every), len(self._processes))}
        shards = [shard for shard in cost.addressable_shards if shard.replica_id == 0]
        for shard in shards:
            shard.data.copy_to_host_async()
        return {
            shard.index[0].start + k: block
            for shard in shards
            for k, block in enumerate(np.asarray(shard.data))
        }

    def _solve(self, blocks: Sequence[np.ndarray]) -> np.ndarray:
        """Return the packed solutions int32[len(blocks), b + 3]."""
        if not blocks:
            return np.zeros((0, 0), np.int32)
        cpus = jax.local_devices(backend="cpu")
        if self._step.solver == "scipy":
            cpus = cpus[:1]  # it solves in this thread, whatever there is
        count = next(n for n in range(len(cpus), 0, -1) if len(blocks) % n == 0)
        program, where = _on_cpus(self._step, tuple(cpus[:count]))
        return _pack(jax.device_get(program(jax.device_put(np.stack(blocks), where))))


@functools.cache
def _on_cpus(step: Step, cpus: tuple[jax.Device, ...]) -> tuple[Callable, jax.sharding.Sharding]:
    """Return a function that solves blocks on CPU devices side by side, and where these shall be.

    It is one program for all of them, so that it is compiled once.
    """
    if len(cpus) == 1:
        return functools.partial(solve, step), jax.sharding.SingleDeviceSharding(cpus[0])
    mesh = Mesh(np.array(cpus), ("block",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(
        functools.partial(solve, step),
        mesh=mesh,
        in_specs=P("block"),
        out_specs=P("block"),
        check_vma=False,
    )
    return jax.jit(spread), NamedSharding(mesh, P("block"))


# How many numbers stand behind the b columns of a packed solution.
_EXTRA = 3


def _pack(solution: Solution) -> np.ndarray:
    """Give a solution in NumPy as int32[K, b + 3]: one transfer for each device instead of four."""
    numbers = (np.asarray(solution.gap).view(np.int32), solution.rounds, solution.status)
    return np.concatenate([solution.col4row, np.stack(numbers, axis=1)], axis=1)


def _together(said: jax.Array) -> Solution:
    """Give the solution that devices have said parts of; see ``HostSolver``."""
    packed = jnp.sum(said, axis=0, dtype=jnp.int32)
    gap, rounds, status = (packed[:, k - _EXTRA] for k in range(_EXTRA))
    gap = jax.lax.bitcast_convert_type(gap, jnp.float32)
    return Solution(packed[:, :-_EXTRA], gap, rounds, status)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Packed:
    """A pytree without the leaves that the state has too.

    A pullback keeps the parameters. The second program overwrites the state, which no other of its
    arguments may then share; and to copy the parameters would cost their size at every step.
    """

    leaves: list[jax.Array]
    places: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})


def _without(state: TrainState, tree: Any) -> _Packed:
    leaves, structure = jax.tree.flatten(tree)
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(state))}
    places = tuple(numbers.get(id(leaf)) for leaf in leaves)
    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return _Packed(kept, places, structure)


def _with(state: TrainState, packed: _Packed) -> Any:
    shared, kept = jax.tree.leaves(state), iter(packed.leaves)
    leaves = [next(kept) if place is None else shared[place] for place in packed.places]
    return jax.tree.unflatten(packed.structure, leaves)
