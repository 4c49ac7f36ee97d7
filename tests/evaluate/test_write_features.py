"""Features as files: row i is record i, a stopped run goes on, and nothing else is overwritten."""

import dataclasses
import json
import shutil
import tracemalloc

import numpy as np
import pytest
from sample_files import write_tree
from small_run import changed

from nat_jax import config
from nat_jax.errors import InputError
from nat_jax.evaluate import write_features as module
from nat_jax.evaluate.write_features import write_features
from nat_jax.export import loading
from nat_jax.input.sources import open_source

CLASSES = ("blue", "red")


def settings(source: str, **changes):
    c = config.default()
    c.task, c.network, c.steps = "features", "untrained", 5
    c.data.source, c.data.image_size = source, 8
    c.model.dim, c.model.frontend = 4, "rgb"
    c.model.options.widths, c.model.options.pools = (3,), 1
    c.eval.batch_size, c.eval.layers = 4, ("z", "last_conv")
    return changed(c, **changes)


@pytest.fixture
def pictures(tmp_path):
    """Make 11 training and 2 test images; the training image 5 is none."""
    counts = {"train/blue": 5, "train/red": 6, "test/blue": 1, "test/red": 1}
    names = [f"{place}/{i}.jpg" for place, count in counts.items() for i in range(count)]
    folder = write_tree(tmp_path / "pictures", names)
    (folder / "train/red/0.jpg").write_bytes(b"no image")
    return f"folder:{folder}"


def test_row_i_is_record_i_as_the_network_gives_it(pictures, tmp_path):
    c = settings(pictures)
    place = write_features(c, tmp_path / "run")
    assert place == tmp_path / "run" / "features"
    network = loading.untrained_network(c, 0)
    for split, count in (("train", 11), ("test", 2)):
        source, folder = open_source(pictures, split), place / split
        found = {file.stem: np.load(file, mmap_mode="r") for file in folder.glob("*.npy")}
        assert sorted(found) == ["conv1", "index", "label", "z"]
        names = [json.loads(line) for line in (folder / "names.jsonl").read_text().splitlines()]
        assert found["z"].shape == (count, 4) and found["conv1"].shape == (count, 4 * 4 * 3)
        assert found["z"].dtype == found["conv1"].dtype == np.float32
        np.testing.assert_array_equal(found["index"], np.arange(count))
        for i in range(count):
            record = source[i]
            assert (names[i], found["label"][i]) == (record["name"], record["label"])
            if (split, i) == ("train", 5):
                assert record["image"] == b"no image"
                assert np.isnan(found["z"][i]).all() and np.isnan(found["conv1"][i]).all()
                continue
            image = network.preprocess(record["image"])[None]
            np.testing.assert_allclose(found["z"][i], network(image)[0], atol=1e-5)
            conv = network(image, "conv1").reshape(-1)
            np.testing.assert_allclose(found["conv1"][i], conv, atol=1e-4)
        card = json.loads((folder / "features.json").read_text())
        assert card["network"] == network.fingerprint()
        assert (card["fingerprint"], card["records"]) == (source.fingerprint, count)
        assert card["class_names"] == list(CLASSES) and card["layers"] == ["z", "conv1"]


def test_a_stopped_run_goes_on_where_it_was(pictures, tmp_path, monkeypatch):
    c = settings(pictures, features__splits=("train",))
    whole = write_features(c, tmp_path / "whole") / "train"
    monkeypatch.setattr(module, "_SAVE_EVERY", 0.0)
    computed = module._computed

    def stopped(*arguments):
        batches = computed(*arguments)
        for _ in range(2):
            yield next(batches)
        # What is in the files beyond the last save must not matter.
        for file in (tmp_path / "run" / "features" / ".train.partial").glob("*[yl]"):
            with file.open("ab") as more:
                more.write(b"rubbish")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_computed", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_features(c, tmp_path / "run")
    folder = tmp_path / "run" / "features" / "train"
    assert not folder.exists()
    started = []
    monkeypatch.setattr(module, "_computed", lambda *a: started.append(a[-1]) or computed(*a))
    write_features(c, tmp_path / "run")
    assert started == [8]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    for file in whole.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_two_at_once_do_not_mix(pictures, tmp_path, monkeypatch):
    c = settings(pictures, features__splits=("test",))
    computed = module._computed

    def meanwhile(*arguments):
        with pytest.raises(ValueError, match="another process is writing"):
            write_features(c, tmp_path / "run")
        return computed(*arguments)

    monkeypatch.setattr(module, "_computed", meanwhile)
    assert np.load(write_features(c, tmp_path / "run") / "test" / "z.npy").shape == (2, 4)


