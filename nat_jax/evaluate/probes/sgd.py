"""SGD for probes: one step, driven over features in memory or over a stream of batches.

A probe brings a `Classifier`: how it begins, its logits and its rule of descent. Features in memory
are shuffled anew in every epoch. A stream of features that are computed from fresh crops and flips
trains the classifiers of all layers at once, with the same step and the same schedule.
"""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nat_jax.errors import InputError
from nat_jax.evaluate.features import FeatureSet, check_labels, padded_length, padded_rows
from nat_jax.evaluate.stream import FeatureBatch, TrainEpoch

logger = logging.getLogger(__name__)

Tree = Any  # a pytree of arrays

_PREDICT_CHUNK = 4096
_RESIDENT_BYTES = 4 << 30  # features up to this size are kept on the device for training
_IN_FLIGHT = 2  # steps of a stream that are computed while the next batches are made
_LINES = 10  # of progress over a stream's epochs, which can take hours


class Classifier(Protocol):
    """A network on features. Hashable: what a compiled program depends on beside shapes."""

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """Return fresh parameters and statistics."""

    def apply(
        self, params: Tree, stats: Tree, features: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, Tree]:
        """Return logits [B, C] of float[B, F] and new statistics; with a key in training mode."""

    def descend(
        self, params: Tree, trace: Tree, grads: Tree, rates: jax.Array
    ) -> tuple[Tree, Tree]:
        """Return parameters and momentum after one step with rates float32[3], see `Recipe`."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast a classifier learns.

    Attributes:
        epochs: passes over the training data.
        rate: learning rate of an epoch, counted from 0.
        momentum: second of the rates that `Classifier.descend` is given.
        decay: of the weights, the third.
    """

    epochs: int
    rate: Callable[[int], float]
    momentum: float
    decay: float

    def rates(self, epoch: int) -> np.ndarray:
        """Return float32[3]: learning rate, momentum, decay."""
        return np.asarray((self.rate(epoch), self.momentum, self.decay), np.float32)


class State(NamedTuple):
    """Parameters, statistics (batch norm's) and momentum of a classifier in training."""

    params: Tree
    stats: Tree
    trace: Tree


@functools.partial(jax.jit, static_argnames="net")
def start(net: Classifier, key: jax.Array) -> State:
    """Return a classifier before its first step."""
    params, stats = net.init(key)
    return State(params, stats, jax.tree.map(jnp.zeros_like, params))


