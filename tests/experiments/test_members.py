"""The experiments of configs/paper: their configs, and the plan of a suite."""

import importlib.util

import pytest
from project import ROOT

from nat_jax import config, evaluate
from nat_jax.experiments import members, scales
from nat_jax.training import workdir as workdirs

FOLDER = ROOT / "configs" / "paper"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def suite(scale="digits", **changes):
    c = load(FOLDER / "suite.py").get_config(scale)
    for key, value in changes.items():
        config.put(c, key.replace("__", "."), value)
    return c


def test_every_experiment_has_its_file():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*members.EXPERIMENTS, "suite"}


@pytest.mark.parametrize("scale", scales.SCALES)
@pytest.mark.parametrize("name", members.EXPERIMENTS)
def test_every_config_is_valid(name, scale):
    found = []
    for value in members.values_of(name, scale):
        c = load(FOLDER / f"{name}.py").get_config(f"{scale},{value}" if value else scale)
        config.validate(c, evaluate.PROBES)
        found.append(workdirs.training(c))
    assert all(one not in found[:at] for at, one in enumerate(found)), "values that change nothing"


@pytest.mark.parametrize("argument", ["cifar10,4", "cifar10,x", "cifar100", "cifar100,5"])
def test_an_unknown_argument_is_refused(argument):
    with pytest.raises(ValueError, match="(value: expected one of 3, 1, 2|scale: unknown)"):
        load(FOLDER / "fig2_period.py").get_config(argument)
    with pytest.raises(ValueError, match="scale: unknown 'cifar10,3'. Known: imagenet, cifar10"):
        load(FOLDER / "table2_sobel.py").get_config("cifar10,3")


def test_what_is_trained_alike_is_one_run():
    runs = members.plan(suite(eval__layers=("last_conv", "conv1")))
    served = [member for run in runs for member in run.members]
    assert len(served) == len(set(served))
    trained = [workdirs.training(run.config) for run in runs]
    assert all(one not in trained[:at] for at, one in enumerate(trained))
    first = runs[0]
    assert first.folder == "table3_imagenet/seed0"
    assert [m.experiment for m in first.members] == ["table3_imagenet", "fig2_period"]
    assert first.config.eval.layers == ("all", "last_conv", "conv1")
    assert first.config.eval.probes == ("knn", "linear_probe", "mlp_probe")
    assert first.config.eval.baselines == ("pixels",)
    clean = next(run for run in runs if run.folder == "table1_softmax/seed2")
    assert [m.experiment for m in clean.members] == ["table1_softmax", "table2_clean"]
    assert [run.config.seeds for run in runs] == sorted(run.config.seeds for run in runs)


def test_a_change_reaches_every_run_that_leaves_the_key_alone():
    changes = dict(epochs=5.0, data__source="folder:x", assign__reassign_every_epochs=2)
    runs = {run.folder: run.config for run in members.plan(suite(**changes))}
    assert {c.data.source for c in runs.values()} == {"folder:x"}
    assert runs["table3_imagenet/seed0"].assign.reassign_every_epochs == 2
    assert runs["fig2_period/5-seed0"].assign.reassign_every_epochs == 5
    assert runs["fig2_epochs/seed0"].epochs == 6.0  # its own
    assert runs["table1_square/seed1"].epochs == 5.0
    seeds = {m.seed for run in members.plan(suite(seeds=(4,))) for m in run.members}
    assert seeds == {4, 0}  # fig2_epochs names its own


def test_a_part_of_the_suite():
    runs = members.plan(suite(suite__experiments=("table1_square", "table1_softmax")))
    assert {m.experiment for run in runs for m in run.members} == {
        "table1_softmax",
        "table1_square",
    }
    with pytest.raises(ValueError, match="suite.experiments: unknown 'table4'. Known: table3_im"):
        members.plan(suite(suite__experiments=("table4",)))
    with pytest.raises(ValueError, match="suite.scale: unknown 'imagenet'. Known: cifar10, fash"):
        members.plan(suite(suite__scale="imagenet"))
