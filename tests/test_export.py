"""Bundles: the judged features from the same pixels, whole or refused; programs without nat_jax."""

import dataclasses
import functools
import io
import json
import shutil

import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from project import python
from small_run import changed

import nat_jax
from nat_jax import config, evaluate, export, main, models, train
from nat_jax.export import Bundle, BundleError, bundle, loading
from nat_jax.export.program import PROGRAM, program
from nat_jax.input import pipeline
from nat_jax.input.sources import open_source
from nat_jax.runtime import atomic_files
from nat_jax.training import workdir

SEEDS = (3, 4)


def settings(**changes):
    """Return two runs of 5 steps on digits, with checkpoints of steps 3 and 5."""
    c = config.default()
    c.seeds, c.steps = SEEDS, 5
    c.model.dim, c.model.options.widths, c.model.options.pools = 6, (4,), 1
    c.optim.learning_rate = 0.1
    c.checkpoint.every_epochs, c.checkpoint.every_steps = 0.0, 3
    c.eval.probes, c.eval.labels_per_class = ("knn",), (0,)
    return changed(c, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train; return the folder, and the features of each network that kNN was judged on."""
    folder, judged = tmp_path_factory.mktemp("run"), []
    knn = evaluate.PROBES["knn"]

    @functools.wraps(knn)
    def noted(train, test, **options):
        judged.append(test.features)
        return knn(train, test, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(evaluate.PROBES, "knn", noted)
        train.train_and_evaluate(settings(), folder)
    names = ("pixels", "untrained conv1", "untrained z", "conv1", "z")
    assert len(judged) == len(SEEDS) * len(names)
    return folder, {
        seed: dict(zip(names, judged[i * len(names) :], strict=False))
        for i, seed in enumerate(SEEDS)
    }


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Return the folder that the task wrote."""
    to = tmp_path_factory.mktemp("exported") / "bundle"
    asked = config.default()  # another model than the run's
    asked.task, asked.seeds, asked.export.to = "export", (4,), str(to)
    asked.eval.layers = ("last_conv", "z")
    main.TASKS["export"].run(asked, run[0])
    return to


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture(scope="module")
def untrained():
    c = settings()
    c.data.image_size, c.data.resize = 12, 16
    return loading.untrained_network(c, 0)


def pixels(network: Bundle) -> np.ndarray:
    source = open_source("digits", "test")
    return np.stack([network.preprocess(source[i]["image"]) for i in range(len(source))])


def test_a_bundle_gives_the_judged_features(run, exported):
    network = nat_jax.load(exported)
    assert (network.run["seed"], network.run["step"]) == (4, 5)
    images = pixels(network)
    for layer in ("z", "conv1"):
        judged = run[1][4][layer]
        found = network(images, layer)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.reshape(judged.shape), judged)
        assert not np.allclose(found.reshape(judged.shape), run[1][3][layer], atol=1e-3)


def test_a_run_gives_them_without_being_exported_and_untrained_ones_too(run):
    for seed, wanted in run[1].items():
        trained = loading.load_network(run[0], seed=seed)
        before = loading.load_network(run[0], seed=seed, untrained=True)
        images = pixels(trained)
        np.testing.assert_array_equal(trained(images), wanted["z"])
        np.testing.assert_array_equal(before(images), wanted["untrained z"])
        assert trained.fingerprint() != before.fingerprint()
    assert loading.load_network(run[0]).run["seed"] == SEEDS[0]


def test_bundles_and_runs_are_taken_alike(run, exported):
    by_path = loading.load_network(exported)
    of_run = loading.load_network(run[0], seed=4)
    assert by_path.fingerprint() == of_run.fingerprint()
    c = settings(network=str(exported))
    assert loading.network_of(c, run[0], seed=3).run == by_path.run
    c.network = loading.UNTRAINED
    assert loading.network_of(c, run[0], seed=4).run == {"seed": 4, "step": 0}
    assert loading.network_of(c, run[0] / "nothing", seed=9).run == {"seed": 9, "step": 0}
    again = loading.load_network(exported, untrained=True)
    assert again.fingerprint() == loading.load_network(run[0], seed=4, untrained=True).fingerprint()


