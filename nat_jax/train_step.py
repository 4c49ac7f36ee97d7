"""The train step: forward pass, matching, update, and their composition.

::

    rows      = present(batch)                        the target rows that the images own [B]
    features  = forward(images)                       z, unit rows [B, D]
    rows      = apply_matching(solve(build_costs))    rows reassigned within the batch, when due
    state     = update(features, targets[rows])       SGD on 1/(2n) sum |z - c|^2

A step that reassigns is ``post_match(solve(pre_match))``, whether the devices solve
(``train_step``) or the host between two programs (``nat_jax.training.host_matching``). Everything
here is pure and runs under ``jax.jit`` over the ("data", "model") mesh.
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

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes and a checkpoint holds.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StateWithFeatures(TrainState):
    """The state where all images are matched between epochs, by features of earlier steps.

    Attributes:
        features: float16[N, D], as long as the assignment and sharded like it: the newest feature
            of each image, 0 for one that has none yet.
    """

    features: jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """The settings of the train step; hashable, so that equal settings compile once.

    Attributes:
        model: the network.
        optimizer: the settings of SGD.
        mesh: devices along ("data", "model").
        loss: a key of ``losses.LOSSES``.
        supervised: the target of an image is the row of its class instead of a row of its own.
        solver: a key of ``assign.SOLVERS``.
        solver_options: keyword arguments of the solver, as sorted (name, value) pairs.
        block: images matched together; None for the complete global batch.
        scope: "batch", or "dataset": steps keep features instead of matching.
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
    scope: str = "batch"
    placement: str = "device"
    storage: str = "replicated"


class Forward(NamedTuple):
    """The training-mode forward pass over a batch.

    Attributes:
        features: float32[B, D], unit norm; [B, V, D] of V views of each image. Logits where the
            loss takes them.
        pullback: maps a cotangent of the features to one of the parameters.
        batch_stats: running statistics after this pass.
    """

    features: jax.Array
    pullback: Callable[[jax.Array], tuple[Params]]
    batch_stats: Params


class Solution(NamedTuple):
    """The solver's result for K blocks; see ``assign.Assignment``.

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


class MatchProblem(NamedTuple):
    """State of a step between the forward pass and the solver.

    Attributes:
        result: the forward pass.
        rows: int32[B], the target rows that the images own before the matching.
        cost: float32[K, b, b]; see ``build_costs``.
    """

    result: Forward
    rows: jax.Array
    cost: jax.Array


def create_state(
    model: Model,
    optimizer: optim.Optimizer,
    assignment: jax.Array,
    key: jax.Array,
    scope: str = "batch",
) -> TrainState:
    """Return the state before the first step.

    Args:
        model: the network.
        optimizer: the settings of SGD.
        assignment: int32[N], the first permutation.
        key: typed PRNG key; initialisation and dropout use independent halves.
        scope: see ``Step``.
    """
    init_key, step_key = jax.random.split(key)
    params, batch_stats = model.init(init_key)
    opt_state = optim.make_optimizer(optimizer).init(params)
    state = TrainState(params, batch_stats, opt_state, jnp.int32(0), step_key, assignment)
    if scope == "batch":
        return state
    return StateWithFeatures(
        **vars(state), features=jnp.zeros((len(assignment), model.dim), jnp.float16)
    )


@functools.cache
def state_shardings(step: Step) -> TrainState:
    """Return the sharding of every leaf of the state, as a ``TrainState``."""
    shapes = jax.eval_shape(
        lambda: create_state(
            step.model, step.optimizer, jnp.zeros(1, jnp.int32), jax.random.key(0), step.scope
        )
    )
    by_image = (sharding.over_data if step.storage == "sharded" else sharding.replicated)(step.mesh)
    names = ("assignment", "features") if step.scope == "dataset" else ("assignment",)
    return dataclasses.replace(
        sharding.param_shardings(step.mesh, shapes), **dict.fromkeys(names, by_image)
    )


def batch_shardings(step: Step) -> dict[str, jax.sharding.NamedSharding]:
    """Return the sharding of each batch entry that a step reads, by name."""
    return sharding.batch_shardings(step.mesh, labels=step.supervised)


def train_step(
    step: Step,
    state: TrainState,
    targets: Targets,
    batch: Batch,
    *,
    reassign: bool,
) -> tuple[TrainState, Metrics]:
    """Run forward, match (when ``reassign``) and update on one global batch.

    Args:
        step: the settings.
        state: the state before the step.
        targets: the target rows.
        batch: image uint8[B, H, W, 3] or [B, V, H, W, 3], index int32[B] (distinct), weight
            float32[B], 0 for a bad record; label int32[B] if supervised, -1 for a record without
            a class.
        reassign: whether this step reassigns the batch's rows; static.
    """
    if reassign:
        problem = pre_match(step, state, targets, batch)
        return post_match(step, state, targets, batch, problem, solve_sharded(step, problem.cost))
    result = forward(step, state, batch["image"])
    rows, weight = present(step, state, batch)
    if isinstance(state, StateWithFeatures):
        state = keep_features(state, batch, result.features)
    return update(step, state, result, targets.gather(rows), weight)


def pre_match(
    step: Step, state: TrainState, targets: Targets, batch: Batch, *, rematerialize: bool = False
) -> MatchProblem:
    """Run the part of a reassigning step that comes before the solver."""
    result = forward(step, state, batch["image"], rematerialize=rematerialize)
    rows, weight = present(step, state, batch)
    cost = build_costs(step, result.features, targets.gather(rows), weight)
    return MatchProblem(result, rows, cost)


def post_match(
    step: Step,
    state: TrainState,
    targets: Targets,
    batch: Batch,
    problem: MatchProblem,
    solution: Solution,
) -> tuple[TrainState, Metrics]:
    """Run the part of a reassigning step that comes after the solver; reads index and weight."""
    result, rows, cost = problem
    rows, metrics = apply_matching(step, result.features, rows, cost, solution)
    state = scatter_assignment(state, batch["index"], rows)
    state, update_metrics = update(step, state, result, targets.gather(rows), batch["weight"])
    return state, {**update_metrics, **metrics}


def present(step: Step, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return each image's target row int32[B] and its weight in the loss float32[B]."""
    if step.supervised:
        return batch["label"], batch["weight"] * (batch["label"] >= 0)
    return state.assignment[batch["index"]], batch["weight"]


