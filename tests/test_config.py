import importlib.util
import re
import sys
from pathlib import Path

import pytest

from nat_jax import config, evaluate
from nat_jax.cli import config_files

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = [*sorted(FOLDER.glob("[!_]*.py")), *sorted(FOLDER.glob("modern/[!_]*.py"))]


def valid():
    c = config.default()
    c.epochs, c.checkpoint.every_epochs = 3.0, 1.0
    return c


def test_the_defaults_with_a_length_are_valid():
    config.validate(valid(), evaluate.PROBES)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_config_file_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config.validate(module.get_config(), evaluate.PROBES)
    name = path.relative_to(FOLDER).as_posix()
    assert f"python -m nat_jax.main --config=configs/{name}" in module.__doc__


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("assign.solver", "greedy", "assign.solver: unknown 'greedy'. Known: auction, "),
        ("targets.kind", "cube", "targets.kind: unknown 'cube'. Known: sphere, basis"),
        ("optim.schedule", "step", "Known: constant, inverse, cosine"),
        ("optim.learning_rate", 0.0, "optim.learning_rate: expected a positive number; got 0.0"),
        ("optim.learning_rate", float("nan"), "expected a positive number; got nan"),
        ("data.on_bad_record", "skip", "Known: grey, error"),
        ("eval.probes", ("svm",), "eval.probes: unknown 'svm'. Known: knn, linear_probe, mlp"),
        ("batch_size", 0, "batch_size: expected at least 1; got 0"),
        ("assign.block", 512, "assign.block: expected at most batch_size = 256; got 512"),
        ("assign.block", 100, "expected a positive divisor of batch_size = 256; got 100"),
        ("assign.reassign_every_epochs", -1, "every_epochs: expected at least 0; got -1"),
        ("data.per_class", -1, "data.per_class: expected at least 0; got -1"),
        ("data.color_jitter", 1.5, "data.color_jitter: expected a number from 0 to 1; got 1.5"),
        ("data.grey", -0.1, "data.grey: expected a number from 0 to 1; got -0.1"),
        ("seeds", (1, 1), "seeds: expected distinct integers"),
        ("seeds", (), "seeds: expected distinct integers"),
        ("seeds", (-1,), r"seeds: expected distinct integers in \[0, 2\*\*32\); got"),
        ("seeds", ("x",), r"seeds: expected whole numbers, .* --config.seeds=\"\(0,\)\"; got 'x'"),
        ("eval.few_labels", (1, "x"), "eval.few_labels: expected numbers, .*; got 'x'"),
        ("eval.layers", (1,), "eval.layers: expected words, .*; got 1"),
        ("eval.beside", (0.5,), "eval.beside: expected words, .*; got 0.5"),
        ("data.resize", 4, "expected 0 or at least data.image_size = 8; got 4"),
        ("epochs", 0.0, "expected exactly one of epochs and steps above 0; got 0.0 and 0"),
        ("steps", 10, "expected exactly one of epochs and steps above 0; got 3.0 and 10"),
        ("epochs", -1.0, "expected 0 or more; got -1.0, 0"),
        ("checkpoint.every_epochs", 0.0, "one of checkpoint.every_epochs and checkpoint.every_st"),
        ("optim.warmup_steps", -1, "optim.warmup_steps: expected 0 or more"),
        ("optim.gamma", 0.1, "optim.gamma and optim.decay_start belong to schedule 'inverse'"),
        ("optim.schedule", "inverse", "optim.gamma: expected a number above 0"),
        ("eval.layers", (), "eval.layers: expected at least one"),
        ("eval.labels_per_class", (-1,), "eval.labels_per_class: expected 0"),
    ],
)
def test_a_mistake_is_named(key, value, message):
    c = valid()
    group, _, last = key.rpartition(".")
    node = c[group] if group else c
    with node.ignore_type():
        node[last] = value
    with pytest.raises(ValueError, match=message):
        config.validate(c, evaluate.PROBES)


