"""The steps that ``step.py`` compares, and the batches that they train on.

Every step is a jitted function of (state, batch) whose state is donated. Those of the library are
what ``nat_jax.training.host_matching.compile_step`` returns. The others are written here as anybody
would write them, with the library's compiler options: the network's ``apply`` under
``jax.value_and_grad``, optax's SGD, and nothing else.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from sklearn.datasets import load_sample_images

from nat_jax import models, optim, targets
from nat_jax.models import on_cpu
from nat_jax.models.frozen import compiled_layer_outputs
from nat_jax.runtime import sharding
from nat_jax.train_step import Step, create_state, state_shardings
from nat_jax.training.host_matching import SOLVER_SECONDS, compile_step

PLAIN = "NAT"
FEATURES = "features"
TORCH = "PyTorch"
TORCH_FEATURES = "PyTorch, features"
BY_HAND = "by hand"
SOFTMAX = "softmax on z"
SUPERVISED = "supervised"
LOSS = "train/loss"
Z = "z"

KERNEL = "auction as a kernel"
# Settings of a step that re-matches. The kernel is for NVIDIA GPUs; elsewhere it is the auction.
SOLVERS: dict[str, dict[str, Any]] = {
    "auction": dict(solver="auction"),
    KERNEL: dict(solver="auction", solver_options=(("kernel", True),)),
    "scipy": dict(solver="scipy"),
}
# What ``host_memory.keep_freed_pages`` does, for a process of PyTorch.
_KEEPS_PAGES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:"
    "glibc.malloc.trim_threshold=18446744073709551615:glibc.malloc.top_pad=268435456"
)
_IN_FLIGHT = 2  # steps, as in the training loop

Batch = dict[str, jax.Array]
State = Any
Targets = tuple[jax.Array, jax.Array]  # float32[N, D] rows and int32[N], the assignment


@dataclasses.dataclass(frozen=True)
class Problem:
    """A network, its optimiser, and the batches.

    Attributes:
        name: as in the tables.
        network: a key of ``models.MODELS``.
        image_size: side in pixels.
        dim: D.
        batch: B, one assignment problem.
        frontend: a key of ``models.FRONTENDS``.
        classes: of the supervised networks.
        momentum: 0 for plain SGD.
        dtype: compute dtype.
        batches: number of batches of images, all on the device.
        draws: number of times that the images of a batch come with other records' indices, and so
            with other targets: no problem is solved twice.
        rate: learning rate, low enough that none of the losses diverges.
    """

    name: str
    network: str
    image_size: int
    dim: int
    batch: int
    frontend: str
    classes: int
    momentum: float
    dtype: str = "float32"
    batches: int = 4
    draws: int = 16
    rate: float = 0.01

    @property
    def records(self) -> int:
        """Return N."""
        return self.batch * self.batches * self.draws

    def model(self, *, supervised: bool = False) -> models.Model:
        """Return the network; its outputs are the classes if ``supervised``, else the features."""
        return models.make_model(
            self.network,
            dim=self.classes if supervised else self.dim,
            image_size=self.image_size,
            frontend=self.frontend,
            dtype=self.dtype,
        )


_ALEXNET = Problem("AlexNet 224, B = 256", "alexnet", 224, 2048, 256, "sobel", 1000, 0.0)

# Networks, front ends and momentum of configs/cifar10.py and configs/alexnet.py.
PROBLEMS = {
    "convnet": Problem("convnet 32, B = 256", "convnet", 32, 64, 256, "rgb", 10, 0.9),
    "alexnet": _ALEXNET,
    "alexnet-bf16": dataclasses.replace(_ALEXNET, name=_ALEXNET.name + ", bf16", dtype="bfloat16"),
    "alexnet-16": dataclasses.replace(_ALEXNET, name="AlexNet 224, B = 16", batch=16),
    "tiny": Problem("tiny", "convnet", 8, 8, 16, "sobel", 5, 0.9),
}


def make_batches(problem: Problem, seed: int) -> list[Batch]:
    """Return batches of crops of two photographs, each image with a random class, on the device."""
    random, mesh = np.random.default_rng(seed), sharding.make_mesh(devices=jax.devices()[:1])
    photos, size = load_sample_images().images, problem.image_size
    shown = []
    for _ in range(problem.batches):
        image = np.empty((problem.batch, size, size, 3), np.uint8)
        for k in range(problem.batch):
            photo = photos[k % len(photos)]
            side = int(random.integers(min(size, 200), min(photo.shape[:2])))
            top, left = (int(random.integers(length - side + 1)) for length in photo.shape[:2])
            nearest = np.arange(size) * side // size
            image[k] = photo[top + nearest][:, left + nearest]
        label = random.integers(0, problem.classes, problem.batch).astype(np.int32)
        weight = np.ones(problem.batch, np.float32)
        local = {"image": image, "label": label, "weight": weight}
        shown.append(sharding.global_batch(local, mesh))
    numbers = random.permutation(problem.records).astype(np.int32).reshape(-1, problem.batch)
    return [
        shown[k % problem.batches] | sharding.global_batch({"index": index}, mesh)
        for k, index in enumerate(numbers)
    ]


@dataclasses.dataclass
class Contender:
    """A step that takes turns with others.

    Attributes:
        name: as in the tables.
        step: of (state, batch), the state donated.
        state: before the next step.
        batches: what it trains on, without end.
        turns: seconds and processor seconds of a step in each turn that counts and, where the host
            solves, the seconds of solving.
        metrics: of the last step.
        done: number of steps so far.
        lowered: returns the program of a step before optimisation, where it is one of ``jax.jit``.
    """

    name: str
    step: Callable[[State, Batch], tuple[State, dict[str, Any]]]
    state: State
    batches: Iterator[Batch]
    turns: list[dict[str, float]] = dataclasses.field(default_factory=list)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    done: int = 0
    lowered: Callable[[], jax.stages.Lowered] | None = None

    def turn(self, steps: int) -> dict[str, float]:
        """Do some steps and wait for them; return the seconds of each, as in ``turns``."""
        solving, waiting = 0.0, collections.deque[dict[str, Any]]()

        def run() -> None:
            nonlocal solving
            for _ in range(steps):
                self.state, self.metrics = self.step(self.state, next(self.batches))
                self.done += 1
                solving += self.metrics.get(SOLVER_SECONDS, 0.0)
                waiting.append(self.metrics)
                if len(waiting) > _IN_FLIGHT:
                    jax.block_until_ready(waiting.popleft())
            jax.block_until_ready((self.state, self.metrics))

        _, taken = measure.timed(run)
        return {name: value / steps for name, value in (taken | {"solving": solving}).items()}


@dataclasses.dataclass(kw_only=True)
class TorchContender(Contender):
    """A step of PyTorch, done by ``step_torch.py`` in another environment.

    Attributes:
        process: which does it.
        work: "train" or "features".
    """

    process: subprocess.Popen[str]
    work: str
    step: Any = None
    state: State = None
    batches: Iterator[Batch] = iter(())

    def turn(self, steps: int) -> dict[str, float]:
        """Do some steps there; return the seconds of each."""
        self.done += steps
        answer = ask(self.process, {"work": self.work, "count": steps})
        self.metrics = {LOSS: answer["value"]}
        return {name: answer[name] / steps for name in ("seconds", "cpu")} | {"solving": 0.0}


def ask(process: subprocess.Popen[str], request: dict[str, Any] | None) -> dict[str, Any]:
    """Send a request, if there is one, to ``step_torch.py`` and return its next answer."""
    assert process.stdin is not None and process.stdout is not None
    if request is not None:
        print(json.dumps(request), file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"step_torch.py ended with exit status {process.wait()}")
    return json.loads(line)


@contextlib.contextmanager
def torch_contenders(
    python: str, problem: Problem, batches: Sequence[Batch], seed: int
) -> Iterator[tuple[list[TorchContender], dict[str, Any]]]:
    """Start PyTorch on the same network, images and targets; give its contenders and versions.

    The versions come with its features of the first batch before training.
    """
    rows, assignment = _targets(problem, seed)
    model, used = problem.model(), batches[: problem.batches]
    params, _ = _first_weights(problem, seed)
    network = dataclasses.asdict(model.spec) | dataclasses.asdict(problem)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    with tempfile.TemporaryDirectory() as folder:
        np.savez(
            f"{folder}/problem.npz",
            settings=json.dumps(network),
            images=np.stack([batch["image"] for batch in used]),
            targets=np.stack([rows[assignment[batch["index"]]] for batch in used]),
            **arrays,
        )
        program = Path(__file__).with_name("step_torch.py")
        with subprocess.Popen(
            [python, str(program), f"{folder}/problem.npz"],
            env=os.environ | {"GLIBC_TUNABLES": _KEEPS_PAGES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            first = ask(process, None)
            works = {TORCH: "train", TORCH_FEATURES: "features"}
            yield [TorchContender(name, process=process, work=works[name]) for name in works], first
            process.stdin.close()  # type: ignore[union-attr]  # which ends it


def features(problem: Problem, batches: Sequence[Batch], seed: int) -> Contender:
    """Return the evaluation pass: unit features of a batch by the running statistics."""
    model = problem.model()
    outputs = compiled_layer_outputs(model.platform)

    def run(weights: Any, images: jax.Array) -> dict[str, Any]:
        z = outputs(model, (Z,), None, *weights, images)[Z]
        return {Z: z, LOSS: z[0, 0]}

    return Contender(
        FEATURES,
        lambda weights, batch: (weights, run(weights, batch["image"])),
        _first_weights(problem, seed),
        itertools.cycle(batches),
    )


def _first_weights(problem: Problem, seed: int) -> tuple[models.Params, models.Params]:
    return problem.model().init(jax.random.split(jax.random.key(seed))[0])


def contenders(
    problem: Problem, batches: Sequence[Batch], solvers: Sequence[str], seed: int
) -> Iterator[Contender]:
    """Yield the contenders, each with its own state; those of one network start from equal ones."""
    yield of_library(problem, batches, PLAIN, seed)
    yield by_hand(problem, batches, BY_HAND, noise_loss, seed)
    yield by_hand(problem, batches, SOFTMAX, classifier_loss, seed)
    yield of_library(problem, batches, SUPERVISED, seed, supervised=True, loss="softmax")
    yield from rematching(problem, batches, solvers, seed)


def rematching(
    problem: Problem, batches: Sequence[Batch], solvers: Sequence[str], seed: int
) -> Iterator[Contender]:
    """Yield the library's steps that re-match, by solver and placement."""
    for solver in solvers:
        for placement in ("device",) if solver == KERNEL else ("device", "host"):
            name = f"{PLAIN}, re-matching, {placement}, {solver}"
            settings = dict(placement=placement, **SOLVERS[solver])
            yield of_library(problem, batches, name, seed, reassign=True, **settings)


