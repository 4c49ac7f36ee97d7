"""Supervised training: labels as targets, with the square loss and with softmax."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import changed

from nat_jax import config, losses, models, optim, targets, train
from nat_jax.models.layers import unit_norm
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state
from nat_jax.training.host_matching import compile_step

N, B, CLASSES = 48, 16, 5


def make_step(loss: str) -> Step:
    model = models.make_model(
        "convnet", dim=CLASSES, image_size=8, frontend="sobel", widths=(4, 8), pools=2
    )
    return Step(model, optim.Optimizer(0.5), sharding.make_mesh(), loss=loss, supervised=True)


def make_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (B, 8, 8, 3), np.uint8),
        "index": rng.permutation(N)[:B].astype(np.int32),
        "weight": np.ones(B, np.float32),
        "label": rng.integers(0, CLASSES, B, np.int32),
    }


CREATE = jax.jit(create_state, static_argnums=(0, 1))


def run(step: Step, batch: dict[str, np.ndarray], steps: int = 1):
    """Return the parameters before, the state after, and the losses."""
    noise, _ = targets.make_targets("labels", N, CLASSES, jax.random.key(7))
    state = CREATE(step.model, step.optimizer, np.arange(N, dtype=np.int32), jax.random.key(0))
    before = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
    values = []
    for _ in range(steps):
        state, metrics = compile_step(step, reassign=False)(state, noise, batch)
        values.append(float(metrics["train/loss"]))
    return before, state, values


@pytest.mark.parametrize("loss", ["square", "softmax"])
def test_a_step_follows_the_gradient_of_the_loss_on_labels(loss):
    step, batch = make_step(loss), make_batch()
    (params, stats), state, (value,) = run(step, batch)

    def by_hand(params):
        outputs, _ = step.model.apply(params, stats, batch["image"], train=True)
        logits = outputs["logits"]
        if loss == "softmax":
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
        z = logits / jnp.linalg.norm(logits, axis=1, keepdims=True)
        return 0.5 * jnp.mean(jnp.sum((z - jnp.eye(CLASSES)[batch["label"]]) ** 2, axis=1))

    expected, slope = jax.jit(jax.value_and_grad(by_hand))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for old, new, g in zip(*map(jax.tree.leaves, (params, state.params, slope)), strict=True):
        np.testing.assert_allclose(new, old - 0.5 * g, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.assignment, np.arange(N))


def test_the_labels_of_a_batch_are_learnt():
    _, _, values = run(make_step("softmax"), make_batch(), steps=80)
    assert values[-1] < 0.1 * values[0]


def test_a_record_without_a_class_counts_for_nothing():
    batch = make_batch()
    batch["label"][[3, 9]] = -1
    light = {**batch, "weight": (batch["label"] >= 0).astype(np.float32)}
    light["label"] = np.where(batch["label"] < 0, 2, batch["label"]).astype(np.int32)
    step = make_step("softmax")
    assert run(step, batch)[2] == run(step, light)[2]
    full = {**light, "weight": np.ones(B, np.float32)}
    assert run(step, batch)[2] != run(step, full)[2]


def test_softmax_loss_counts_views_and_records():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 2, 4)), jnp.float32)
    rows, weight = jnp.eye(4)[jnp.array([1, 3, 0])], jnp.array([1.0, 0.0, 1.0])
    each = -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
    expected = np.mean([each[0, :, 1].mean(), each[2, :, 0].mean()])
    np.testing.assert_allclose(losses.softmax_loss(logits, rows, weight), expected, rtol=1e-6)
    assert losses.softmax_loss(logits, rows, jnp.zeros(3)) == 0


def test_features_are_the_direction_of_the_logits():
    step, batch = make_step("square"), make_batch()
    params, stats = jax.jit(step.model.init)(jax.random.key(0))
    outputs, _ = jax.jit(step.model.apply)(params, stats, batch["image"])
    np.testing.assert_allclose(outputs["z"], unit_norm(outputs["logits"]), atol=1e-6)


def digits(**changes):
    c = config.default()
    c.epochs, c.batch_size, c.data.pad = 4.0, 128, 1
    c.model.dim = 10
    c.model.options.widths, c.model.options.pools = (8, 16), 1
    c.optim.learning_rate, c.optim.momentum = 0.1, 0.9
    c.targets.kind, c.optim.loss = "labels", "softmax"
    c.eval.probes, c.eval.layers, c.eval.labels_per_class = ("knn",), ("z",), (0,)
    return changed(c, **changes)


@pytest.mark.slow
def test_a_run_is_judged_by_its_own_decisions(tmp_path):
    state = train.train_and_evaluate(digits(), tmp_path)
    np.testing.assert_array_equal(state.assignment, np.arange(1437))
    result = json.loads((tmp_path / "results" / "pretrain.json").read_text())
    names = {(row["network"], row["probe"]) for row in result["table"]}
    assert {("supervised_softmax", "own"), ("untrained", "own")} <= names
    assert ("raw pixels", "own") not in names
    assert result["value"] > 0.85 > 0.3 > result["untrained"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith("assign/") for row in rows for name in row)
    page = (tmp_path / "report.html").read_text()
    assert "supervised, softmax" in page and "NAT is" not in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dim": 12}, "model.dim: expected the number of classes of digits, 10, with"),
        ({"targets__kind": "sphere"}, "optim.loss: 'softmax' is for supervised training"),
        ({"optim__loss": "hinge"}, "optim.loss: unknown 'hinge'. Known: square, softmax"),
    ],
)
def test_mistakes_are_found_before_training(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train_and_evaluate(digits(**changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [({}, ".* has none"), ({"y_train": np.arange(300) % 11 - 1}, "28 of 300 records .* have none")],
)
def test_records_without_classes_are_refused(tmp_path, labels, message):
    images = np.zeros((300, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", x_train=images, x_test=images[:1], **labels)
    changes = {"data__source": f"arrays:{tmp_path / 'images.npz'}"}
    with pytest.raises(ValueError, match=f"'labels' needs a class for every record; {message}"):
        train.train_and_evaluate(digits(**changes), tmp_path / "run")
