"""Learning-rate schedules and the optimiser."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from nat_jax.errors import InputError

SCHEDULES = ("constant", "inverse", "cosine")

# Elements; only the largest arrays are worth the order that ``gradient_and_norm`` imposes.
_LARGE = 2**20


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Settings of SGD; equal settings share one optax transformation.

    Attributes:
        learning_rate: l0, for the loss ``1/(2n) sum |z - c|^2``.
        schedule: "constant"; "inverse", the paper's ``l0 / (1 + gamma * max(t - t0, 0))`` (section
            3.4; t counts steps after the warm-up, t0 and gamma are not published); "cosine", down
            to zero at ``total_steps`` (beyond the paper).
        decay_start: t0 in steps after the warm-up, for "inverse".
        gamma: decay per step, for "inverse".
        warmup_steps: linear warm-up from zero, before the schedule starts.
        total_steps: length of the run, for "cosine".
        momentum: heavy-ball momentum; 0 is the authors' plain SGD.
        weight_decay: L2 factor added to the gradient of kernels (arrays of rank 2 and more).
    """

    learning_rate: float
    schedule: str = "constant"
    decay_start: int = 0
    gamma: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"optim.schedule: expected one of {', '.join(SCHEDULES)}; got {self.schedule!r}"
            )


def make_schedule(settings: Optimizer) -> optax.Schedule:
    """Return the learning rate as a function of the step (int32 scalar -> float32 scalar)."""
    base = settings.learning_rate
    if settings.schedule == "constant":
        schedule = optax.constant_schedule(base)
    elif settings.schedule == "inverse":

        def schedule(step):
            late = jnp.maximum(step - settings.decay_start, 0)
            return base / (1.0 + settings.gamma * late)
    else:
        steps = max(settings.total_steps - settings.warmup_steps, 1)
        schedule = optax.cosine_decay_schedule(base, steps)
    if not settings.warmup_steps:
        return schedule
    warmup = optax.linear_schedule(0.0, base, settings.warmup_steps)
    return optax.join_schedules([warmup, schedule], [settings.warmup_steps])


@functools.cache
def make_optimizer(settings: Optimizer) -> optax.GradientTransformation:
    """Return SGD with optional momentum and L2 weight decay.

    Cached, so that two runs with equal settings in one process share their compiled step.
    """
    chain = []
    if settings.weight_decay:
        chain.append(optax.add_decayed_weights(settings.weight_decay, mask=_is_kernel))
    if settings.momentum:
        chain.append(optax.trace(settings.momentum))
    chain.append(optax.scale_by_learning_rate(make_schedule(settings)))
    return optax.chain(*chain)


def gradient_and_norm(gradient: optax.Updates) -> tuple[optax.Updates, jax.Array]:
    """Return a gradient, bit for bit, and its norm, float32 scalar.

    On CPUs large arrays are multiplied by 1.0 with a data dependency on the norm. An update may
    overwrite a gradient; where it is not known to come after the norm, XLA:CPU keeps two copies,
    which cost AlexNet 151 MB, and 5 % of a step of 16 images (``benchmarks/step.py``). A norm that
    is not finite makes them not a number.

    Args:
        gradient: pytree of float32.
    """
    squares = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf)), gradient)

    def after(leaf: jax.Array, square: jax.Array) -> jax.Array:
        if leaf.size < _LARGE:
            return leaf
        return jax.lax.platform_dependent(
            leaf,
            square,
            cpu=lambda leaf, square: leaf * (1.0 + 0.0 * square),
            default=lambda leaf, square: leaf,
        )

    norm = jnp.sqrt(sum(jax.tree.leaves(squares), jnp.float32(0)))
    return jax.tree.map(after, gradient, squares), norm


def _is_kernel(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
