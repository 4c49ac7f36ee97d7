"""Compiled train steps: one program on the devices, or two with the host solving in between.

Host solving runs the solvers of ``nat_jax.assign`` on JAX's CPU backend between two programs of
the devices: the first ends with the costs (``train_step.pre_match``), the second begins with their
solution (``train_step.post_match``). There is no callback and one forward pass. Each process
solves a share of the blocks; a sum over all devices, of about 4 bytes an image, combines the
shares, so that every device gets the same rows even where the processors of two hosts round
differently. Exchanging all costs and solving every block in every process takes longer from two
blocks on (measured in docs/training.md).
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax.errors import InputError
from nat_jax.models import on_cpu
from nat_jax.runtime import sharding
from nat_jax.targets import Targets
from nat_jax.train_step import (
    Batch,
    MatchProblem,
    Metrics,
    Solution,
    Step,
    TrainState,
    batch_shardings,
    post_match,
    pre_match,
    solve,
    state_shardings,
    train_step,
)

logger = logging.getLogger(__name__)

# Metric of steps whose matching the host solved: seconds in the solver.
SOLVER_SECONDS = "time/solver_seconds"


def resolve(placement: str, platform: str) -> str:
    """Return "device" or "host" for ``assign.placement`` on the devices of a platform.

    "auto" is the host if there are accelerators. A round of an auction there is a handful of small
    operations that wait for each other, and a problem of 256 takes a thousand rounds: tens of
    milliseconds of launches on a GPU, by the arithmetic of docs/assignment.md, against a few on a
    CPU; it has not been timed on a GPU. Without a CPU backend, which ``JAX_PLATFORMS`` can leave
    out, "auto" is the device.

    Raises:
        InputError: ``placement`` is "host", and JAX has no CPU backend.
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
        compiler_options=on_cpu.compiler_options(step.model.platform),
    )


class HostStep:
    """A train step that reassigns, with its problems solved on the host.

    Attributes:
        pre_match: the first program, of (state, targets, batch) to a ``MatchProblem`` whose
            ``result`` leaves out what the state holds too.
        post_match: the second, of (state, targets, batch without images, that problem, packed
            solutions).
    """

    def __init__(self, step: Step):
        at, batch_at = state_shardings(step), batch_shardings(step)

        def step_before_match(state: TrainState, targets: Targets, batch: Batch) -> MatchProblem:
            problem = pre_match(step, state, targets, batch, rematerialize=True)
            return problem._replace(result=_without_shared(state, problem.result))

        def step_after_match(
            state: TrainState,
            targets: Targets,
            batch: Batch,
            problem: MatchProblem,
            packed_solutions: jax.Array,
        ) -> tuple[TrainState, Metrics]:
            problem = problem._replace(result=_with_shared(state, problem.result))
            solution = unpack_solutions(packed_solutions)
            return post_match(step, state, targets, batch, problem, solution)

        options = on_cpu.compiler_options(step.model.platform)
        self.pre_match = jax.jit(
            step_before_match, in_shardings=(at, None, batch_at), compiler_options=options
        )
        self.post_match = jax.jit(
            step_after_match,
            donate_argnums=0,
            keep_unused=True,  # the old batch statistics, which are donated with the rest
            in_shardings=(at, None, sharding.over_data(step.mesh), None, None),
            out_shardings=(at, sharding.replicated(step.mesh)),
            compiler_options=options,
        )
        self._solver = HostSolver(step)

    def __call__(
        self, state: TrainState, targets: Targets, batch: Batch
    ) -> tuple[TrainState, dict[str, Any]]:
        """Run a step; wait for the features and the solver, not for the update."""
        problem = self.pre_match(state, targets, batch)
        packed_solutions, seconds = self._solver(problem.cost)
        small = {name: batch[name] for name in ("index", "weight")}
        state, metrics = self.post_match(state, targets, small, problem, packed_solutions)
        return state, {**metrics, SOLVER_SECONDS: seconds}