def test_an_unknown_key_is_named_with_the_known_ones():
    c = valid()
    with pytest.raises(AttributeError, match="lr"):
        c.optim.lr = 0.1
    with c.unlocked():
        c.optim.lr = 0.1
    with pytest.raises(ValueError, match="unknown key 'optim.lr'. Known there: .*learning_rate"):
        config.validate(c, evaluate.PROBES)


def test_an_unknown_option_of_the_solver_is_named():
    c = valid()
    c.assign.options.epsilon = 0.1
    with pytest.raises(ValueError, match="auction has no option 'epsilon'. Known: eps"):
        config.validate(c, evaluate.PROBES)


def test_tensorboard_without_its_extra_is_refused_at_once(monkeypatch):
    c = valid()
    c.log.tensorboard = True
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"nat_jax\[tensorboard\]"):
        config.validate(c, evaluate.PROBES)


@pytest.mark.parametrize("key", ["color_jitter", "grey"])
def test_colours_change_on_the_host_alone(key):
    c = valid()
    c.data.augment_on = "device"
    config.validate(c, evaluate.PROBES)
    assert config.train_transform(c).colors is None
    c.data[key] = 0.5
    assert config.train_transform(c).colors is not None
    assert config.train_transform(c, colors=False).colors is None
    with pytest.raises(
        ValueError, match="data.augment_on: expected 'host' or 'auto' with data.col"
    ):
        config.validate(c, evaluate.PROBES)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("configs/digits.py", "runs/digits"),
        ("elsewhere/configs/paper/suite.py:cifar10,5", "runs/paper-suite-cifar10-5"),
        ("configs/modern/cifar10.py", "runs/modern-cifar10"),
        ("my/own.py:a", "runs/own-a"),
    ],
)
def test_each_config_has_a_folder_of_its_own(path, folder):
    assert config_files.default_workdir(path) == folder


def test_options_of_models_and_solvers_are_free_keys():
    c = valid()
    c.model.options.widths = (4, 8)
    c.assign.options.eps = 1e-3
    config.validate(c, evaluate.PROBES)


def test_durations():
    c = valid()
    c.checkpoint.every_epochs = 1.5
    assert config.steps_from(c, "checkpoint.every_", 10) == 15
    c.checkpoint.every_epochs, c.checkpoint.every_steps = 0.0, 7
    assert config.steps_from(c, "checkpoint.every_", 10) == 7
    assert config.steps_from(c, "optim.warmup_", 10) == 0
    c.epochs = 0.001  # shorter than a step is one step, not none
    assert config.steps_from(c, "", 10) == 1


@pytest.mark.parametrize(
    ("devices", "processes", "message"),
    [
        (3, 1, "multiple of the 3 devices; got 256. Set --config.batch_size=255"),
        (8, 7, "multiple of the 7 processes; got 256"),
        (512, 1, "Set --config.batch_size=512"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_named(devices, processes, message):
    with pytest.raises(ValueError, match=message):
        config.check_devices(valid(), {"data": devices}, processes)
    config.check_devices(valid(), {"data": 8}, 4)


def unread(keys, text):
    """Return the keys that no code looks up, as ``group.key`` or by the common start of a pair."""
    found = []
    for key in keys:
        group, _, last = key.rpartition(".")
        stem = key.removesuffix("epochs").removesuffix("steps")
        owners = f"(?:{group.partition('.')[0]}|settings|_eval|_data)" if group else "config"
        if not re.search(rf"\b{owners}\.{last}\b", text) and f'"{stem}"' not in text:
            found.append(key)
    return found


def test_every_default_is_read_somewhere():
    package = Path(config.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "config.py"]
    text = "\n".join(path.read_text() for path in files)
    text += Path(config.__file__).read_text().partition("def steps_from")[2]
    known = list(config.flatten(config.default()))
    assert not unread(known, text)
    assert unread([*known, "optim.nesterov"], text) == ["optim.nesterov"]
