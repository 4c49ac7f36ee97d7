import importlib.util
import re
from pathlib import Path

import pytest
from project import ROOT

from nat_jax import config, evaluate, schema
from nat_jax.cli import config_files
from nat_jax.errors import InputError

CONFIGS = [*(ROOT / "configs").glob("[!_]*.py"), *(ROOT / "configs/modern").glob("[!_]*.py")]


def valid():
    c = config.default()
    c.epochs = 3.0
    return c


def set_key(c, name, value):
    group, _, last = name.rpartition(".")
    node = c[group] if group else c
    with node.ignore_type():
        node[last] = value


def test_the_defaults_with_a_length_are_valid():
    config.validate(valid(), evaluate.PROBES)


@pytest.mark.parametrize("path", sorted(CONFIGS), ids=lambda path: path.stem)
def test_every_config_file_is_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config.validate(module.get_config(), evaluate.PROBES)
    name = path.relative_to(ROOT).as_posix()
    assert f"python -m nat_jax.main --config={name}" in module.__doc__


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("assign.solver", "greedy", "assign.solver: unknown 'greedy'. Known: auction, "),
        ("data.augment_on", "gpu", "data.augment_on: unknown 'gpu'. Known: auto, host, device"),
        ("eval.probes", ("svm",), "eval.probes: unknown 'svm'. Known: knn, linear_probe, mlp"),
        ("eval.probes", ("knn,mlp",), "eval.probes: got 'knn,mlp'; write several as "),
        ("optim.learning_rate", float("nan"), "expected a positive number; got nan"),
        ("batch_size", 0, "batch_size: expected at least 1; got 0"),
        ("assign.block", 512, "assign.block: expected at most batch_size = 256; got 512"),
        ("assign.block", 100, "expected a positive divisor of batch_size = 256; got 100"),
        ("model.bn_groups", 3, "model.bn_groups: expected a positive divisor of batch_size = 256"),
        ("mesh.model", 0, "mesh.model: expected devices, or -1 for all that are left; got 0"),
        ("mesh.model", -1, "expected -1 for one at the most; got it twice"),
        ("data.grayscale", -0.1, "data.grayscale: expected a number from 0 to 1; got -0.1"),
        ("data.timeout", 0.0, "data.timeout: expected seconds above 0; got 0.0"),
        ("seeds", (1, 1), "seeds: expected distinct integers"),
        ("seeds", (-1,), r"seeds: expected distinct integers in \[0, 2\*\*32\); got"),
        ("seeds", ("x",), r"seeds: expected whole numbers, .* --config.seeds=\"\(0,\)\"; got 'x'"),
        ("eval.few_labels", (1, "x"), "eval.few_labels: expected numbers, .*; got 'x'"),
        ("eval.few_labels", (1.5,), "eval.few_labels: expected shares in .*; got 1.5"),
        ("eval.compare", (0.5,), "eval.compare: expected words, .*; got 0.5"),
        ("eval.layers", (), "eval.layers: expected at least one"),
        ("eval.labels_per_class", (-1,), "eval.labels_per_class: expected at least 0; got -1"),
        ("data.resize", 4, "expected 0 or at least data.image_size = 8; got 4"),
        ("data.min_area", 0.0, "data: min_area is a share"),
        ("epochs", 0.0, "expected exactly one of epochs and steps above 0; got 0.0 and 0"),
        ("steps", 10, "expected exactly one of epochs and steps above 0; got 3.0 and 10"),
        ("checkpoint.every_epochs", 0.0, "one of checkpoint.every_epochs and checkpoint.every_st"),
        ("epochs", float("nan"), "epochs and steps: expected 0 or more; got nan"),
        ("optim.warmup_epochs", float("inf"), "optim.warmup_epochs and .*: expected 0 or more"),
        ("optim.warmup_steps", -1, "optim.warmup_steps: expected 0 or more"),
        ("optim.gamma", 0.1, "optim.gamma and optim.decay_start belong to schedule 'inverse'"),
        ("optim.schedule", "inverse", "optim.gamma: expected a number above 0"),
        ("optim.loss", "softmax", "expected targets.kind = 'labels', got 'sphere'"),
        ("assign.options.epsilon", 0.1, "auction has no option 'epsilon'. Known: eps"),
        (
            "assign.options.eps",
            -1.0,
            "assign.options: eps must be finite and not negative, got -1.0",
        ),
        ("assign.options.eps", float("nan"), "assign.options: eps must be finite .*, got nan"),
        ("assign.options.max_rounds", -1, "assign.options: max_rounds must be .* got -1"),
        ("eval.mlp_width", 0, "eval.mlp_width: expected at least 1; got 0"),
        ("batch_size", None, "batch_size: expected a value such as 256; got None"),
        ("eval.probes", None, "eval.probes: expected a value such as .*; got None"),
        ("network", "untrained", "network: expected nothing when training"),
    ],
)
def test_a_mistake_is_named(key, value, message):
    c = valid()
    set_key(c, key, value)
    with pytest.raises(InputError, match=message):
        config.validate(c, evaluate.PROBES)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("assign.solver", "scipy", "assign.solver: expected 'auction' with .*; got 'scipy'. Set "),
        ("assign.block", 64, "assign.block: expected None with .*match_points.*; got 64. Set --c"),
        ("assign.placement", "host", "expected 'auto' or 'device' with .*; got 'host'"),
        ("targets.kind", "labels", "targets.kind: expected 'sphere' or 'basis' with .*'labels'"),
        ("assign.reassign_every_epochs", 0, "expected 1 or more with .*; got 0. To never match"),
        ("assign.options.eps", 0.1, "match_points has no option 'eps'. Known: budget"),
        ("assign.options.budget", -1, "assign.options: budget must not be negative, got -1"),
    ],
)
def test_what_matching_of_all_images_does_not_use_is_named(key, value, message):
    c = valid()
    c.assign.scope = "dataset"
    config.validate(c, evaluate.PROBES)
    set_key(c, key, value)
    with pytest.raises(InputError, match=message):
        config.validate(c, evaluate.PROBES)


