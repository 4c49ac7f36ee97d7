from pathlib import Path

import pytest

from nat_jax import config
from nat_jax.training import workdir


def valid():
    c = config.default()
    c.epochs, c.checkpoint.every_epochs = 3.0, 1.0
    return c


def claimed(tmp_path, saved):
    workdir.write_json(tmp_path / "config.json", config.to_dict(saved))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3:/bucket/run"])
def test_an_address_is_no_folder(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--workdir: expected a folder; got .*mount it"):
        workdir.check(Path(address), valid())
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--workdir: expected a folder; .*file is a file"):
        workdir.check(tmp_path / "file", valid())


@pytest.mark.parametrize("change", ["eval.knn_k", "log.every_steps", "checkpoint.keep"])
def test_what_is_shown_or_kept_may_change(tmp_path, change):
    c = valid()
    group, last = change.split(".")
    c[group][last] += 1
    workdir.check(claimed(tmp_path, valid()), c)


def test_the_same_data_may_lie_elsewhere_and_be_read_otherwise(tmp_path):
    c = valid()
    c.data.source, c.data.threads, c.data.workers = "folder:/elsewhere", 7, 3
    workdir.check(claimed(tmp_path, valid()), c)


def test_a_run_from_before_there_was_a_key_had_its_default(tmp_path):
    saved = valid()
    with saved.unlocked():
        del saved.data.views
    workdir.check(claimed(tmp_path, saved), valid())
    c = valid()
    c.data.views = 2
    with pytest.raises(ValueError, match="data.views = 1; this one has 2"):
        workdir.check(tmp_path, c)


def test_a_run_may_become_longer_but_not_shorter(tmp_path):
    c = valid()
    c.epochs = 5.0
    workdir.check(claimed(tmp_path, valid()), c)
    c.epochs = 2.0
    with pytest.raises(ValueError, match=r"epochs = 3.0; this one has 2.0.*--workdir="):
        workdir.check(tmp_path, c)


@pytest.mark.parametrize(
    ("change", "value"), [("model.dim", 32), ("data.image_size", 9), ("seeds", (5,))]
)
def test_another_run_is_refused(tmp_path, change, value):
    c = valid()
    group, _, last = change.rpartition(".")
    (c[group] if group else c)[last] = value
    with pytest.raises(ValueError, match=f"holds a run with {change} = .*--workdir="):
        workdir.check(claimed(tmp_path, valid()), c)


def test_a_folder_without_checkpoints_is_taken_over(tmp_path):
    c = valid()
    c.model.dim = 99
    workdir.write_json(tmp_path / "config.json", config.to_dict(valid()))
    workdir.check(tmp_path, c)


def test_a_result_answers_what_it_was_asked():
    asked = {"training": workdir.training(valid()), "step": 5}
    saved = {**asked, "rows": []}
    assert workdir.answers(saved, asked)
    assert not workdir.answers(None, asked)
    assert not workdir.answers({**saved, "step": 6}, asked)
    assert not workdir.answers({"rows": []}, asked)


def test_a_result_from_before_there_was_a_key_answers_for_its_default():
    training = workdir.training(valid())
    older = {"training": {k: v for k, v in training.items() if k != "data.color_jitter"}}
    assert workdir.answers(older, {"training": training})
    assert not workdir.answers(older, {"training": {**training, "data.color_jitter": 0.5}})
    assert not workdir.answers(older, {"training": {**training, "data.views": 2}})