def forward(
    step: Step, state: TrainState, images: jax.Array, *, rematerialize: bool = False
) -> Forward:
    """Run the network in training mode and keep what its gradient needs.

    Args:
        step: the network, and the loss, which takes features or logits.
        state: the current state.
        images: uint8[B, H, W, 3], or [B, V, H, W, 3], V views of each.
        rematerialize: store only the results of convolutions and matrix products, and let the
            pullback compute the rest again. For a pullback that is called in another program:
            within one program the compiler itself stores no more than it needs.
    """
    output = losses.LOSSES[step.loss].output
    key = jax.random.fold_in(state.key, state.step)
    flat = images.reshape(-1, *images.shape[-3:])  # batch norm sees all views together

    def features(params: Params) -> tuple[jax.Array, Params]:
        outputs, batch_stats = step.model.apply(
            params, state.batch_stats, flat, train=True, key=key
        )
        return outputs[output].reshape(*images.shape[:-3], -1), batch_stats

    if rematerialize:
        saved = jax.checkpoint_policies.dots_saveable
        features = jax.checkpoint(features, policy=saved, prevent_cse=False)
    z, pullback, batch_stats = jax.vjp(features, state.params, has_aux=True)
    return Forward(z, pullback, batch_stats)


def build_costs(
    step: Step, features: jax.Array, batch_targets: jax.Array, weight: jax.Array
) -> jax.Array:
    """Return the assignment problems of a batch, float32[K, b, b], for a solver that minimises.

    Entry (k, i, j) is minus the cosine between image i of block k and the target of image j, so
    that each block of images maximises its summed cosine (paper, section 3.3, equation 5; authors'
    main.lua). Views of an image share a row, chosen by the direction of their mean (beyond the
    paper). A record of weight 0 can only keep its row.

    Args:
        step: block and mesh.
        features: float32[B, D] or [B, V, D], unit norm, of this step's training-mode pass.
        batch_targets: float32[B, D], the targets that the images own.
        weight: float32[B]; 0 for a bad record.
    """

    def costs(z: jax.Array, batch_targets: jax.Array, weight: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        similarity = jnp.einsum("kid,kjd->kij", z, batch_targets, precision=highest)
        good = weight > 0
        own = jnp.eye(weight.shape[1], dtype=bool)
        allowed = own | (good[:, :, None] & good[:, None, :])
        return jnp.where(allowed, -similarity, jnp.inf)

    z, batch_targets, weight = _blocks(step, (_mean_direction(features), batch_targets, weight))
    return _over_devices(step, costs, len(z))(z, batch_targets, weight)


def solve(step: Step, cost: jax.Array) -> Solution:
    """Solve some of the problems of ``build_costs`` on the devices that hold them."""
    solved = assign.solve(cost, solver=step.solver, **dict(step.solver_options))
    return Solution(solved.col4row, solved.gap, solved.rounds, solved.status)


def solve_sharded(step: Step, cost: jax.Array) -> Solution:
    """Solve all problems of ``build_costs``, each device those of its own blocks."""
    return _over_devices(step, functools.partial(solve, step), len(cost))(cost)


def apply_matching(
    step: Step, features: jax.Array, rows: jax.Array, cost: jax.Array, solution: Solution
) -> tuple[jax.Array, Metrics]:
    """Return the rows int32[B] that the solution assigns to the images, and metrics.

    The new rows of each block are a permutation of its old ones.

    Args:
        step: block and mesh.
        features: float32[B, D] or [B, V, D], as for ``build_costs``.
        rows: int32[B], the rows that the images owned.
        cost: float32[K, b, b].
        solution: of these costs.
    """

    def in_blocks(
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
            **feature_diversity(z),
        }
        return new_rows, metrics

    z, row_blocks = _blocks(step, (_mean_direction(features), rows))
    new_rows, per_block = _over_devices(step, in_blocks, len(z))(z, row_blocks, cost, solution)
    metrics = {name: jnp.mean(value) for name, value in per_block.items()}
    metrics["assign/worst_status"] = jnp.max(per_block["assign/worst_status"])
    return new_rows.reshape(rows.shape), metrics


def scatter_assignment(state: TrainState, index: jax.Array, rows: jax.Array) -> TrainState:
    """Return the state in which the images ``index`` int32[B] own ``rows`` int32[B]."""
    assignment = state.assignment.at[index].set(rows, unique_indices=True)
    return dataclasses.replace(state, assignment=assignment)


def keep_features(state: StateWithFeatures, batch: Batch, features: jax.Array) -> StateWithFeatures:
    """Return the state with the features [B, D] or [B, V, D] of a batch as its images' newest.

    Those of several views are kept as the direction of their mean. A record of weight 0 has none.
    """
    index, newest = batch["index"], _mean_direction(features).astype(jnp.float16)
    newest = jnp.where(batch["weight"][:, None] > 0, newest, state.features[index])
    kept = state.features.at[index].set(newest, unique_indices=True)
    return dataclasses.replace(state, features=kept)


def _blocks(step: Step, batch: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Split arrays [B, ...] into consecutive blocks [K, b, ...]."""
    return tuple(x.reshape(-1, step.block or len(x), *x.shape[1:]) for x in batch)


def _over_devices(step: Step, function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Run a function of K blocks on each device's own blocks; on all where K does not divide.

    Under shard_map no collective can end up inside a solver's loop.
    """
    spec = P("data") if count % step.mesh.shape["data"] == 0 else P()
    return jax.shard_map(function, mesh=step.mesh, in_specs=spec, out_specs=spec, check_vma=False)


def _mean_direction(features: jax.Array) -> jax.Array:
    """Return one unit vector for each image, [B, D]: its features, or its views' mean direction."""
    z = jax.lax.stop_gradient(features)
    if z.ndim == 2:
        return z
    mean = jnp.mean(z, axis=1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def feature_diversity(z: jax.Array) -> Metrics:
    """Return two measures, each [K], of how the unit features [K, b, D] of a block fill the sphere.

    ``features/effective_rank`` is the participation ratio (tr M)^2 / tr(M^2) of their second
    moment M: 1 when all coincide, min(b, D) at the most. ``features/uniformity`` is
    ``log mean exp(-2 |z_i - z_j|^2)`` over distinct pairs (Wang & Isola 2020): 0 when all coincide;
    it is left out where a block has no pairs (b = 1).
    """
    b = z.shape[1]
    gram = jnp.einsum("kid,kjd->kij", z, z)
    rank = b**2 / jnp.sum(jnp.square(gram), axis=(1, 2))
    if b == 1:
        return {"features/effective_rank": rank}
    potential = jnp.exp(-4.0 * (1.0 - gram))
    pairs = (jnp.sum(potential, axis=(1, 2)) - b) / (b * (b - 1))
    uniformity = jnp.log(jnp.maximum(pairs, jnp.finfo(jnp.float32).tiny))
    return {"features/effective_rank": rank, "features/uniformity": uniformity}


def update(
    step: Step, state: TrainState, result: Forward, targets: jax.Array, weight: jax.Array
) -> tuple[TrainState, Metrics]:
    """Take one step of SGD on the loss against the gathered targets.

    Args:
        step: the optimiser and the loss.
        state: the state before the step, with its new assignment.
        result: the forward pass.
        targets: float32[B, D], the targets of the images.
        weight: float32[B]; 0 for a record that shall not count.

    Returns:
        The state after the step, and the loss, the gradient's norm and the learning rate.
    """
    loss = losses.LOSSES[step.loss].function
    value, cotangent = jax.value_and_grad(loss)(result.features, targets, weight)
    gradient, norm = optim.gradient_and_norm(*result.pullback(cotangent))
    optimizer = optim.make_optimizer(step.optimizer)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    new_state = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, updates),
        batch_stats=result.batch_stats,
        opt_state=opt_state,
        step=state.step + 1,
    )
    rate = optim.make_schedule(step.optimizer)(state.step)
    metrics = {
        "train/loss": value,
        "train/gradient_norm": norm,
        "train/learning_rate": jnp.asarray(rate, jnp.float32),
    }
    return new_state, metrics