def fit(net: Classifier, train: FeatureSet, recipe: Recipe, *, batch_size: int, seed: int) -> State:
    """Train on features in memory, or mapped from a file.

    Every epoch shuffles the records and leaves out the incomplete last batch. Features of up to
    4 GiB stay on the device; of more, each batch is gathered on the host.

    Args:
        net: the classifier.
        train: features float32[N, F] and labels in range, already checked.
        recipe: epochs and rates.
        batch_size: min(batch_size, N) is used.
        seed: of the initialisation, the order and what is random in the classifier.
    """
    key = jax.random.key(seed)
    state = start(net, jax.random.fold_in(key, 0))
    length = padded_length(len(train))
    resident = 4 * length * train.features.shape[1] <= _RESIDENT_BYTES
    if resident:
        features = jnp.asarray(padded_rows(train.features, length))
        labels = jnp.asarray(padded_rows(train.labels, length))
    batch = min(batch_size, len(train))
    steps = len(train) // batch
    for epoch in range(recipe.epochs):
        chosen = np.random.default_rng((seed, epoch)).permutation(len(train))[: steps * batch]
        rows = chosen.reshape(steps, batch).astype(np.int32)
        rates, epoch_key = recipe.rates(epoch), jax.random.fold_in(key, epoch + 1)
        if resident:
            # A fresh array each time: the device may still read the last one.
            order = padded_rows(rows, length // batch)
            state = _epoch(
                state, features, labels, order, np.int32(steps), epoch_key, rates, net=net
            )
            continue
        for i, now in enumerate(rows):
            state, loss = _step(
                state,
                train.features[now],
                train.labels[now],
                None,
                epoch_key,
                np.int32(i),
                rates,
                net=net,
            )
            jax.block_until_ready(loss)  # bounds the batches that wait on the device
    return state


def fit_stream(
    make: Callable[[int], Classifier],
    train_epoch: TrainEpoch,
    recipe: Recipe,
    *,
    num_classes: int,
    seed: int,
) -> dict[str, tuple[Classifier, State]]:
    """Train one classifier for each layer of a stream.

    Args:
        make: the classifier for a number of features.
        train_epoch: gives the batches of an epoch, counted from 0, all of one size; called once for
            each epoch.
        recipe: epochs and rates.
        num_classes: labels are 0 .. num_classes - 1.
        seed: of the initialisation and what is random in the classifiers; all layers share it, so
            that a layer's result does not depend on which others are trained beside it.

    Returns:
        {layer: (classifier, state)}.

    Raises:
        ValueError: an epoch without batches, labels out of range, or a loss that is not finite.
    """
    key = jax.random.key(seed)
    trained: dict[str, tuple[Classifier, State]] = {}
    pending: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
    for epoch in range(recipe.epochs):
        rates, epoch_key = recipe.rates(epoch), jax.random.fold_in(key, epoch + 1)
        step = -1
        for step, batch in enumerate(train_epoch(epoch)):
            _check_batch(batch, num_classes, "train")
            losses = {}
            for layer, features in batch.features.items():
                if layer not in trained:
                    net = make(_dimension(features, layer))
                    trained[layer] = net, start(net, jax.random.fold_in(key, 0))
                net, state = trained[layer]
                state, losses[layer] = _step(
                    state,
                    features,
                    batch.labels,
                    batch.weight,
                    epoch_key,
                    np.int32(step),
                    rates,
                    net=net,
                )
                trained[layer] = net, state
            pending.append((epoch, losses))
            if len(pending) > _IN_FLIGHT:
                _check_losses(*pending.popleft())
        if step < 0:
            raise InputError(f"epoch {epoch} of the training features holds no batch")
        while pending:
            _check_losses(*pending.popleft())
        if (epoch + 1) % math.ceil(recipe.epochs / _LINES) == 0:
            last = ", ".join(f"{layer} {float(loss):.3f}" for layer, loss in losses.items())
            logger.info("epoch %d of %d, loss on %s", epoch + 1, recipe.epochs, last)
    return trained


def accuracy(net: Classifier, state: State, test: FeatureSet) -> float:
    """Return top-1 accuracy in [0, 1]; a tie goes to the smaller label.

    Raises:
        ValueError: weights that diverged.
    """
    rows = min(_PREDICT_CHUNK, padded_length(len(test)))
    right = 0
    for first in range(0, len(test), rows):
        part = slice(first, first + rows)
        features = padded_rows(test.features[part], rows)
        logits = np.asarray(_logits(state.params, state.stats, features, net=net))
        logits = logits[: len(test.labels[part])]
        _check_logits(logits)
        right += int(np.sum(logits.argmax(axis=1) == test.labels[part]))
    return right / len(test)


def accuracy_stream(
    trained: Mapping[str, tuple[Classifier, State]],
    batches: Iterable[FeatureBatch],
    *,
    num_classes: int,
) -> dict[str, float]:
    """Return each layer's top-1 accuracy in [0, 1]; logits are summed over a record's views.

    Args:
        trained: the result of `fit_stream`.
        batches: test features [B, F] or [B, V, F]; records of weight 0 are left out.
        num_classes: labels are 0 .. num_classes - 1.

    Raises:
        ValueError: no record, labels out of range, or weights that diverged.
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
            _check_logits(logits)
            right[layer] += int(np.sum(logits.argmax(axis=1) == labels))
    if not records:
        raise InputError("the test features hold no record of weight 1")
    return {layer: count / records for layer, count in right.items()}


def check_options(
    probe: str, *, at_least_1: Mapping[str, int], below_1: Mapping[str, float] | None = None
) -> None:
    """Raise ValueError, with the probe's name, for counts below 1 or shares outside [0, 1)."""
    for name, count in at_least_1.items():
        if count < 1:
            raise InputError(f"{probe}: {name}: expected at least 1, got {count}")
    for name, share in (below_1 or {}).items():
        if not 0 <= share < 1:
            raise InputError(f"{probe}: {name}: expected a number in [0, 1), got {share}")


def _take_step(
    net: Classifier,
    state: State,
    features: jax.Array,
    labels: jax.Array,
    weight: jax.Array | None,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[State, jax.Array]:
    """Return the state after one batch, and the batch's mean cross-entropy."""

    def loss(params: Tree) -> tuple[jax.Array, Tree]:
        logits, stats = net.apply(params, state.stats, features, key)
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
        if weight is None:
            return jnp.mean(nll), stats
        counted = jnp.where(
            weight > 0, nll, 0.0
        )  # the label of one that does not count is no class
        return jnp.sum(counted) / jnp.maximum(jnp.sum(weight > 0), 1), stats

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    params, trace = net.descend(state.params, state.trace, grads, rates)
    return State(params, stats, trace), value


@functools.partial(jax.jit, static_argnames="net", donate_argnames="state")
def _epoch(
    state: State,
    features: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    steps: jax.Array,
    key: jax.Array,
    rates: jax.Array,
    *,
    net: Classifier,
) -> State:
    """Take one step on each of the first `steps` rows of order int32[slots, batch]."""

    def step(i: jax.Array, state: State) -> State:
        rows = order[i]
        key_ = jax.random.fold_in(key, i)
        return _take_step(net, state, features[rows], labels[rows], None, key_, rates)[0]

    return jax.lax.fori_loop(0, steps, step, state)


@functools.partial(jax.jit, static_argnames="net", donate_argnames="state")
def _step(
    state: State,
    features: jax.Array,
    labels: jax.Array,
    weight: jax.Array | None,
    key: jax.Array,
    i: jax.Array,
    rates: jax.Array,
    *,
    net: Classifier,
) -> tuple[State, jax.Array]:
    """Take step `i` of an epoch; return the batch's mean cross-entropy too."""
    key = jax.random.fold_in(key, i)
    return _take_step(net, state, features.astype(jnp.float32), labels, weight, key, rates)


@functools.partial(jax.jit, static_argnames="net")
def _logits(params: Tree, stats: Tree, features: jax.Array, *, net: Classifier) -> jax.Array:
    """Return float[B, C], summed over the views of [B, V, F]."""
    if features.ndim == 2:
        return net.apply(params, stats, features, None)[0]
    flat = features.reshape(-1, features.shape[-1]).astype(jnp.float32)
    logits = net.apply(params, stats, flat, None)[0]
    return jnp.sum(logits.reshape(*features.shape[:2], -1), axis=1)


def _dimension(features: jax.Array | np.ndarray, layer: str) -> int:
    if features.ndim != 2:
        raise InputError(
            f"{layer}: expected training features [B, F], got shape {features.shape}; flatten "
            "each record"
        )
    return features.shape[1]


def _check_batch(batch: FeatureBatch, num_classes: int, name: str) -> None:
    check_labels(np.asarray(batch.labels)[np.asarray(batch.weight) > 0], num_classes, name)


def _check_losses(epoch: int, losses: Mapping[str, jax.Array]) -> None:
    for layer, loss in losses.items():
        if not math.isfinite(float(loss)):
            raise InputError(
                f"the probe on {layer} diverged in epoch {epoch} (its loss is {float(loss)}); "
                "lower learning_rate"
            )


def _check_logits(logits: np.ndarray) -> None:
    if not np.isfinite(logits).all():
        raise InputError(
            "the classifier's weights diverged (logits are not finite); lower learning_rate"
        )
