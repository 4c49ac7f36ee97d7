"""The paper's transfer classifier, a multi-layer perceptron, on cached features."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from nat_jax.evaluate.features import FeatureSet, check_sets, padded_length, padded_rows

_PREDICT_CHUNK = 4096


def mlp_probe(
    train: FeatureSet,
    test: FeatureSet,
    *,
    num_classes: int,
    seed: int = 0,
    hidden: int = 4096,
    epochs: int = 100,
    batch_size: int = 256,
    learning_rate: float = 0.1,
    decay_start: int = 20,
    decay: float = 0.3,
    momentum: float = 0.9,
    weight_decay: float = 1e-8,
    dropout: float = 0.5,
) -> float:
    """Train the authors' transfer MLP on features and return top-1 accuracy (test.lua, test.sh).

    FC-BN-ReLU-dropout-FC-BN-ReLU-FC with Torch's uniform initialisation, cross-entropy, SGD with
    `learning_rate` for `decay_start` epochs and ``learning_rate / (1 + decay (e - decay_start))``
    after; momentum ``m = .9 m + .1 g``; kernels shrink by ``1 - weight_decay`` each step (which
    float32 rounds to 1 at the authors' 1e-8). Here features are cached, hence without crops and
    flips, and tested with one view. Every epoch leaves out the incomplete last batch.

    Args:
        train: features float32[N, F] to fit.
        test: features to classify.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the initialisation, the order and the dropout masks.
        hidden: width of both hidden layers.
        epochs: passes over the training set.
        batch_size: min(batch_size, N) is used.
        learning_rate: of the first `decay_start` epochs.
        decay_start: epochs of constant rate.
        decay: of the rate afterwards.
        momentum: m = momentum * m + (1 - momentum) * gradient.
        weight_decay: per step, on kernels, independent of the learning rate.
        dropout: rate after the first hidden layer.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: an option out of range, sets that do not fit (see `check_sets`), or weights
            that diverge.
    """
    check_sets(train, test, num_classes)
    for name, value in (("hidden", hidden), ("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"mlp_probe: {name}: expected at least 1, got {value}")
    for name, rate in (("momentum", momentum), ("dropout", dropout)):
        if not 0 <= rate < 1:
            raise ValueError(f"mlp_probe: {name}: expected a number in [0, 1), got {rate}")

    key = jax.random.key(seed)
    net = _Network(train.features.shape[1], hidden, num_classes, float(dropout))
    params, stats = _initialise(jax.random.fold_in(key, 0), net=net)
    state = params, stats, jax.tree.map(jnp.zeros_like, params)
    length = padded_length(len(train))
    features = jnp.asarray(padded_rows(train.features, length))
    labels = jnp.asarray(padded_rows(train.labels, length))
    batch = min(batch_size, len(train))
    steps = len(train) // batch
    for epoch in range(epochs):
        rate = learning_rate / (1 + decay * max(epoch - decay_start, 0))
        rows = np.random.default_rng((seed, epoch)).permutation(len(train))[: steps * batch]
        # A fresh array each time: the device may still read the last one.
        order = np.zeros((length // batch, batch), np.int32)
        order[:steps] = rows.reshape(steps, batch)
        state = _epoch(
            state,
            features,
            labels,
            order,
            np.int32(steps),
            jax.random.fold_in(key, epoch + 1),
            np.asarray((rate, momentum, weight_decay), np.float32),
            net=net,
        )
    predicted = _predict(net, state[0], state[1], test.features)
    return float(np.mean(predicted == test.labels))


def _uniform(fan_in: int) -> Callable[..., jax.Array]:
    """Torch's initialisation of weights and biases alike: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class _Mlp(nnx.Module):
    def __init__(self, features: int, hidden: int, classes: int, rate: float, *, rngs: nnx.Rngs):
        def linear(fan_in: int, fan_out: int) -> nnx.Linear:
            init = _uniform(fan_in)
            return nnx.Linear(fan_in, fan_out, kernel_init=init, bias_init=init, rngs=rngs)

        def norm() -> nnx.BatchNorm:  # Torch7 draws the scale from U(0, 1)
            scale = jax.nn.initializers.uniform(1.0)
            return nnx.BatchNorm(
                hidden, momentum=0.9, scale_init=scale, use_fast_variance=False, rngs=rngs
            )

        self.fc1, self.bn1 = linear(features, hidden), norm()
        self.fc2, self.bn2 = linear(hidden, hidden), norm()
        self.fc3 = linear(hidden, classes)
        self.dropout = nnx.Dropout(rate)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Return logits; with a key in training mode (batch statistics, dropout)."""
        test = key is None
        x = jax.nn.relu(self.bn1(self.fc1(x), use_running_average=test))
        x = self.dropout(x, deterministic=test, rngs=key)
        x = jax.nn.relu(self.bn2(self.fc2(x), use_running_average=test))
        return self.fc3(x)


class _Network(NamedTuple):
    """What a compiled program depends on, besides the shapes of its arguments."""

    features: int
    hidden: int
    classes: int
    dropout: float

    def build(self, rngs: nnx.Rngs) -> _Mlp:
        return _Mlp(self.features, self.hidden, self.classes, self.dropout, rngs=rngs)

    def graph(self) -> nnx.GraphDef:
        return nnx.graphdef(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))


_State = tuple[nnx.State, nnx.State, nnx.State]  # parameters, batch statistics, momentum


@functools.partial(jax.jit, static_argnames="net")
def _initialise(key: jax.Array, *, net: _Network) -> tuple[nnx.State, nnx.State]:
    mlp = net.build(nnx.Rngs(key))
    return nnx.state(mlp, nnx.Param), nnx.state(mlp, nnx.BatchStat)


@functools.partial(jax.jit, static_argnames="net", donate_argnames="state")
def _epoch(
    state: _State,
    features: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    steps: jax.Array,
    key: jax.Array,
    rates: jax.Array,
    *,
    net: _Network,
) -> _State:
    """Take one SGD step on each of the first `steps` rows of order int32[slots, batch]."""
    learning_rate, momentum, weight_decay = rates
    graph = net.graph()

    def step(i: jax.Array, state: _State) -> _State:
        params, stats, trace = state
        images, expected = features[order[i]], labels[order[i]]

        def loss(params: nnx.State) -> tuple[jax.Array, nnx.State]:
            mlp = nnx.merge(graph, params, stats, copy=True)
            logits = mlp(images, jax.random.fold_in(key, i))
            nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, expected)
            return jnp.mean(nll), nnx.state(mlp, nnx.BatchStat)

        grads, stats = jax.grad(loss, has_aux=True)(params)
        params, trace = _descend(params, trace, grads, learning_rate, momentum, weight_decay)
        return params, stats, trace

    return jax.lax.fori_loop(0, steps, step, state)


def _descend(
    params: nnx.State,
    trace: nnx.State,
    grads: nnx.State,
    learning_rate: jax.typing.ArrayLike,
    momentum: jax.typing.ArrayLike,
    weight_decay: jax.typing.ArrayLike,
) -> tuple[nnx.State, nnx.State]:
    """Return (params, trace) after ``m = mu m + (1 - mu) g``, ``w = (w - lr m) (1 - decay)``.

    Only kernels, the leaves of rank 2, decay.
    """
    trace = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, trace, grads)

    def move(w: jax.Array, m: jax.Array) -> jax.Array:
        w = w - learning_rate * m
        return w * (1 - weight_decay) if w.ndim >= 2 else w

    return jax.tree.map(move, params, trace), trace


@functools.partial(jax.jit, static_argnames="net")
def _logits(
    params: nnx.State, stats: nnx.State, features: jax.Array, *, net: _Network
) -> jax.Array:
    return nnx.merge(net.graph(), params, stats)(features, None)


def _predict(
    net: _Network, params: nnx.State, stats: nnx.State, features: np.ndarray
) -> np.ndarray:
    """Return int[N], the class of the largest logit (ties: the smaller), in chunks."""
    rows = min(_PREDICT_CHUNK, padded_length(len(features)))
    chunks = []
    for start in range(0, len(features), rows):
        part = features[start : start + rows]
        logits = np.asarray(_logits(params, stats, padded_rows(part, rows), net=net))[: len(part)]
        if not np.isfinite(logits).all():
            raise ValueError(
                "mlp_probe: the classifier's weights diverged (logits are not finite); "
                "lower learning_rate"
            )
        chunks.append(logits.argmax(axis=1))
    return np.concatenate(chunks)