class HostSolver:
    """Solves blocks that lie on the devices of a mesh, on their hosts.

    All processes make the same calls. The blocks of a process's share are divided among its JAX
    CPU devices (JAX_NUM_CPU_DEVICES; one by default), and solved in turn on each.
    """

    def __init__(self, step: Step):
        self._step = step
        owners = [device.process_index for device in step.mesh.devices.flat]
        self._processes = sorted(set(owners))
        self._reporter = owners.index(jax.process_index())  # the device that holds our solutions

    def __call__(self, cost: jax.Array) -> tuple[jax.Array, float]:
        """Solve all blocks.

        Args:
            cost: float32[K, b, b], split along "data", or replicated.

        Returns:
            int32[devices, K, b + 3]: the packed solution of each block from one device, zeros from
            the others; and the seconds that this process spent solving.
        """
        share = self._share(cost)
        start = time.perf_counter()
        solved = self._solve(list(share.values()))
        seconds = time.perf_counter() - start
        packed = np.zeros((cost.shape[0], cost.shape[1] + _EXTRA), np.int32)
        if share:
            packed[list(share)] = solved
        zeros = np.zeros_like(packed)

        def of_device(index: Any) -> np.ndarray:
            return (packed if (index[0].start or 0) == self._reporter else zeros)[None]

        mesh = self._step.mesh
        shape = (mesh.size, *packed.shape)
        return jax.make_array_from_callback(shape, sharding.over_all(mesh), of_device), seconds

    def _share(self, cost: jax.Array) -> dict[int, np.ndarray]:
        """Fetch the blocks that this process solves, by number; each is in one process's share."""
        if cost.is_fully_replicated:
            blocks = np.asarray(cost.addressable_data(0))
            first = self._processes.index(jax.process_index())
            return {k: blocks[k] for k in range(first, len(blocks), len(self._processes))}
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
            cpus = cpus[:1]  # SciPy solves in this thread, however many there are
        count = next(n for n in range(len(cpus), 0, -1) if len(blocks) % n == 0)
        program, where = _on_cpus(self._step, tuple(cpus[:count]))
        return _pack(jax.device_get(program(jax.device_put(np.stack(blocks), where))))


@functools.cache
def _on_cpus(step: Step, cpus: tuple[jax.Device, ...]) -> tuple[Callable, jax.sharding.Sharding]:
    """Return a function that solves blocks on CPU devices in parallel, and its input's sharding.

    It is one program for all devices, so that it is compiled once.
    """
    if len(cpus) == 1:
        return functools.partial(solve, step), jax.sharding.SingleDeviceSharding(cpus[0])
    mesh = Mesh(np.array(cpus), ("block",), axis_types=(AxisType.Auto,))
    parallel = jax.shard_map(
        functools.partial(solve, step),
        mesh=mesh,
        in_specs=P("block"),
        out_specs=P("block"),
        check_vma=False,
    )
    return jax.jit(parallel), NamedSharding(mesh, P("block"))


# Numbers that follow the b columns of a packed solution: gap, rounds, status.
_EXTRA = 3


def _pack(solution: Solution) -> np.ndarray:
    """Return a NumPy solution as int32[K, b + 3]: one transfer to each device instead of four."""
    numbers = (np.asarray(solution.gap).view(np.int32), solution.rounds, solution.status)
    return np.concatenate([solution.col4row, np.stack(numbers, axis=1)], axis=1)


def unpack_solutions(packed_solutions: jax.Array) -> Solution:
    """Return the solution from the devices' parts int32[devices, K, b + 3]; see ``HostSolver``."""
    packed = jnp.sum(packed_solutions, axis=0, dtype=jnp.int32)
    gap, rounds, status = (packed[:, k - _EXTRA] for k in range(_EXTRA))
    gap = jax.lax.bitcast_convert_type(gap, jnp.float32)
    return Solution(packed[:, :-_EXTRA], gap, rounds, status)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WithoutShared:
    """A pytree without the leaves that are leaves of the state too.

    A pullback stores the parameters. The second program donates the state, whose buffers no other
    argument may then hold; copying the parameters would cost their size in every step.
    """

    leaves: list[jax.Array]
    places: tuple[int | None, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})


def _without_shared(state: TrainState, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    numbers = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(state))}
    places = tuple(numbers.get(id(leaf)) for leaf in leaves)
    kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return _WithoutShared(kept, places, structure)


def _with_shared(state: TrainState, tree: Any) -> Any:
    shared, kept = jax.tree.leaves(state), iter(tree.leaves)
    leaves = [next(kept) if place is None else shared[place] for place in tree.places]
    return jax.tree.unflatten(tree.structure, leaves)
