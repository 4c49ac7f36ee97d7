"""The train step: forward, match, update, and their composition.

::

    features  = forward(images)                       z, unit rows [B, D]
    rows      = match(features, targets, rows)        re-deal the batch's rows, when due
    state     = update(features, targets[rows])       SGD on 1/(2n) sum |z - c|^2

``match`` poses assignment problems (``pose``), solves them (``solve``) and deals out the rows
(``deal``). Everything here is pure and runs under ``jax.jit`` over the ("data", "model") mesh; how
it is compiled, and where matching is solved, is the business of ``nat_jax.training.host_matching``.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nat_jax import assign, losses, optim
from nat_jax.models import Model, Params
from nat_jax.runtime import sharding
from nat_jax.targets import Targets

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes; what a checkpoint holds.

    Attributes:
        params: the network's parameters, float32.
        batch_stats: batch norm's running means and variances, float32.
        opt_state: the optimiser's state.
        step: int32 scalar, the number of steps done; also the position in the data.
        key: typed PRNG key, folded by the step for dropout.
        assignment: int32[N]; image i owns target row ``assignment[i]``. Always a permutation.
            Sharded it is padded to a greater length; see ``sharding.permutation_storage``.
    """

    params: Params
    batch_stats: Params
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array
    assignment: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """The settings of the train step; hashable, so that equal settings compile once.

    Attributes:
        model: the network.
        optimizer: the settings of SGD.
        mesh: devices along ("data", "model").
        loss: a key of ``losses.LOSSES``.
        supervised: images are pulled to the row of their class, in place of one of their own.
        solver: a key of ``assign.SOLVERS``.
        solver_options: keyword arguments of the solver, as sorted (name, value) pairs.
        block: images matched together; None for the whole global batch.
        placement: "device" or "host", where matching is solved.
        storage: "replicated" or "sharded" over "data", how the assignment is kept.
    """

    model: Model
    optimizer: optim.Optimizer
    mesh: Mesh
    loss: str = "square"
    supervised: bool = False
    solver: str = "auction"
    solver_options: tuple[tuple[str, Any], ...] = ()
    block: int | None = None
    placement: str = "device"
    storage: str = "replicated"


class Forward(NamedTuple):
    """The training-mode pass over a batch.

    Attributes:
        features: float32[B, D], unit norm; [B, V, D] of V views of each image. Logits where the
            loss takes these.
        pullback: maps a cotangent of the features to one of the parameters.
        batch_stats: running statistics after this pass.
    """

    features: jax.Array
    pullback: Callable[[jax.Array], tuple[Params]]
    batch_stats: Params


class Solution(NamedTuple):
    """What training needs of K solved blocks; see ``assign.Assignment``.

    Attributes:
        col4row: int32[K, b].
        gap: float32[K].
        rounds: int32[K].
        status: int32[K].
    """

    col4row: jax.Array
    gap: jax.Array
    rounds: jax.Array
    status: jax.Array


def create_state(
    model: Model, optimizer: optim.Optimizer, assignment: jax.Array, key: jax.Array
) -> TrainState:
    """Return the state before the first step.

    Args:
        model: the network.
        optimizer: the settings of SGD.
        assignment: int32[N], the first permutation.
        key: typed PRNG key; initialisation and dropout use independent halves.
    """
    init_key, step_key = jax.random.split(key)
    params, batch_stats = model.init(init_key)
    opt_state = optim.make_optimizer(optimizer).init(params)
    return TrainState(params, batch_stats, opt_state, jnp.int32(0), step_key, assignment)


@functools.cache
def state_shardings(step: Step) -> TrainState:
    """Return where every leaf of the state lives, as a ``TrainState`` of shardings."""
    shapes = jax.eval_shape(
        lambda: create_state(step.model, step.optimizer, jnp.zeros(1, jnp.int32), jax.random.key(0))
    )
    assignment = sharding.over_data if step.storage == "sharded" else sharding.replicated
    return dataclasses.replace(
        sharding.of_weights(step.mesh, shapes), assignment=assignment(step.mesh)
    )


def batch_shardings(step: Step) -> dict[str, jax.sharding.NamedSharding]:
    """Return where what a step reads of a batch lives, by name."""
    return sharding.of_batch(step.mesh, labels=step.supervised)


