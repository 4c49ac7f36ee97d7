"""Checkpoints: exact, atomic, portable between device counts, and never silently wrong."""

import contextlib
import dataclasses
import gc
import json
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sample_files import flip_bit

from nat_jax.runtime import sharding
from nat_jax.training import assignment_state, checkpoint
from nat_jax.training.checkpoint import CheckpointError, Checkpoints

# Orbax keeps arrays of up to 1 KiB inside its checked index; these are larger.
N = 1000
# Orbax abandons its other reads when one fails, and they complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited"
)

META = {"fingerprint": "abc", "seed": 0, "shape": (1, 2), "nested": {"dim": 10}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    assignment: jax.Array


@pytest.fixture(autouse=True)
def collect_abandoned_reads() -> Iterator[None]:
    yield
    gc.collect()


def make_state(seed: int) -> State:
    random = np.random.default_rng(seed)
    kernel = random.normal(size=(3, 3, 2, 4)).astype(np.float32)
    params = {
        "conv": {"kernel": jnp.asarray(kernel), "flag": jnp.array([True, False])},
        "head": jnp.asarray(random.normal(size=(4, 500)), jnp.bfloat16),
    }
    return State(
        step=jnp.int32(seed),
        params=params,
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
        key=jax.random.key(seed),
        assignment=jnp.asarray(random.permutation(N).astype(np.int32)),
    )


def abstract(state: Any) -> Any:
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def same(a: State, b: State) -> bool:
    if str(jax.tree.structure(a)) != str(jax.tree.structure(b)):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.array_equal(sharding.to_host(x), sharding.to_host(y))
        for x, y in pairs
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with good checkpoints of steps 1 and 2."""
    directory = tmp_path / "checkpoints"
    saved = Checkpoints(directory)
    for step in (1, 2):
        saved.save(step, make_state(step), META | {"step": step})
    saved.close()
    return directory


def restore(directory: Path, expect: dict | None = None) -> tuple[State, dict]:
    opened = Checkpoints(directory)
    try:
        return opened.restore(abstract(make_state(0)), expect=expect or {})
    finally:
        opened.close()


def damage_arrays(step_folder: Path) -> None:
    """Flip one bit in the middle of every file that holds array data."""
    for path in (step_folder / "state").rglob("d/*"):
        flip_bit(path, path.stat().st_size // 2)


def test_round_trip_keeps_every_bit_type_and_typed_key(folder: Path) -> None:
    state, meta = restore(folder, META)
    assert same(state, make_state(2))
    assert not same(state, make_state(1))
    assert isinstance(state.opt_state, tuple)
    assert jax.random.bits(state.key) == jax.random.bits(jax.random.key(2))
    assert meta["step"] == 2


def test_keeps_the_newest_and_never_goes_back(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    saved = Checkpoints(directory, keep=2)
    assert saved.latest_step() is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        saved.restore(abstract(make_state(0)), expect={})
    for step in (3, 5, 9):
        saved.save(step, make_state(step), {})
    assert saved.latest_step() == 9
    saved.save(9, make_state(7), {})  # does nothing
    with pytest.raises(CheckpointError, match="step 1 .* was not saved: the newest .* step 9"):
        saved.save(1, make_state(7), {})
    saved.close()
    assert sorted(path.name for path in directory.iterdir()) == ["5", "9"]
    assert same(restore(directory)[0], make_state(9))


def test_a_donated_state_is_saved_as_it_was(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path)
    state = {"w": jnp.zeros(500_000), "assignment": jnp.arange(N, dtype=jnp.int32)}
    spoil = jax.jit(
        lambda s: {"w": s["w"] + 7, "assignment": s["assignment"][::-1]}, donate_argnums=0
    )
    like = abstract(state)
    saved.save(1, state, {})
    for _ in range(5):
        state = spoil(state)
    jax.block_until_ready(state)
    restored, _ = saved.restore(like, expect={})
    saved.close()
    assert not np.asarray(restored["w"]).any()


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([0, 1, 1], "at least 1 are missing"),
        ([1, 2, 3], "at least 1 are missing"),
        ([[0, 1, 2]], "one dimension"),
    ],
)
def test_only_a_permutation_is_saved(tmp_path: Path, rows: list, named: str) -> None:
    saved = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=f"not a permutation: .*{named}"):
        saved.save(1, {"assignment": jnp.array(rows)}, {})
    with pytest.raises(ValueError, match="expected a top-level leaf 'assignment'.*'w'"):
        saved.save(1, {"w": jnp.zeros(3)}, {})
    saved.close()
    assert saved.latest_step() is None


def test_a_saved_non_permutation_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Checkpoints(tmp_path)
    rows = {"assignment": jnp.zeros(3, jnp.int32)}
    with monkeypatch.context() as patch:
        patch.setattr(assignment_state, "permutation_error", lambda rows: None)
        saved.save(1, rows, {})
        saved.wait()
    with pytest.raises(CheckpointError, match=r"step 1 .*not a permutation: of its rows 0..2"):
        saved.restore(abstract(rows), expect={})
    saved.close()


def test_the_assignment_is_never_fetched_as_a_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    real = sharding.to_host
    monkeypatch.setattr(sharding, "to_host", lambda x: fetched.append(x.shape) or real(x))
    opened = Checkpoints(folder)
    state, _ = opened.restore(abstract(make_state(0)), expect={})
    opened.save(3, state, {})
    opened.close()
    assert (3, 3, 2, 4) in fetched and (N,) not in fetched


def change_records(folder: Path, change: Callable[[dict], Any]) -> None:
    """Change the records of both steps, and their checksums."""
    for path in folder.glob("?/record/metadata"):
        content = json.loads(path.read_text())
        change(content["record"])
        content["sha256"] = checkpoint._json_digest(content["record"])
        path.write_text(json.dumps(content))


def test_a_checkpoint_in_another_format_is_left_alone(folder: Path) -> None:
    change_records(folder, lambda record: record.update(format=1))
    with pytest.raises(CheckpointError, match=r"another version of nat_jax \(format 1; .* reads 2"):
        restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_another_run_or_shape_is_one_message(folder: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        restore(folder, META | {"fingerprint": "xyz", "unknown": 3})
    message = str(raised.value)
    assert 'fingerprint: checkpoint "abc", this run "xyz"' in message
    assert "unknown: checkpoint null, this run 3" in message
    assert "seed" not in message and "another workdir" in message

    like = abstract(make_state(0))
    longer: Any = jax.ShapeDtypeStruct((N + 1,), jnp.int32, sharding=like.assignment.sharding)
    params = {"head": like.params["head"], "tail": like.params["head"]}
    opened = Checkpoints(folder)
    with pytest.raises(CheckpointError) as raised:
        opened.restore(dataclasses.replace(like, assignment=longer, params=params), expect={})
    opened.close()
    message = str(raised.value)
    assert "assignment: checkpoint int32[1000], this run int32[1001]" in message
    assert "params/tail: checkpoint nothing, this run bfloat16[4, 500]" in message
    assert "params/conv/kernel: checkpoint float32[3, 3, 2, 4], this run nothing" in message
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_damaged_newest_falls_back_loudly_and_can_be_saved_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage_arrays(folder / "2")
    opened = Checkpoints(folder)
    with caplog.at_level(logging.WARNING, logger="nat_jax.training.checkpoint"):
        state, meta = opened.restore(abstract(make_state(0)), expect={})
    assert same(state, make_state(1)) and meta["step"] == 1
    assert "checkpoint of step 2" in caplog.text and "is damaged" in caplog.text
    assert "older checkpoint of step 1" in caplog.text
    assert (folder / "2.damaged").is_dir()
    opened.save(2, make_state(5), {})
    opened.close()
    assert same(restore(folder)[0], make_state(5))

    damage_arrays(folder / "2")
    assert same(restore(folder)[0], make_state(1))
    assert (folder / "2.damaged-2").is_dir()


def test_no_good_checkpoint_names_all_and_touches_nothing(folder: Path) -> None:
    damage_arrays(folder / "1")
    shutil.rmtree(folder / "2" / "record")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*step 2 .*step 1 "):
        restore(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def _damages(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    damages = {"truncated": data[: len(data) // 2], "empty": b""}
    for position in sorted({0, len(data) // 2, len(data) - 1}):
        flipped = bytearray(data)
        flipped[position] ^= 0x04
        damages[f"bit at {position}"] = bytes(flipped)
    return damages


def _damage_each_file(folder: Path, work: Path) -> list[str]:
    """Damage each file of step 2 in every way, one at a time, and restore.

    Returns what came of each: the step that was restored, exactly as saved, or "wrong".
    """
    files = [path for path in (folder / "2").rglob("*") if path.is_file()]
    good = {step: make_state(step) for step in (1, 2)}
    outcomes = []
    for path in files:
        for data in _damages(path).values() if path.stat().st_size else ():
            shutil.copytree(folder, work)
            (work / path.relative_to(folder)).write_bytes(data)
            state, meta = restore(work)
            step = meta["step"]
            outcomes.append(str(step) if same(state, good[step]) else "wrong")
            shutil.rmtree(work)
    return outcomes


def test_no_damaged_file_is_ever_restored_silently(folder: Path, tmp_path: Path) -> None:
    outcomes = _damage_each_file(folder, tmp_path / "work")
    assert "wrong" not in outcomes
    assert outcomes.count("1") >= 20  # fell back


@pytest.mark.slow
def test_without_the_digests_flipped_bits_would_pass(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint._digest
    recorded = json.loads((folder / "2" / "record" / "metadata").read_text())["record"]["leaves"]
    assert recorded["step"]["digest"] == real("step", jnp.int32(2))
    change_records(
        folder, lambda r: [leaf.update(digest="not looked at") for leaf in r["leaves"].values()]
    )
    monkeypatch.setattr(checkpoint, "_digest", lambda name, leaf: "not looked at")
    assert "wrong" in _damage_each_file(folder, tmp_path / "work")


def test_a_file_in_the_way_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot use .*file for checkpoints"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(ValueError, match="expected at least 1; got 0"):
        Checkpoints(tmp_path / "other", keep=0)


def test_leftovers_of_killed_saves_are_removed(folder: Path) -> None:
    leftover = folder / "3.orbax-checkpoint-tmp" / "state"
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"x" * 100)
    opened = Checkpoints(folder)
    assert opened.latest_step() == 2
    opened.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("then", ["save", "wait", "close"])
def test_a_full_disk_is_one_message_about_the_step_that_is_not_saved(
    folder: Path, then: str, capfd: pytest.CaptureFixture
) -> None:
    three, four, five = map(make_state, (3, 4, 5))
    opened = Checkpoints(folder)
    opened.save(3, three, {})
    opened.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # no file can grow beyond that
    try:
        with pytest.raises(CheckpointError, match="of step 4 .*cannot be saved.*from step 3, wh"):
            opened.save(4, four, {})  # writes in the background
            if then == "save":
                opened.save(5, five, {})
            else:
                getattr(opened, then)()
        with contextlib.suppress(CheckpointError):
            opened.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Traceback" not in capfd.readouterr().err
    assert same(restore(folder)[0], three)
