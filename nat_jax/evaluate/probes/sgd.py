"""SGD for probes, on features in memory or on a stream of features of fresh crops.

A probe supplies a `Classifier` and its learning rates. `fit` trains one classifier for each layer
of a stream of batches, `accuracy` scores them; `in_memory` makes streams of features in memory.
"""

import collections
import contextlib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nat_jax.errors import InputError
from nat_jax.evaluate.features import (
    Epoch,
    FeatureBatch,
    FeatureSet,
    TrainEpoch,
    check_labels,
    check_sets,
    padded_length,
    padded_rows,
)
from nat_jax.training import metrics

Tree = Any  # a pytree of arrays

_PREDICT_CHUNK = 4096
_RESIDENT_BYTES = 4 << 30  # features up to this size are kept on the device for training
_IN_FLIGHT = 2  # steps that are computed while the next batches are made
_IN_MEMORY = "these features"  # the layer's name in a stream of features in memory


class Classifier(Protocol):
    """A network on features. Hashable: what a compiled program depends on besides shapes."""

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Return initial parameters and statistics."""

    def apply(
        self, params: Tree, stats: Tree, features: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        """Return logits [B, C] of float[B, F] and new statistics; with a key in training mode."""

    def optimizer(self, rate: jax.Array | float) -> optax.GradientTransformation:
        """Return the optimiser at a learning rate, on which its state does not depend."""


class State(NamedTuple):
    """Parameters, statistics (of batch norm) and optimiser state of a classifier in training."""

    params: Tree
    stats: Tree
    optimizer: optax.OptState


Trained = dict[str, tuple[Classifier, State]]  # by layer


def fit(
    name: str,
    make: Callable[[int], Classifier],
    train_epoch: TrainEpoch,
    epochs: int,
    rate: Callable[[int], float],
    *,
    num_classes: int,
    seed: int,
) -> Trained:
    """Train one classifier for each layer of a stream, and show the progress.

    Args:
        name: of the probe.
        make: returns the classifier for a number of features.
        train_epoch: returns the batches of an epoch, counted from 0, all of one size; called once
            for each epoch.
        epochs: passes over the training data.
        rate: learning rate of an epoch, counted from 0.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the initialisation and of dropout; all layers share it, so that a layer's result
            does not depend on which others are trained at the same time.

    Raises:
        InputError: an epoch without batches, labels out of range, or a loss that is not finite.
    """
    key = jax.random.key(seed)
    trained: Trained = {}
    pending: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
    progress = metrics.Progress(start=0, total=0, title=name, every=metrics.SECONDS)
    done = 0

    def read(keep: int) -> None:
        nonlocal done
        while len(pending) > keep:
            losses = _checked(*pending.popleft())
            done += 1
            progress.show(done, "loss " + ", ".join(f"{v:.3f} on {k}" for k, v in losses.items()))

    with contextlib.closing(progress):
        for epoch in range(epochs):
            epoch_rate, epoch_key = np.float32(rate(epoch)), jax.random.fold_in(key, epoch + 1)
            losses: dict[str, jax.Array] = {}
            batches = train_epoch(epoch)
            progress.total = epochs * operator.length_hint(batches)
            for step, batch in enumerate(batches):
                _check_batch(batch, num_classes, "train")
                losses = {}
                for layer, features in batch.features.items():
                    if layer not in trained:
                        net = make(_dimension(features, layer))
                        trained[layer] = net, _start(jax.random.fold_in(key, 0), net=net)
                    net, state = trained[layer]
                    examples = features, batch.labels, batch.weight
                    step_key = epoch_key, np.int32(step)
                    state, losses[layer] = _step(state, *examples, *step_key, epoch_rate, net=net)
                    trained[layer] = net, state
                pending.append((epoch, losses))
                read(keep=_IN_FLIGHT)
            if not losses:
                raise InputError(f"epoch {epoch} of the training features holds no batch")
            read(keep=0)
    return trained


def accuracy(
    trained: Trained, batches: Iterable[FeatureBatch], *, num_classes: int
) -> dict[str, float]:
    """Return each layer's top-1 accuracy in [0, 1]; logits are summed over a record's views.

    Args:
        trained: the result of `fit`.
        batches: test features [B, F] or [B, V, F]; records of weight 0 are left out.
        num_classes: labels are 0 .. num_classes - 1; a tie goes to the smaller one.

    Raises:
        InputError: no record, labels out of range, or weights that diverged.
    """
    right, records = dict.fromkeys(trained, 0), 0
    for batch in batches:
        _check_batch(batch, num_classes, "test")
        keep = np.asarray(batch.weight) > 0
        labels = np.asarray(batch.labels)[keep]
        records += len(labels)
        for layer, (net, state) in trained.items():
            features = batch.features[layer]
            logits = np.asarray(_logits(state.params, state.stats, features, net=net))[keep]
            if not np.isfinite(logits).all():
                raise InputError(
                    "the classifier's weights diverged (logits are not finite); lower learning_rate"
                )
            right[layer] += int(np.sum(logits.argmax(axis=1) == labels))
    if not records:
        raise InputError("the test features hold no record of weight 1")
    return {layer: count / records for layer, count in right.items()}


def in_memory(name: str, stream: Callable[..., dict[str, float]]) -> Callable[..., float]:
    """Return a probe of features in memory (or mapped from a file) that learns as one of a stream.

    It has the options of `stream` and ``batch_size``, of which min(batch_size, N) is used. An epoch
    shuffles the records by ``seed`` and leaves out the incomplete last batch.

    Args:
        name: of the probe, for messages.
        stream: the probe that learns from a stream.
    """

    def probe(
        train: FeatureSet,
        test: FeatureSet,
        *,
        num_classes: int,
        seed: int = 0,
        batch_size: int = 256,
        **options: Any,
    ) -> float:
        check_sets(train, test, num_classes)
        check_options(name, at_least_1={"batch_size": batch_size})
        epochs = shuffled(train, batch_size, seed)
        common = {"num_classes": num_classes, "seed": seed}
        return stream(epochs, in_order(test), **common, **options)[_IN_MEMORY]

    probe.__doc__ = f"Learn from features in memory as `{stream.__name__}` does from a stream."
    own = inspect.signature(probe)
    options = inspect.signature(stream).parameters.values()
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [p for p in options if p.default is not p.empty and p.name not in own.parameters]
    probe.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return probe


def shuffled(train: FeatureSet, batch_size: int, seed: int) -> TrainEpoch:
    """Return epochs of features in memory, each in another order, without the incomplete batch.

    Features of up to 4 GiB are kept on the device; of more, each batch is gathered on the host.
    """
    features: np.ndarray | jax.Array = train.features
    if features.nbytes <= _RESIDENT_BYTES:
        features = jnp.asarray(features)
    batch = min(batch_size, len(train))
    steps, weight = len(train) // batch, np.ones(batch, np.float32)

    def computed(number: int) -> Iterator[FeatureBatch]:
        order = np.random.default_rng((seed, number)).permutation(len(train))[: steps * batch]
        for rows in order.reshape(steps, batch).astype(np.int32):
            chosen = _take(features, rows) if isinstance(features, jax.Array) else features[rows]
            yield FeatureBatch({_IN_MEMORY: chosen}, train.labels[rows], weight)

    return lambda number: Epoch(computed(number), steps)


def in_order(test: FeatureSet) -> Iterator[FeatureBatch]:
    """Yield features in memory in order; the last batch is padded with records of weight 0."""
    rows = min(_PREDICT_CHUNK, padded_length(len(test)))
    for first in range(0, len(test), rows):
        features, labels = (a[first : first + rows] for a in (test.features, test.labels))
        weight = np.ones(len(labels), np.float32)
        features, labels, weight = (padded_rows(a, rows) for a in (features, labels, weight))
        yield FeatureBatch({_IN_MEMORY: features}, labels, weight)


def keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a probe and their defaults."""
    common = ("train", "test", "num_classes", "seed", "options")
    parameters = inspect.signature(function).parameters
    return {name: p.default for name, p in parameters.items() if name not in common}


