"""What is compiled, when, and that a later process need not compile it again."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from one_step import N, make_step
from processes import CONFIG, WORKER, write_images
from project import python

from nat_jax import config, train
from nat_jax.runtime import sharding
from nat_jax.training import metrics, setup


def tiny(solves: str):
    """Return a run of 6 epochs of 5 steps: two cycles of re-matching, with judging in each.

    The 157 images that an epoch has beyond five batches are left out, in every epoch others.
    """
    c = config.default()
    c.epochs = 6.0
    c.batch_size = 256
    c.model.dim = 6
    c.model.options.widths = (4,)
    c.model.options.pools = 1
    c.optim.learning_rate = 0.1
    c.assign.reassign_every_epochs = 3
    c.assign.placement = solves
    c.assign.block, c.assign.solver = 64, "scipy"
    c.eval.every_epochs = 2
    c.eval.probes = ("knn",)
    c.eval.labels_per_class = (0,)
    c.checkpoint.every_epochs = 1.0
    c.log.every_steps = 5
    return c


@pytest.fixture
def compiled():
    """Return a list that gets the seconds of every compilation, from a cache or not."""
    found, listening = [], True

    def listen(event, seconds, **_):
        if listening and event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    listening = False  # jax 0.7 takes no listener away


@pytest.fixture(scope="module")
def losses():
    return {}


@pytest.mark.parametrize("solves", ["device", pytest.param("host", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_first_cycle(
    tmp_path, monkeypatch, caplog, compiled, solves, losses
):
    after_step = [0]
    real = train._Loop._after

    def after(self, done, *rest):
        state = real(self, done, *rest)
        after_step.append(len(compiled))
        return state

    monkeypatch.setattr(train._Loop, "_after", after)
    with caplog.at_level("INFO", logger="nat_jax"):
        train.train_and_evaluate(tiny(solves), tmp_path)
    assert len(after_step) == 31
    compiling = set(np.flatnonzero(np.diff(after_step)) + 1)
    # The first step of either kind, the first save and the first judging compile what they need.
    assert {1, 6} <= compiling <= {1, 5, 6, 10}
    rows = [row for row in metrics.read_rows(tmp_path) if "train/loss" in row]
    assert caplog.text.count("the first step was done") == 1
    assert ["time/first_step_seconds" in row for row in rows] == [True] + 5 * [False]
    # The host's share is known at once, that of the devices when both kinds of steps were seen.
    shares = ["time/match_share" in row for row in rows]
    assert shares == [solves == "host", False, False, True, False, False]
    losses[solves] = [row["train/loss"] for row in rows]
    if len(losses) == 2:
        np.testing.assert_allclose(losses["host"], losses["device"], rtol=0.01)


def test_another_shape_would_be_counted(compiled):
    twice = jax.jit(lambda x: 2 * x)
    counts = []
    for size in (32, 32, 31):
        twice(np.zeros(size, np.float32))
        counts.append(len(compiled))
    assert 0 < counts[0] == counts[1] < counts[2]


def test_seeds_share_the_program_of_their_first_state(compiled):
    step = make_step(sharding.make_mesh(1, 1))
    states, counts = [], []
    for seed in (0, 1):
        run = SimpleNamespace(
            seed=seed,
            step=step,
            sources=SimpleNamespace(train=range(N)),
            config=SimpleNamespace(targets=SimpleNamespace(kind="sphere")),
        )
        states.append(setup.initial_state(run))
        counts.append(len(compiled))
    assert 0 < counts[0] == counts[1]
    kernels = [state.params["conv1"]["map"]["kernel"] for state in states]
    assert not np.array_equal(*kernels)


def start(folder: Path, workdir: str, steps: int) -> tuple[set[str], int]:
    """Train in a process of its own with the cache that is on by default.

    Returns the names of the programs that went into the cache, and how many came out of it.
    """
    cache = folder / "cache" / "programs"
    before = set(cache.glob("*-cache"))
    arguments = [CONFIG, f"--config.data.source=arrays:{folder / 'images.npz'}"]
    arguments += [f"--workdir={folder / workdir}", f"--config.steps={steps}"]
    python(
        *(WORKER, *arguments),
        cwd=folder,
        NAT_JAX_CACHE=str(folder / "cache"),
        JAX_COMPILATION_CACHE_DIR=None,
        # Whatever it takes to compile here: everything is kept.
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    new = {path.name.rsplit("-", 2)[0] for path in set(cache.glob("*-cache")) - before}
    return new, int((folder / workdir / "programs-0").read_text())


@pytest.mark.slow
def test_a_run_that_goes_on_compiles_no_step_again(tmp_path):
    write_images(tmp_path / "images.npz")
    first, _ = start(tmp_path, "run", 8)
    steps = {name for name in first if "train_step" in name}
    assert steps
    second, kept = start(tmp_path, "run", 16)
    assert not steps & second and kept >= 2  # either kind of step