def test_an_unknown_key_is_named_with_the_known_ones():
    c = valid()
    with pytest.raises(AttributeError, match="lr"):
        c.optim.lr = 0.1
    with c.unlocked():
        c.optim.lr = 0.1
    with pytest.raises(InputError, match="unknown key 'optim.lr'. Known there: .*learning_rate"):
        config.validate(c, evaluate.PROBES)


def test_tensorboard_without_its_extra_is_refused_at_once(monkeypatch):
    c = valid()
    c.log.tensorboard = True
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"nat_jax\[tensorboard\]"):
        config.validate(c, evaluate.PROBES)


@pytest.mark.parametrize("key", ["color_jitter", "grayscale"])
def test_colours_change_on_the_host_alone(key):
    c = valid()
    c.data.augment_on = "device"
    config.validate(c, evaluate.PROBES)
    assert config.train_transform(c).colors is None
    c.data[key] = 0.5
    assert config.train_transform(c).colors is not None
    assert config.train_transform(c, colors=False).colors is None
    with pytest.raises(InputError, match="data.augment_on: expected 'host' or 'auto' with data.c"):
        config.validate(c, evaluate.PROBES)


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [("data.grey", "data.grayscale", 0.2), ("eval.beside", "eval.compare", ("runs/a",))],
)
def test_the_old_name_of_a_key_is_the_new_key_in_a_users_config(old, new, value):
    (group, before), (_, now) = old.split("."), new.split(".")
    for change in (
        lambda c: setattr(c[group], before, value),
        lambda c: c.update({group: {before: value}}),
        lambda c: c.update_from_flattened_dict({old: value}),
    ):
        c = valid()
        change(c)
        assert c[group][now] == c[group][before] == value
        assert old not in config.flatten(c)
        config.validate(c, evaluate.PROBES)
    with pytest.raises(AttributeError, match="gray"):
        c.data.gray = 0.2
    with pytest.raises(AttributeError, match=before):
        setattr(c.optim, before, value)


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("configs/digits.py", "runs/digits"),
        ("elsewhere/configs/paper/suite.py:cifar10,5", "runs/paper-suite-cifar10-5"),
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
    assert schema.kind_of("model.options.widths") == "training"


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
def test_a_batch_that_cannot_be_divided_is_named(devices, processes, message):
    with pytest.raises(InputError, match=message):
        config.check_devices(valid(), {"data": devices}, processes)
    config.check_devices(valid(), {"data": 8}, 4)


def unread(keys, text):
    """Return the keys that no code reads, as ``group.key`` or by the common start of a pair."""
    found = []
    for key in keys:
        group, _, last = key.rpartition(".")
        stem = key.removesuffix("epochs").removesuffix("steps")
        owners = f"(?:{group.partition('.')[0]}|settings|_eval|_data)" if group else "config"
        if not re.search(rf"\b{owners}\.{last}\b", text) and f'"{stem}"' not in text:
            found.append(key)
    return found


def test_every_key_is_read_somewhere():
    package = Path(config.__file__).parent
    files = [path for path in package.rglob("*.py") if path.name != "schema.py"]
    text = "\n".join(path.read_text() for path in files)
    assert not unread(schema.KEYS, text)
    assert unread([*schema.KEYS, "optim.nesterov"], text) == ["optim.nesterov"]
