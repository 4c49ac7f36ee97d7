import os
from pathlib import Path

import pytest

from nat_jax import config
from nat_jax.errors import InputError
from nat_jax.training import workdir


def valid():
    c = config.default()
    c.epochs = 3.0
    return c


def changed(key, value):
    c = valid()
    config.put(c, key, value)
    return c


@pytest.fixture
def claimed(tmp_path):
    """A folder with a checkpoint of ``valid()``."""
    workdir.write_json(tmp_path / "config.json", config.to_dict(valid()))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3:/bucket/run"])
def test_an_address_is_no_folder(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--workdir: expected a folder; got .*mount it"):
        workdir.check(Path(address), valid())
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--workdir: cannot use .*file is a file. Choose another"):
        workdir.check(tmp_path / "file", valid())


@pytest.mark.parametrize("name", ["checkpoints", "results", "seed-0/checkpoints"])
def test_a_run_that_cannot_write_is_refused_before_it_trains(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir(parents=True)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda p, m: p != tmp_path / name and allowed(p, m))
    with pytest.raises(InputError, match=f"--workdir: cannot use .*{name} is not writable"):
        workdir.check(tmp_path, valid())


@pytest.mark.parametrize("content", ["", '{"epochs": 1'])
def test_a_damaged_config_is_one_message(claimed, content):
    (claimed / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: cannot be read: .*Restore or delete"):
        workdir.check(claimed, valid())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval.knn_k", 1),
        ("log.every_steps", 1),
        ("mesh.model", 2),
        ("data.source", "folder:/elsewhere"),
        ("data.threads", 7),
        ("assign.placement", "host"),
        ("epochs", 5.0),
    ],
)
def test_what_does_not_change_the_training_may_change(claimed, key, value):
    workdir.check(claimed, changed(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.dim", 32), ("model.options.widths", (3,)), ("seeds", (5,)), ("epochs", 2.0)],
)
def test_another_run_is_refused(claimed, key, value):
    with pytest.raises(InputError, match=f"holds a run with {key} = .*--workdir="):
        workdir.check(claimed, changed(key, value))
    (claimed / "checkpoints" / "10").rmdir()
    workdir.check(claimed, changed(key, value))  # nothing is lost


def test_a_run_from_before_there_was_a_key_had_its_default(claimed):
    saved = config.to_dict(valid())
    del saved["data"]["views"]
    workdir.write_json(claimed / "config.json", saved)
    workdir.check(claimed, valid())
    with pytest.raises(InputError, match="data.views = 1; this one has 2"):
        workdir.check(claimed, changed("data.views", 2))


def test_old_names_of_keys_in_a_saved_config(claimed):
    saved = config.to_dict(changed("data.grayscale", 0.2))
    saved["data"]["grey"] = saved["data"].pop("grayscale")
    saved["eval"]["beside"] = saved["eval"].pop("compare")
    workdir.write_json(claimed / "config.json", saved)
    workdir.check(claimed, changed("data.grayscale", 0.2))
    with pytest.raises(InputError, match="data.grayscale = 0.2; this one has 0.0"):
        workdir.check(claimed, valid())
    assert workdir.of_run(saved, valid()).data.grayscale == 0.2
    older = {"training": {"data.grey": 0.2, "epochs": 3.0}}
    assert workdir.answers(older, {"training": workdir.training(changed("data.grayscale", 0.2))})


def test_a_task_takes_the_training_from_the_run_and_the_rest_from_its_command_line():
    run, asked = changed("model.dim", 32), changed("eval.knn_k", 3)
    run.data.source, run.data.threads = "folder:/run", 9
    merged = workdir.of_run({**config.to_dict(run), "eval": {"removed_key": 1}}, asked)
    assert (merged.model.dim, merged.eval.knn_k) == (32, 3)
    assert (merged.data.source, merged.data.threads) == ("folder:/run", 2)
    with pytest.raises(InputError, match="config.json: unknown key 'optim.nesterov'"):
        workdir.of_run({"optim": {"nesterov": True}}, asked)


def test_a_result_answers_what_it_was_asked():
    training = workdir.training(valid())
    asked = {"training": training, "step": 5}
    saved = {**asked, "rows": []}
    assert workdir.answers(saved, asked)
    assert not workdir.answers(None, asked)
    assert not workdir.answers({**saved, "step": 6}, asked)
    assert not workdir.answers({"rows": []}, asked)
    older = {k: v for k, v in training.items() if k != "data.color_jitter"}
    assert workdir.answers({**saved, "training": older}, asked)
    asked = {"training": {**training, "data.color_jitter": 0.5}}
    assert not workdir.answers({"training": older}, asked)
