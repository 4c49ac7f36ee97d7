"""The train step: forward, match, update, and their composition.

    features  = forward(images)                       z, unit rows [B, D]
    rows      = match(features, targets, rows)        re-deal the batch's rows, when due
    state     = update(features, targets[rows])       SGD on 1/(2n) sum |z - c|^2

Everything here is pure and runs under ``jax.jit`` over the ("data", "model") mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from nat_jax import assign, losses, optim, sharding
from nat_jax.models import Model, Params
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
        solver: a key of ``assign.SOLVERS``.
        solver_options: keyword arguments of the solver, as sorted (name, value) pairs.
        block: images matched together; None for the whole global batch.
    """

    model: Model
    optimizer: optim.Optimizer
    mesh: Mesh
    solver: str = "auction"
    solver_options: tuple[tuple[str, Any], ...] = ()
    block: int | None = None


class Forward(NamedTuple):
    """The training-mode pass over a batch.

    Attributes:
        features: float32[B, D], unit norm; [B, V, D] of V views of each image.
        pullback: maps a cotangent of the features to one of the parameters.
        batch_stats: running statistics after this pass.
    """

    features: jax.Array
    pullback: Callable[[jax.Array], tuple[Params]]
    batch_stats: Params


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


def forward(model: Model, state: TrainState, images: jax.Array) -> Forward:
    """Run the network in training mode and keep what its gradient needs.

    Args:
        model: the network.
        state: the current state.
        images: uint8[B, H, W, 3], or [B, V, H, W, 3], V views of each.
    """
    key = jax.random.fold_in(state.key, state.step)
    each = images.reshape(-1, *images.shape[-3:])  # batch norm sees all views together

    def features(params: Params) -> tuple[jax.Array, Params]:
        outputs, batch_stats = model.apply(params, state.batch_stats, each, train=True, key=key)
        return outputs["z"].reshape(*images.shape[:-3], -1), batch_stats

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
    block = step.block or rows.shape[0]
    solve = functools.partial(_match_blocks, step.solver, step.solver_options)
    # Each device solves its own blocks, or all solve the same ones: under shard_map no collective
    # can end up inside the solver's loop.
    spec = P("data") if rows.shape[0] // block % step.mesh.shape["data"] == 0 else P()
    blocks = jax.tree.map(
        lambda x: x.reshape(-1, block, *x.shape[1:]),
        (_one_direction(features), batch_targets, rows, weight),
    )
    new_rows, per_block = jax.shard_map(
        solve, mesh=step.mesh, in_specs=spec, out_specs=spec, check_vma=False
    )(*blocks)
    new_rows = new_rows.reshape(rows.shape)
    metrics = {name: jnp.mean(value) for name, value in per_block.items()}
    metrics["assign/worst_status"] = jnp.max(per_block["assign/worst_status"])
    return new_rows, metrics


def _one_direction(features: jax.Array) -> jax.Array:
    """Give one unit vector for each image, [B, D]: that of its features, or of its views' mean."""
    z = jax.lax.stop_gradient(features)
    if z.ndim == 2:
        return z
    mean = jnp.mean(z, axis=1)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def _match_blocks(
    solver: str,
    options: tuple[tuple[str, Any], ...],
    z: jax.Array,
    batch_targets: jax.Array,
    rows: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """Solve blocks [K, b, ...]; the metrics are one value a block, float32[K]."""
    similarity = jnp.einsum("kid,kjd->kij", z, batch_targets, precision=jax.lax.Precision.HIGHEST)
    good = weight > 0
    own = jnp.eye(rows.shape[1], dtype=bool)
    allowed = own | (good[:, :, None] & good[:, None, :])  # a bad record keeps its row
    cost = jnp.where(allowed, -similarity, jnp.inf)
    solution = assign.solve(cost, solver=solver, **dict(options))
    new_rows = jnp.take_along_axis(rows, solution.col4row, axis=1)
    before = jnp.diagonal(similarity, axis1=1, axis2=2)
    after = jnp.take_along_axis(similarity, solution.col4row[:, :, None], axis=2)[:, :, 0]
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
) -> tuple[TrainState, Metrics]:
    """Take one step of SGD on the squared loss against the gathered targets.

    Args:
        settings: the optimiser.
        state: the state before the step, its assignment already re-dealt.
        result: the forward pass.
        targets: float32[B, D], the rows that the images own now.
        weight: float32[B]; 0 for a record that shall not count.

    Returns:
        The state after the step, and the loss, the gradient's norm and the learning rate.
    """
    loss, cotangent = jax.value_and_grad(losses.squared_loss)(result.features, targets, weight)
    (gradient,) = result.pullback(cotangent)
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
        "train/loss": loss,
        "train/gradient_norm": optax.tree.norm(gradient),
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
            float32[B].
        reassign: whether this step re-deals the batch's rows; static.
    """
    result = forward(step.model, state, batch["image"])
    rows = state.assignment[batch["index"]]
    batch_targets = targets.gather(rows)
    metrics: Metrics = {}
    if reassign:
        rows, metrics = match(step, result.features, batch_targets, rows, batch["weight"])
        assignment = state.assignment.at[batch["index"]].set(rows, unique_indices=True)
        state = dataclasses.replace(state, assignment=assignment)
        batch_targets = targets.gather(rows)
    state, update_metrics = update(step.optimizer, state, result, batch_targets, batch["weight"])
    return state, {**update_metrics, **metrics}


@functools.cache
def compile_step(step: Step, *, reassign: bool) -> Callable[..., tuple[TrainState, Metrics]]:
    """Return ``train_step`` jitted with a donated, replicated state: (state, targets, batch)."""
    everywhere: NamedSharding = sharding.replicated(step.mesh)
    return jax.jit(
        functools.partial(train_step, step, reassign=reassign),
        donate_argnums=0,
        out_shardings=everywhere,
    )