def test_finished_features_are_kept_and_others_refused(pictures, tmp_path, monkeypatch):
    c = settings(pictures, eval__max_features=9600)
    folder = write_features(c, tmp_path / "run") / "test"
    (folder / "z.npy").touch()
    before = (folder / "z.npy").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(module, "_computed", lambda *a: 1 / 0)
        write_features(c, tmp_path / "run")
    assert (folder / "z.npy").stat().st_mtime_ns == before
    c.eval.max_features = 12
    with pytest.raises(ValueError, match="holds features of another network, data set or prot"):
        write_features(c, tmp_path / "run")
    c.features.to = str(tmp_path / "elsewhere")
    assert np.load(write_features(c, tmp_path / "run") / "test" / "conv1.npy").shape == (2, 12)
    shutil.rmtree(folder)
    c.features.to, c.eval.max_features = "", 9600
    assert write_features(c, tmp_path / "run") / "test" == folder


def test_data_that_have_moved_are_found_where_the_command_line_says(pictures, tmp_path):
    data = open_source(pictures).fingerprint
    network = loading.untrained_network(settings(pictures), 0)
    network = dataclasses.replace(network, run={"seed": 0, "step": 7, "data": data})
    network.save(tmp_path / "bundle")
    moved = f"folder:{(tmp_path / 'pictures').rename(tmp_path / 'moved')}"
    for source in (pictures, moved):
        c = settings(source, features__splits=("test",))
        c.network = str(tmp_path / "bundle")
        if source == pictures:
            with pytest.raises(InputError, match="pictures. .*with --config.data.source="):
                write_features(c, tmp_path / "run")
        else:
            folder = write_features(c, tmp_path / "run") / "test"
            assert json.loads((folder / "features.json").read_text())["source"] == moved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features__splits": ("all",)}, "features.splits: unknown 'all'. Known: train, test"),
        ({"features__splits": ()}, "features.splits: expected at least one"),
        ({"features__source": "folder:nowhere"}, "nowhere"),
        ({"eval__layers": ("conv9",)}, "eval.layers: unknown layer 'conv9'"),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_features(settings("digits", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def peak(count: int, folder) -> int:
    """Return the bytes that Python and NumPy hold at the most while features are written."""
    folder.mkdir()
    np.savez(
        folder / "data.npz",
        x_train=np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8),
        x_test=np.zeros((1, 8, 8, 3), np.uint8),
    )
    c = settings(f"arrays:{folder / 'data.npz'}", features__splits=("train",))
    c.eval.batch_size, c.eval.layers = 32, ("conv1",)
    c.model.options.widths, c.model.options.pools = (32,), 0  # 8 KiB of features an image
    tracemalloc.start()
    try:
        write_features(c, folder / "run")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path, monkeypatch):
    peak(64, tmp_path / "first")  # compiles
    few, many = (peak(count, tmp_path / str(count)) for count in (256, 2048))
    features = 2048 * 8 * 8 * 32 * 4
    assert many - few < features / 4
    computed = module._computed
    monkeypatch.setattr(module, "_computed", lambda *a: iter(list(computed(*a))))
    assert peak(2048, tmp_path / "hoarded") - few > features / 2
    assert (tmp_path / "2048/run/features/train/conv1.npy").stat().st_size == features + 128
