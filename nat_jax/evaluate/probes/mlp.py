"""The paper's transfer classifier, a multi-layer perceptron, on frozen features."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureBatch, TrainEpoch
from nat_jax.evaluate.probes import sgd

INITS = ("torch", "gaussian")
_GAUSSIAN_DEVIATION = 0.01


def mlp_probe_stream(
    train_epoch: TrainEpoch,
    test: Iterable[FeatureBatch],
    *,
    num_classes: int,
    seed: int = 0,
    hidden: int = 4096,
    epochs: int = 100,
    learning_rate: float = 0.1,
    decay_start: int = 20,
    decay: float = 0.3,
    momentum: float = 0.9,
    weight_decay: float = 1e-8,
    dropout: float = 0.5,
    init: str = "torch",
) -> dict[str, float]:
    """Train the authors' transfer MLP on every layer of a stream (test.lua, test.sh).

    FC-BN-ReLU-dropout-FC-BN-ReLU-FC, cross-entropy, SGD with `learning_rate` for `decay_start`
    epochs and ``learning_rate / (1 + decay (e - decay_start))`` after; momentum
    ``m = .9 m + .1 g``; kernels shrink by ``1 - weight_decay`` each step (which float32 rounds to 1
    at the authors' 1e-8).

    Theirs is one layer, conv5 of the frozen network in evaluation mode; in each epoch fresh crops
    and flips in batches of 256 without the incomplete last one; and ten crops of each test image,
    whose logits are summed. All of that is in the two streams (see `features.featured`). Two things
    of theirs are left out on purpose: an incomplete last batch of test images is scored as well
    (they scored 49,984 of 50,000), and each crop is standardised on its own, as in training, not
    the ten of an image together.

    Args:
        train_epoch: returns the batches of an epoch, features {layer: float[B, F]}.
        test: batches with features float[B, V, F] for V crops of each record, or [B, F] for one.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the initialisation and the dropout masks.
        hidden: width of both hidden layers.
        epochs: passes over the training set.
        learning_rate: of the first `decay_start` epochs.
        decay_start: epochs of constant rate.
        decay: of the rate afterwards.
        momentum: m = momentum * m + (1 - momentum) * gradient.
        weight_decay: per step, on kernels, independent of the learning rate.
        dropout: rate after the first hidden layer.
        init: "torch", the authors' code: weights and biases uniform in +-1/sqrt(fan_in), batch-norm
            scales in [0, 1]; "gaussian", the paper's words (it states no deviation): weights
            N(0, 0.01^2), biases 0, scales 1.

    Returns:
        A dict of accuracies in [0, 1] by layer.

    Raises:
        InputError: an option out of range, an empty stream, labels out of range, or weights that
            diverge.
    """
    sgd.check_options(
        "mlp_probe",
        at_least_1={"hidden": hidden, "epochs": epochs},
        below_1={"momentum": momentum, "dropout": dropout},
    )
    if init not in INITS:
        raise InputError(f"mlp_probe: unknown init {init!r}; known: {', '.join(INITS)}")
    trained = sgd.fit(
        "mlp_probe",
        lambda features: Mlp(features, hidden, num_classes, dropout, init, momentum, weight_decay),
        train_epoch,
        epochs,
        lambda epoch: learning_rate / (1 + decay * max(epoch - decay_start, 0)),
        num_classes=num_classes,
        seed=seed,
    )
    return sgd.accuracy(trained, test, num_classes=num_classes)


mlp_probe = sgd.in_memory("mlp_probe", mlp_probe_stream)


class Mlp(NamedTuple):
    """The classifier, as `sgd` trains it."""

    features: int
    hidden: int
    classes: int
    dropout: float
    start: str
    momentum: float = 0.9
    weight_decay: float = 0.0

    def init(self, key: jax.Array) -> tuple[nnx.State, nnx.State]:
        """Return fresh parameters and batch statistics."""
        module = _Module(self, rngs=nnx.Rngs(key))
        return nnx.state(module, nnx.Param), nnx.state(module, nnx.BatchStat)

    def apply(
        self, params: nnx.State, stats: nnx.State, features: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, nnx.State]:
        """Return logits and batch statistics; with a key in training mode."""
        module = nnx.merge(_graph(self), params, stats, copy=True)
        logits = module(features, key)
        return logits, nnx.state(module, nnx.BatchStat)

    def optimizer(self, rate: jax.Array | float) -> optax.GradientTransformation:
        """Return ``m = mu m + (1 - mu) g``, ``w = w (1 - decay) - rate m``; biases do not decay."""
        return optax.chain(
            optax.ema(self.momentum, debias=False),
            optax.scale(-rate),
            optax.add_decayed_weights(-self.weight_decay, _kernels),
        )


def _kernels(params: nnx.State) -> nnx.State:
    """Return whether each parameter is a kernel: those of rank 2."""
    return jax.tree.map(lambda w: w.ndim >= 2, params)


Init = Callable[..., jax.Array]


def _initialisers(start: str, fan_in: int) -> tuple[Init, Init, Init]:
    """Return initialisers of kernels, biases and batch-norm scales."""
    init = jax.nn.initializers
    if start == "gaussian":
        return init.normal(_GAUSSIAN_DEVIATION), init.zeros, init.ones
    bound = 1 / math.sqrt(fan_in)

    def symmetric(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return symmetric, symmetric, init.uniform(1.0)


class _Module(nnx.Module):
    def __init__(self, net: Mlp, *, rngs: nnx.Rngs):
        def linear(fan_in: int, fan_out: int) -> nnx.Linear:
            kernel, bias, _ = _initialisers(net.start, fan_in)
            return nnx.Linear(fan_in, fan_out, kernel_init=kernel, bias_init=bias, rngs=rngs)

        def norm() -> nnx.BatchNorm:
            scale = _initialisers(net.start, net.hidden)[2]
            return nnx.BatchNorm(
                net.hidden, momentum=0.9, scale_init=scale, use_fast_variance=False, rngs=rngs
            )

        self.fc1, self.bn1 = linear(net.features, net.hidden), norm()
        self.fc2, self.bn2 = linear(net.hidden, net.hidden), norm()
        self.fc3 = linear(net.hidden, net.classes)
        # Masks are drawn in the rate's dtype.
        self.dropout = nnx.Dropout(np.float32(net.dropout))  # type: ignore[arg-type]

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Return logits; with a key in training mode (batch statistics, dropout)."""
        test = key is None
        x = jax.nn.relu(self.bn1(self.fc1(x), use_running_average=test))
        x = self.dropout(x, deterministic=test, rngs=key)
        x = jax.nn.relu(self.bn2(self.fc2(x), use_running_average=test))
        return self.fc3(x)


@functools.cache
def _graph(net: Mlp) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: _Module(net, rngs=nnx.Rngs(0))))
