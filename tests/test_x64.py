"""With JAX_ENABLE_X64=1 the same programs are traced: no float64, no other random bits.

Traced only; a test of tests/test_golden.py trains in this mode, `.ci/run` trains and solves.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nat_jax import models, optim, targets, train_step
from nat_jax.assign._problem import enable_x64
from nat_jax.evaluate.baselines import codebooks
from nat_jax.evaluate.features import FeatureSet
from nat_jax.evaluate.probes import lbfgs, ridge, sgd
from nat_jax.evaluate.probes.knn import _merge
from nat_jax.evaluate.probes.linear import Linear
from nat_jax.evaluate.probes.mlp import Mlp
from nat_jax.runtime import sharding

B, D, F, CLASSES = 8, 4, 6, 3
MODEL = models.make_model(
    "convnet",
    dim=D,
    image_size=8,
    frontend="sobel",
    widths=(4,),
    pools=1,
    fc_width=5,
    dropout=0.5,
    bn_groups=2,
)
OPTIMIZER = optim.Optimizer(
    0.5, "cosine", warmup_steps=2, total_steps=9, momentum=0.9, weight_decay=0.1
)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


ROWS, X, LABELS = array("int32", B), array("float32", B, F), array("int32", B)
WEIGHT, ONE, WHOLE = array("float32", B), array("float32"), array("int32")
IMAGES = array("uint8", B, 8, 8, 3)


def step(solver: str, loss: str):
    """Return a step that re-matches, or a supervised one, as a function of nothing."""
    supervised = loss == "softmax"
    settings = train_step.Step(MODEL, OPTIMIZER, sharding.make_mesh(1, 1), loss, supervised, solver)
    rows = targets.Basis(D) if supervised else targets.VirtualSphere

    def run(key, images, index, label, weight):
        state = train_step.create_state(MODEL, OPTIMIZER, jnp.arange(20, dtype=jnp.int32), key)
        batch = {"image": images, "index": index, "label": label, "weight": weight}
        of = rows if supervised else rows(key, D)
        state, metrics = train_step.train_step(settings, state, of, batch, reassign=not supervised)
        return dataclasses.replace(state, key=jax.random.key_data(state.key)), metrics

    return run, (KEY, IMAGES, ROWS, LABELS, WEIGHT)


def probe(net):
    def run(key, features, labels, weight, rate):
        state = sgd._start(key, net=net)
        return sgd._step(state, features, labels, weight, key, jnp.int32(0), rate, net=net)

    return run, (KEY, X, LABELS, WEIGHT, ONE)


def table(key):
    return targets.make_targets("sphere", 50, D, key)[0].rows


def permutation(key):
    return targets.initial_assignment("basis", 50, key, length=52)


def products(*arguments):
    return ridge._products(*arguments, num_classes=CLASSES)


VECTOR = array("float32", F)
PROGRAMS = {
    "targets": (table, (KEY,)),
    "basis": (targets.Basis(D).gather, (ROWS,)),
    "permutation": (permutation, (KEY,)),
    "re-matching": step("auction", "square"),
    "supervised": step("scipy", "softmax"),
    "mlp": probe(Mlp(F, 5, CLASSES, 0.5, "torch")),
    "sgd": probe(Linear(F, CLASSES, 0.9, 1e-4)),
    "ridge": (products, (X, LABELS, WHOLE, VECTOR, VECTOR)),
    "knn": (_merge, (array("float32", B, 2), array("int32", B, 2), X, X, WHOLE, WHOLE)),
    "k-means": (codebooks._nearest, (X, X)),
}


def equations(jaxpr):
    """Yield the equations of a program and of those that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(value):
                yield from equations(getattr(value, "jaxpr", value))


def is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def differences(function, arguments) -> set[str]:
    """Return what 64-bit mode changes in a program; constants of Python do not count."""
    plain = jax.eval_shape(function, *arguments)
    with enable_x64(True):
        program = jax.make_jaxpr(function)(*arguments)
        wide = jax.eval_shape(function, *arguments)
    found = set() if plain == wide else {"its results"}
    for equation in equations(program.jaxpr):
        if equation.params.get("bit_width") == 64:
            found.add("random bits")
        for aval in (variable.aval for variable in equation.outvars):
            dtype = getattr(aval, "dtype", None)
            if dtype == "float64" and aval.shape and not aval.weak_type:
                found.add(f"{equation.primitive} {aval}")
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_the_same_in_64_bit_mode(name: str) -> None:
    assert differences(*PROGRAMS[name]) == set()


def test_lbfgs_computes_in_32_bits(monkeypatch) -> None:
    loss, seen = lbfgs._loss, set()

    def spied(*arguments):
        found = loss(*arguments)
        seen.update(str(array.dtype) for array in found)
        return found

    monkeypatch.setattr(lbfgs, "_loss", spied)
    rng = np.random.default_rng(0)
    labels = np.int32([0] * 30 + [1] * 70)
    features = (labels[:, None] + 0.01 * rng.normal(size=(100, 2))).astype(np.float32)
    data = FeatureSet(features, labels)
    with enable_x64(True):
        assert lbfgs.lbfgs_probe(data, data, num_classes=2) == 1.0
    assert seen == {"float32"}


def test_a_draw_without_a_dtype_is_found() -> None:
    found = differences(lambda key: jax.random.normal(key, (3,)), (KEY,))
    assert {"its results", "random bits", "mul float64[3]"} <= found
