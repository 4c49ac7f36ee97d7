"""The benchmark of the train step compares steps that do the same work."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from project import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import step_contenders as steps
import step_turns
from step_contenders import PROBLEMS, Contender

TINY = PROBLEMS["tiny"]


def trained(problem: steps.Problem, batches: list, *, by_hand: bool):
    """Return the parameters after three steps, and the last loss."""
    if by_hand:
        contender = steps.by_hand(problem, batches, "by hand", steps.noise_loss, seed=0)
    else:
        contender = steps.of_library(problem, batches, "library", seed=0)
    contender.turn(3)
    found = contender.state["params"]["network"] if by_hand else contender.state.params
    return jax.device_get(found), float(contender.metrics[steps.LOSS])


@pytest.mark.slow
def test_the_step_by_hand_learns_what_the_library_learns():
    batches = steps.make_batches(TINY, seed=0)
    params, loss = trained(TINY, batches, by_hand=False)
    same, same_loss = trained(TINY, batches, by_hand=True)
    assert loss == pytest.approx(same_loss, abs=1e-5)
    for left, right in zip(*map(jax.tree.leaves, (params, same)), strict=True):
        np.testing.assert_allclose(left, right, atol=1e-5)
    faster = dataclasses.replace(TINY, rate=2 * TINY.rate)
    other, _ = trained(faster, batches, by_hand=True)
    assert not np.allclose(other["head"]["kernel"], params["head"]["kernel"], atol=1e-5)


def pretended(name: str, seconds: list[float]) -> Contender:
    turns = [{"seconds": s, "cpu": 2 * s, "solving": 0.0} for s in seconds]
    return Contender(name, lambda state, batch: (state, {}), None, [], turns=turns)


def test_ratios_are_taken_within_rounds():
    """A machine that is half as fast in the second round changes nothing."""
    running = [
        pretended(steps.PLAIN, [1.0, 2.0]),
        pretended(steps.BY_HAND, [1.0, 2.0]),
        pretended(steps.SOFTMAX, [2.0, 4.0]),
        pretended(steps.SUPERVISED, [1.0, 2.0]),
        pretended("NAT, re-matching, device, auction", [1.6, 3.2]),
        pretended("NAT, re-matching, host, auction", [1.3, 2.6]),
    ]
    ratios = list(step_turns.all_ratios(running))
    found = {(pair["what"], pair["one"], pair["other"]): pair["quartiles"] for pair in ratios}
    assert found["step", "NAT", "softmax on z"] == [0.5, 0.5, 0.5]
    device, host = (each.name for each in running[4:])
    assert found["cycle", device, "supervised"] == [1.2, 1.2, 1.2]
    goals = {(goal["one"], goal["other"]): goal for goal in step_turns.goals(ratios)}
    assert goals["NAT", "by hand"]["met"] and goals["NAT", "softmax on z"]["met"]
    assert goals[host, "supervised"]["quartiles"][1] == 1.1 and not goals[host, "supervised"]["met"]
    assert (device, "supervised") not in goals  # the slower of the two
    slow = [pretended(steps.PLAIN, [1.03, 2.06]), *running[1:]]
    missed = {goal["other"]: goal["met"] for goal in step_turns.goals(step_turns.all_ratios(slow))}
    assert missed[steps.BY_HAND] is False


def test_steps_that_should_agree_and_do_not_are_reported():
    def learns(name: str, loss: float) -> Contender:
        return Contender(name, lambda state, batch: (state, {steps.LOSS: loss}), None, [{}])

    def complaints(*losses: float) -> list[str]:
        names = (steps.PLAIN, steps.BY_HAND, "NAT, re-matching, a", "NAT, re-matching, b")
        running = [learns(*each) for each in zip(names, losses, strict=True)]
        return step_turns.warm_up(running, lambda line: None)

    assert complaints(1.0, 1.0, 0.9, 0.9) == []
    assert len(complaints(1.0, 1.1, 0.9, 0.9)) == len(complaints(1.0, 1.0, 0.9, 0.8)) == 1


@pytest.mark.slow
def test_the_program_measures_and_writes(tmp_path: Path):
    output = tmp_path / "step.json"
    arguments = ["--problems", "tiny", "--rounds", "2", "--seconds", "0.05"]
    arguments += [
        "--solvers",
        f"auction,{steps.KERNEL}",
        "--start",
        "tiny",
        "--hosts",
        "--output",
        str(output),
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "step.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(output.read_text())
    (group,) = found["groups"]
    names = [row["name"] for row in group["results"]]
    assert names[:4] == [steps.PLAIN, steps.BY_HAND, steps.SOFTMAX, steps.SUPERVISED]
    assert [name.partition("matching, ")[2] for name in names[4:]] == [
        "device, auction",
        "host, auction",
        f"device, {steps.KERNEL}",
    ]
    assert all(row["ms"] > 0 for row in group["results"])
    assert all(0.5 < row["moved"] <= 1 for row in group["results"][4:])
    assert "solver_ms" in group["results"][5] and group["flops_of_a_step"] > 0
    assert [row["programs"] for row in found["start"]] == ["compiled", "kept"]
    shares = {row["blocks"]: row for row in found["hosts"] if row["way"] == "share"}
    assert shares[32]["bytes_exchanged"] == 32 * shares[1]["bytes_exchanged"]
    assert output.with_suffix(".md").read_text().startswith("# The train step")