def forward(
    model: Model,
    state: TrainState,
    images: jax.Array,
    *,
    output: str = "z",
    keep_little: bool = False,
) -> Forward:
    """Run the network in training mode and keep what its gradient needs.

    Args:
        model: the network.
        state: the current state.
        images: uint8[B, H, W, 3], or [B, V, H, W, 3], V views of each.
        output: which of the network's outputs the loss takes, "z" or "logits".
        keep_little: keep only what convolutions and matrix products return, and let the pullback
            compute the rest again. For a pullback that is called in another program: within one the
            compiler itself keeps no more than it needs.
    """
    key = jax.random.fold_in(state.key, state.step)
    each = images.reshape(-1, *images.shape[-3:])  # batch norm sees all views together

    def features(params: Params) -> tuple[jax.Array, Params]:
        outputs, batch_stats = model.apply(params, state.batch_stats, each, train=True, key=key)
        return outputs[output].reshape(*images.shape[:-3], -1), batch_stats

    if keep_little:
        saved = jax.checkpoint_policies.dots_saveable
        features = jax.checkpoint(features, policy=saved, prevent_cse=False)
    z, pullback, batch_stats = jax.vjp(features, state.params, has_aux=True)
    return Forward(z, pullback, batch_stats)


def match(
    step: Step, features: jax.Array, batch_targets: jax.Array, rows: jax.Array, weight: jax.Array
) -> tuple[jax.Array, Metrics]:
    """Re-deal the batch's target rows among its images by solving an assignment problem.

    Each block of images maximises the summed cosine between features and rows (paper, section 3.3,
    equation 5; authors' main.lua). Views of an image share a row, which is chosen by the direction
    of their mean (beyond the paper). A record of weight 0 keeps its row.

    Args:
        step: solver, block and mesh.
        features: float32[B, D] or [B, V, D], unit norm, of the training-mode pass of this very
            step.
        batch_targets: float32[B, D], the targets that the images own now.
        rows: int32[B], their row numbers.
        weight: float32[B]; 0 for a bad record.

    Returns:
        The new rows int32[B], a permutation of ``rows`` within each block, and the metrics.
    """
    cost = pose(step, features, batch_targets, weight)
    solution = _on_blocks(step, functools.partial(solve, step), len(cost))(cost)
    return deal(step, features, rows, cost, solution)