def of_library(
    problem: Problem,
    batches: Sequence[Batch],
    name: str,
    seed: int,
    *,
    reassign: bool = False,
    supervised: bool = False,
    **settings: Any,
) -> Contender:
    """Return a step of the library on one device; ``settings`` are those of ``Step``."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    optimizer = optim.Optimizer(problem.rate, momentum=problem.momentum)
    network = problem.model(supervised=supervised)
    step = Step(network, optimizer, mesh, supervised=supervised, **settings)
    rows, assignment = _targets(problem, seed)
    chosen = targets.Basis(network.dim) if supervised else targets.SphereTable(rows)
    run = compile_step(step, reassign=reassign)
    state = create_state(network, optimizer, assignment, jax.random.key(seed))
    state = jax.device_put(state, state_shardings(step))
    names = ("image", "index", "weight", *["label"] * supervised)
    used = [{name: batch[name] for name in names} for batch in batches]
    again = itertools.cycle(used)
    return Contender(name, lambda state, batch: run(state, chosen, batch), state, again)


def by_hand(
    problem: Problem,
    batches: Sequence[Batch],
    name: str,
    loss: Callable[[dict[str, Any], jax.Array, Batch, Targets], jax.Array],
    seed: int,
) -> Contender:
    """Return a step as anybody would write it; ``loss`` is of (params, z, batch, targets)."""
    model = problem.model()
    optimizer = optax.sgd(problem.rate, problem.momentum or None)
    network, batch_stats = _first_weights(problem, seed)
    key = jax.random.split(jax.random.key(seed))[1]
    params = {"network": network}
    if loss is classifier_loss:
        shape = (problem.dim, problem.classes)
        kernel = jax.random.normal(key, shape) * problem.dim**-0.5
        params["classifier"] = {"kernel": kernel, "bias": jnp.zeros(problem.classes)}
    state = {
        "params": params,
        "batch_stats": batch_stats,
        "opt_state": optimizer.init(params),
        "step": jnp.int32(0),
        "key": key,
    }

    def objective(params: Any, state: State, batch: Batch, noise: Targets) -> Any:
        key = jax.random.fold_in(state["key"], state["step"])
        outputs, batch_stats = model.apply(
            params["network"], state["batch_stats"], batch["image"], train=True, key=key
        )
        return loss(params, outputs["z"], batch, noise), batch_stats

    options = on_cpu.compiler_options(model.platform)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def run(state: State, batch: Batch, noise: Targets) -> tuple[State, dict[str, Any]]:
        (value, batch_stats), gradient = jax.value_and_grad(objective, has_aux=True)(
            state["params"], state, batch, noise
        )
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
        return new | {"step": state["step"] + 1, "key": state["key"]}, {LOSS: value}

    noise = _targets(problem, seed)
    used = [{k: v for k, v in batch.items() if k != "weight"} for batch in batches]
    shapes = jax.eval_shape(lambda: (state, used[0], noise))
    return Contender(
        name,
        lambda state, batch: run(state, batch, noise),
        state,
        itertools.cycle(used),
        lowered=lambda: run.lower(*shapes),
    )


def noise_loss(params: Any, z: jax.Array, batch: Batch, noise: Targets) -> jax.Array:
    """Return half the mean squared distance to the rows that the images own."""
    rows, assignment = noise
    return 0.5 * jnp.mean(jnp.sum(jnp.square(z - rows[assignment[batch["index"]]]), axis=-1))


def classifier_loss(params: Any, z: jax.Array, batch: Batch, noise: Targets) -> jax.Array:
    """Return the mean cross-entropy of a linear layer on the features."""
    logits = z @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))


def _targets(problem: Problem, seed: int) -> Targets:
    key = jax.random.key(seed + 1)
    noise, _ = targets.make_targets("sphere", problem.records, problem.dim, key, storage="table")
    assert isinstance(noise, targets.SphereTable)
    return noise.rows, jnp.arange(problem.records, dtype=jnp.int32)