def test_the_model_is_the_run_s_and_the_evaluation_the_command_line_s(run):
    asked = config.default()
    asked.eval.knn_k, asked.data.threads, asked.model.dim = 3, 7, 99
    merged = loading.task_config(asked, loading.load_network(run[0]))
    assert (merged.eval.knn_k, merged.data.threads, merged.model.dim) == (3, 7, 6)
    assert merged.model.options.widths == (4,) and merged.seeds == SEEDS
    config.validate(merged, evaluate.PROBES)
    with pytest.raises(ValueError, match="unknown key 'optim.nesterov'.*another version"):
        workdir.of_run({"optim": {"nesterov": True}}, asked)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("empty", {}, "holds neither a run .config.json. nor a bundle .bundle.json."),
        ("run", {"seed": 5}, r"has \(3, 4\); got 5. Name one of them"),
        ("bundle", {"seed": 3}, "is a bundle of seed 4; got 3"),
    ],
)
def test_a_network_that_is_not_there_is_one_message(
    run, exported, tmp_path, where, options, message
):
    folder = {"empty": tmp_path, "run": run[0], "bundle": exported}[where]
    with pytest.raises(ValueError, match=message):
        loading.load_network(folder, **options)


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(run, tmp_path, caplog):
    folder = shutil.copytree(run[0], tmp_path / "run")
    place = folder / "seed-3" / "checkpoints"
    for file in (place / "5" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = sorted(path.name for path in place.iterdir())
    assert loading.load_network(folder, seed=3).run["step"] == 3
    assert "step 5" in caplog.text and "trying an older one" in caplog.text
    assert sorted(path.name for path in place.iterdir()) == before
    shutil.rmtree(place)
    with pytest.raises(nat_jax.training.checkpoint.CheckpointError):
        loading.load_network(folder, seed=3)
    assert not place.exists()


# A process in which neither nat_jax nor flax can be imported.
ALONE = """
import sys
for name in ("nat_jax", "flax", "orbax", "grain"):
    sys.modules[name] = None
import numpy as np
from jax import export

folder = sys.argv[1]
program = export.deserialize(bytearray(open(f"{folder}/features.stablehlo", "rb").read()))
weights = dict(np.load(f"{folder}/weights.npz"))
images = np.load("images.npy")
for count in (1, 5, len(images)):
    found = program.call(weights, images[:count])
    for layer, values in found.items():
        np.save(f"{layer}-{count}.npy", values)
print(*program.platforms, *sorted(found))
"""


def test_the_program_runs_without_nat_jax(exported, tmp_path):
    network = nat_jax.load(exported)
    images = pixels(network)[:30]
    np.save(tmp_path / "images.npy", images)
    done = python("-c", ALONE, exported, cwd=tmp_path)
    assert done.stdout.split() == ["cpu", "cuda", "tpu", "conv1", "z"]
    for count in (1, 5, 30):
        for layer in ("conv1", "z"):
            found = np.load(tmp_path / f"{layer}-{count}.npy")
            np.testing.assert_allclose(found, network(images[:count], layer), atol=1e-5)


def test_the_program_refuses_other_sizes(exported):
    made = jax_export.deserialize(bytearray((exported / PROGRAM).read_bytes()))
    with pytest.raises(ValueError, match="shape"):
        made.call(nat_jax.load(exported).named_weights(), np.zeros((5, 9, 8, 3), np.uint8))


def test_the_program_pools_as_asked_and_knows_its_layers(untrained):
    with pytest.raises(ValueError, match="unknown layer 'conv9'"):
        program(untrained, ("conv9",))
    made = jax_export.deserialize(bytearray(program(untrained, ("conv1",), 16)))
    assert [value.shape[1:] for value in made.out_avals] == [(2, 2, 4)]


def rewritten(folder, card: dict | None = None, **weights):
    """Change a bundle and its sums, as another version or a mistaken hand would."""
    if card is not None:
        file = folder / bundle.CARD
        file.write_text(json.dumps(json.loads(file.read_text()) | card))
    if weights:
        with np.load(folder / bundle.WEIGHTS) as file:
            kept = {k: v for k, v in file.items() if k not in weights}
        np.savez(folder / bundle.WEIGHTS, **kept, **{k: v for k, v in weights.items() if v.size})
    names = (bundle.CARD, bundle.WEIGHTS, PROGRAM)
    sums = {name: atomic_files.sha256(folder / name) for name in names}
    (folder / bundle.SUMS).write_bytes(atomic_files.sums_text(sums))


@pytest.mark.parametrize("name", [bundle.CARD, bundle.WEIGHTS, bundle.SUMS, PROGRAM])
def test_a_flipped_bit_is_noticed_wherever_it_is_and_a_missing_file_named(copy, name):
    data = (copy / name).read_bytes()
    for place in np.linspace(0, len(data) - 1, 23).astype(int):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(place) % 8
        (copy / name).write_bytes(damaged)
        with pytest.raises(BundleError, match="is damaged|is incomplete|cannot be read"):
            nat_jax.load(copy)
    (copy / name).write_bytes(data)
    nat_jax.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        nat_jax.load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"card": {"format": 9, "nat_jax": "7.1"}}, "format 9; this one reads 1.*nat_jax 7.1"),
        ({"card": {"model": {"name": "vgg", "dim": 2}}}, "its network cannot be made"),
        ({"params/head/bias": np.zeros(5, "f4")}, r"float32\[6\].*got float32\[5\]"),
        ({"params/head/bias": np.zeros(0)}, "params/head/bias: expected .*; got nothing"),
        ({"params/more": np.zeros(2)}, "params/more: expected nothing"),
    ],
)
def test_what_is_not_ours_is_one_message(copy, change, message):
    rewritten(copy, **change)
    with pytest.raises(BundleError, match=message):
        nat_jax.load(copy)