def pose(step: Step, features: jax.Array, batch_targets: jax.Array, weight: jax.Array) -> jax.Array:
    """Return what the solver minimises, float32[K, b, b]; see ``match``.

    Entry (k, i, j) is minus the cosine between image i of block k and the target of image j.
    """

    def costs(z: jax.Array, batch_targets: jax.Array, weight: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        similarity = jnp.einsum("kid,kjd->kij", z, batch_targets, precision=highest)
        good = weight > 0
        own = jnp.eye(weight.shape[1], dtype=bool)
        allowed = own | (good[:, :, None] & good[:, None, :])  # a bad record keeps its row
        return jnp.where(allowed, -similarity, jnp.inf)

    z, batch_targets, weight = _blocks(step, (_one_direction(features), batch_targets, weight))
    return _on_blocks(step, costs, len(z))(z, batch_targets, weight)


def solve(step: Step, cost: jax.Array) -> Solution:
    """Solve the problems of ``pose``, or some of them, where they are."""
    solved = assign.solve(cost, solver=step.solver, **dict(step.solver_options))
    return Solution(solved.col4row, solved.gap, solved.rounds, solved.status)


def deal(
    step: Step,
    features: jax.Array,
    rows: jax.Array,
    cost: jax.Array,
    solution: Solution,
) -> tuple[jax.Array, Metrics]:
    """Give the batch's rows to the images that the solution has for them; see ``match``."""

    def of_each_block(
        z: jax.Array, rows: jax.Array, cost: jax.Array, solution: Solution
    ) -> tuple[jax.Array, Metrics]:
        new_rows = jnp.take_along_axis(rows, solution.col4row, axis=1)
        before = -jnp.diagonal(cost, axis1=1, axis2=2)
        after = -jnp.take_along_axis(cost, solution.col4row[:, :, None], axis=2)[:, :, 0]
        metrics = {
            "assign/cosine_before": jnp.mean(before, axis=1),
            "assign/cosine_after": jnp.mean(after, axis=1),
            "assign/moved": jnp.mean((new_rows != rows).astype(jnp.float32), axis=1),
            "assign/gap": solution.gap / rows.shape[1],
            "assign/rounds": solution.rounds.astype(jnp.float32),
            "assign/worst_status": solution.status.astype(jnp.float32),
            **_spread(z),
        }
        return new_rows, metrics

    z, row_blocks = _blocks(step, (_one_direction(features), rows))
    new_rows, per_block = _on_blocks(step, of_each_block, len(z))(z, row_blocks, cost, solution)
    metrics = {name: jnp.mean(value) for name, value in per_block.items()}
    metrics["assign/worst_status"] = jnp.max(per_block["assign/worst_status"])
    return new_rows.reshape(rows.shape), metrics


def _blocks(step: Step, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Cut arrays [B, ...] into consecutive blocks [K, b, ...]."""
    return tuple(x.reshape(-1, step.block or len(x), *x.shape[1:]) for x in batch)


def _on_blocks(step: Step, function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Let each device work on its own blocks, or all on the same ones where they do not divide.

    Under shard_map no collective can end up inside a solver's loop.
    """
    spec = P("data") if count % step.mesh.shape["data"] == 0 else P()
    return jax.shard_map(function, mesh=step.mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _one_direction(features: jax.Array) -> jax.Array:
    """Give one unit vector for each image, [B, D]: that of its features, or of its views' mean."""
    z = jax.lax.stop_gradient(features)
    if z.ndim == 2:
        return z
    mean = jnp.mean(z, axis=1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _spread(z: jax.Array) -> Metrics:
    """Measure how the features of each block [K, b, D] fill the sphere.

    ``features/effective_rank`` is the participation ratio (tr M)^2 / tr(M^2) of their second
    moment M: 1 when all coincide, min(b, D) at the most. ``features/uniformity`` is
    log mean exp(-2 |z_i - z_j|^2) over distinct pairs (Wang & Isola 2020): 0 when all coincide.
    """
    b = z.shape[1]
    gram = jnp.einsum("kid,kjd->kij", z, z)
    rank = b**2 / jnp.sum(jnp.square(gram), axis=(1, 2))
    potential = jnp.exp(-4.0 * (1.0 - gram))
    pairs = (jnp.sum(potential, axis=(1, 2)) - b) / max(b * (b - 1), 1)
    return {
        "features/effective_rank": rank,
        "features/uniformity": jnp.log(jnp.maximum(pairs, jnp.finfo(jnp.float32).tiny)),
    }


def update(
    settings: optim.Optimizer,
    state: TrainState,
    result: Forward,
    targets: jax.Array,
    weight: jax.Array,
    *,
    loss: str = "square",
) -> tuple[TrainState, Metrics]:
    """Take one step of SGD on the loss against the gathered targets.

    Args:
        settings: the optimiser.
        state: the state before the step, its assignment already re-dealt.
        result: the forward pass.
        targets: float32[B, D], the rows that the images own now.
        weight: float32[B]; 0 for a record that shall not count.
        loss: a key of ``losses.LOSSES``.

    Returns:
        The state after the step, and the loss, the gradient's norm and the learning rate.
    """
    function = losses.LOSSES[loss].function
    value, cotangent = jax.value_and_grad(function)(result.features, targets, weight)
    gradient, norm = optim.measured(*result.pullback(cotangent))
    optimizer = optim.make_optimizer(settings)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    new_state = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        batch_stats=result.batch_stats,
        opt_state=opt_state,
        step=state.step + 1,
    )
    metrics = {
        "train/loss": value,
        "train/gradient_norm": norm,
        "train/learning_rate": jnp.asarray(optim.make_schedule(settings)(state.step), jnp.float32),
    }
    return new_state, metrics


def train_step(
    step: Step,
    state: TrainState,
    targets: Targets,
    batch: Mapping[str, jax.Array],
    *,
    reassign: bool,
) -> tuple[TrainState, Metrics]:
    """Run forward, match (when ``reassign``) and update on one global batch.

    Args:
        step: the settings.
        state: the state before the step.
        targets: the target rows.
        batch: image uint8[B, H, W, 3] or [B, V, H, W, 3], index int32[B] (distinct), weight
            float32[B]; label int32[B] if supervised, -1 for a record that shall not count.
        reassign: whether this step re-deals the batch's rows; static.
    """
    output = losses.LOSSES[step.loss].output
    result = forward(step.model, state, batch["image"], output=output)
    rows, weight = state.assignment[batch["index"]], batch["weight"]
    if step.supervised:
        rows, weight = batch["label"], weight * (batch["label"] >= 0)
    metrics: Metrics = {}
    if reassign:
        batch_targets = targets.gather(rows)
        rows, metrics = match(step, result.features, batch_targets, rows, weight)
        state = write_down(state, batch["index"], rows)
    state, update_metrics = update(
        step.optimizer, state, result, targets.gather(rows), weight, loss=step.loss
    )
    return state, {**update_metrics, **metrics}


def write_down(state: TrainState, index: jax.Array, rows: jax.Array) -> TrainState:
    """Return the state in which the images ``index`` int32[B] own ``rows`` int32[B]."""
    assignment = state.assignment.at[index].set(rows, unique_indices=True)
    return dataclasses.replace(state, assignment=assignment)