def check_options(
    name: str, *, at_least_1: Mapping[str, int], below_1: Mapping[str, float] | None = None
) -> None:
    """Raise InputError, with the probe's name, for counts below 1 or shares outside [0, 1)."""
    for option, count in at_least_1.items():
        if count < 1:
            raise InputError(f"{name}: {option}: expected at least 1, got {count}")
    for option, share in (below_1 or {}).items():
        if not 0 <= share < 1:
            raise InputError(f"{name}: {option}: expected a number in [0, 1), got {share}")


@functools.partial(jax.jit, static_argnames="net")
def _start(key: jax.Array, *, net: Classifier) -> State:
    params, stats = net.init(key)
    return State(params, stats, net.optimizer(0.0).init(params))


@functools.partial(jax.jit, static_argnames="net", donate_argnames="state")
def _step(
    state: State,
    features: jax.Array,
    labels: jax.Array,
    weight: jax.Array,
    key: jax.Array,
    step: jax.Array,
    rate: jax.Array,
    *,
    net: Classifier,
) -> tuple[State, jax.Array]:
    """Return the state after one batch, and its mean cross-entropy over records of weight 1."""
    features = features.astype(jnp.float32)

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        logits, stats = net.apply(params, state.stats, features, jax.random.fold_in(key, step))
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        counted = jnp.where(weight > 0, nll, 0.0)  # a record of weight 0 may have no label
        return jnp.sum(counted) / jnp.maximum(jnp.sum(weight > 0), 1), stats

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, optimizer = net.optimizer(rate).update(grads, state.optimizer, state.params)
    return State(optax.apply_updates(state.params, updates), stats, optimizer), value


@jax.jit
def _take(features: jax.Array, rows: jax.Array) -> jax.Array:
    return features[rows]


@functools.partial(jax.jit, static_argnames="net")
def _logits(params: Tree, stats: Tree, features: jax.Array, *, net: Classifier) -> jax.Array:
    """Return float[B, C], summed over the views of [B, V, F]."""
    flat = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    logits = net.apply(params, stats, flat, None)[0]
    return jnp.sum(logits.reshape(len(features), -1, logits.shape[-1]), axis=1)


def _dimension(features: jax.Array | np.ndarray, layer: str) -> int:
    if features.ndim != 2:
        raise InputError(
            f"{layer}: expected training features [B, F], got shape {features.shape}; flatten "
            "each record"
        )
    return features.shape[1]


def _check_batch(batch: FeatureBatch, num_classes: int, name: str) -> None:
    check_labels(np.asarray(batch.labels)[np.asarray(batch.weight) > 0], num_classes, name)


def _checked(epoch: int, losses: Mapping[str, jax.Array]) -> dict[str, float]:
    values = {layer: float(loss) for layer, loss in losses.items()}
    for layer, loss in values.items():
        if not math.isfinite(loss):
            raise InputError(
                f"the probe on {layer} diverged in epoch {epoch} (its loss is {loss}); "
                "lower learning_rate"
            )
    return values