def test_no_bundle_is_one_message(tmp_path):
    with pytest.raises(
        BundleError, match="there is no folder .*nothing; expected that of a bundle"
    ):
        nat_jax.load(tmp_path / "nothing")
    with pytest.raises(BundleError, match="is not a bundle: it has no bundle.json"):
        nat_jax.load(tmp_path)


def test_a_bundle_replaces_a_bundle_and_nothing_else(untrained, copy, tmp_path, monkeypatch):
    assert untrained.save(copy) == copy
    assert nat_jax.load(copy).fingerprint() == untrained.fingerprint()
    assert not (copy / PROGRAM).exists()
    before = (copy / bundle.WEIGHTS).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(atomic_files, "sha256", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            untrained.save(copy)
    nat_jax.load(copy)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(BundleError, match="holds something else"):
        untrained.save(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "photos"]
    assert untrained.save(tmp_path / "again").joinpath(bundle.WEIGHTS).read_bytes() == before


def jpeg(height: int, width: int) -> bytes:
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([y * 255 // height, x * 255 // width, (x + y) % 200], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    return file.getvalue()


def test_images_are_brought_to_the_network_as_the_judged_ones_are(untrained, tmp_path):
    for i, shape in enumerate(((40, 90), (33, 20), (17, 16))):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(*shape))
    for split in ("train", "test"):
        source = open_source(f"folder:{tmp_path}", split)
        (batch,) = pipeline.eval_batches(source, untrained.transform, batch_size=4)
        for i in range(len(source)):
            data = source[i]["image"]
            path = tmp_path / "image"
            path.write_bytes(data)
            for image in (data, path, str(path)):
                np.testing.assert_array_equal(untrained.preprocess(image), batch["image"][i])
            # Pillow has decoded it in full size, which rounds otherwise.
            opened = untrained.preprocess(Image.open(path)).astype(int)
            assert np.abs(opened - batch["image"][i]).mean() < 3
            np.testing.assert_array_equal(
                opened, untrained.preprocess(np.asarray(Image.open(path)))
            )
            path.unlink()


def test_an_image_of_pillow_is_turned_upright(untrained):
    turned = Image.open(io.BytesIO(jpeg(40, 30)))
    file = io.BytesIO()
    turned.getexif()[0x0112] = 6
    turned.save(file, "JPEG", exif=turned.getexif(), quality=100)
    opened = Image.open(io.BytesIO(file.getvalue()))
    upright = untrained.preprocess(np.rot90(np.asarray(opened), -1).copy())
    np.testing.assert_array_equal(untrained.preprocess(opened), upright)


def test_a_bundle_keeps_the_value_that_is_white(untrained, copy, tmp_path):
    deep = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    bright = dataclasses.replace(untrained, white=4095)
    again = nat_jax.load(bright.save(tmp_path / "bundle"))
    found = again.preprocess(tmp_path / "deep.png")
    np.testing.assert_array_equal(found, again.preprocess(Image.open(tmp_path / "deep.png")))
    scaled = (deep * (255 / 4095) + 0.5).astype(np.uint8)
    np.testing.assert_array_equal(found, untrained.preprocess(scaled))
    assert untrained.preprocess(tmp_path / "deep.png").max() < 16
    assert again.transform != untrained.transform
    rewritten(copy, card={"images": {"image_size": 8, "resize": 0}})  # of an older version
    assert nat_jax.load(copy).white == 0


def test_parts_of_any_length_give_the_same(untrained):
    images = np.random.default_rng(0).integers(0, 256, (11, 12, 12, 3), np.uint8)
    whole = untrained(images, "last_conv")
    assert whole.shape == (11, *untrained.layer_shapes()["conv1"])
    np.testing.assert_allclose(untrained(images, "conv1", batch_size=4), whole, atol=1e-4)
    pooled = untrained(images, "conv1", max_features=16)
    by_hand = whole.reshape(11, 2, 3, 2, 3, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(pooled, by_hand, atol=1e-4)


@pytest.mark.parametrize(
    ("images", "layer", "message"),
    [
        (np.zeros((2, 12, 12, 3), np.float32), "z", "expected uint8 .*; got float32"),
        ([1, 2], "z", "expected uint8 .*; got list"),
        (np.zeros((2, 8, 8, 3), np.uint8), "z", r"\[B, 12, 12, 3\].*preprocess"),
        (np.zeros((12, 12, 3), np.uint8), "z", r"got \[12, 12, 3\]"),
        (np.zeros((0, 12, 12, 3), np.uint8), "z", "got none"),
        (np.zeros((2, 12, 12, 3), np.uint8), "conv7", "layer: unknown layer 'conv7'. Known: last"),
    ],
)
def test_a_wrong_call_is_one_message(untrained, images, layer, message):
    with pytest.raises(ValueError, match=message):
        untrained(images, layer)


def test_the_package_offers_load():
    assert nat_jax.load is export.load
    assert "load" in dir(nat_jax)


def test_fingerprints_follow_weights_and_definition(untrained):
    same = loading.untrained_network(settings_like(untrained), 0)
    other = loading.untrained_network(settings_like(untrained), 1)
    assert same.fingerprint() == untrained.fingerprint() != other.fingerprint()
    model = models.make_model(**{**untrained.arguments, "frontend": "rgb"})
    assert model.spec == untrained.model.spec  # so that the front end alone differs
    parts = (untrained.params, untrained.batch_stats)
    assert nat_jax.models.frozen.FrozenModel(model, *parts).fingerprint() != untrained.fingerprint()


def settings_like(network: Bundle):
    return workdir.of_run(network.config, config.default())
