"""Batches are the stored ones to the bit, so that a resumed run sees the same images.

    PYTHONPATH=tests python tests/input/test_golden_batches.py

renews `golden/batches.json`, for a change that is meant to change batches.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import golden
import numpy as np
import PIL
import pytest
from pictures import Album

from nat_jax.input import pipeline
from nat_jax.input.bad_records import BadRecords
from nat_jax.input.color_jitter import ColorJitter
from nat_jax.input.device_images import DeviceImages
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import open_source
from nat_jax.input.transforms import eval_transform, train_transform
from nat_jax.runtime import sharding

FILE = golden.FOLDER / "batches.json"
SIZE = 16

TRANSFORMS = {
    "shift": train_transform(image_size=SIZE, pad=2),
    "whole": train_transform(image_size=SIZE, flip=False),
    "random_crop": train_transform(image_size=SIZE, resize=20),
    "resized": train_transform(image_size=SIZE, crop="random_resized_crop"),
    "unflipped": train_transform(image_size=SIZE, crop="random_resized_crop", flip=False),
    "jitter": train_transform(
        image_size=SIZE, crop="random_resized_crop", colors=ColorJitter(0.5, 0.2)
    ),
    "shift_jitter": train_transform(image_size=SIZE, pad=2, colors=ColorJitter(1.0)),
    "digits": train_transform(image_size=8, pad=1),
}
EVAL = {
    "eval_whole": eval_transform(image_size=SIZE),
    "eval_middle": eval_transform(image_size=SIZE, resize=20),
    "eval_ten": eval_transform(image_size=SIZE, resize=20, ten_crops=True),
}

# Transform, kind of source and further arguments of `train_batches`. The album has 50 records,
# seven steps of an epoch, one of which is broken.
TRAIN: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"{name}_{kind}": (name, kind, {}) for name in TRANSFORMS for kind in ("png", "jpeg")},
    "shift_seed": ("shift", "png", {"seed": 2**32 - 1, "start_step": 12}),
    "shift_views": ("shift", "png", {"views": 2}),
    "resized_views": ("resized", "png", {"views": 3, "seed": 7}),
    "random_crop_views": ("random_crop", "png", {"views": 2}),
    "jitter_views": ("jitter", "png", {"views": 2, "seed": 7}),
    "shift_jitter_views": ("shift_jitter", "png", {"views": 2}),
    "jitter_views_jpeg": ("jitter", "jpeg", {"views": 2}),
    "part_of_batch": ("resized", "png", {"process_index": 1, "process_count": 7}),
    "digits": ("digits", "digits", {"batch_size": 128, "num_steps": 23}),
}
del TRAIN["digits_png"], TRAIN["digits_jpeg"]


def train(name: str, **options: Any) -> list[dict[str, np.ndarray]]:
    transform, kind, own = TRAIN[name]
    source = open_source("digits") if kind == "digits" else Album(kind, 50)
    settings = {"batch_size": 7, "seed": 3, "start_step": 0, "num_steps": 16, "threads": 2}
    return list(
        pipeline.train_batches(source, TRANSFORMS[transform], **{**settings, **own, **options})
    )


def evaluate(name: str, kind: str, **options: Any) -> list[dict[str, Any]]:
    return list(pipeline.eval_batches(Album(kind, 50), EVAL[name], batch_size=8, **options))


def digest(batches: Iterable[dict[str, Any]]) -> str:
    """Return a checksum of the keys, types, shapes and values of all batches."""
    found = hashlib.sha256()
    for batch in batches:
        for key in sorted(batch):
            value = np.asarray(batch[key])
            found.update(f"{key} {value.dtype} {value.shape}".encode() + value.tobytes())
    return found.hexdigest()[:32]


def grey_levels(batches: Iterable[dict[str, Any]]) -> list[float]:
    """Return the mean of each channel of every third image."""
    images = np.concatenate([b["image"].reshape(-1, *b["image"].shape[-3:]) for b in batches])
    return images[::3].mean(axis=(1, 2)).round(1).ravel().tolist()


def depends_on_machine(name: str) -> bool:
    """Whether libjpeg decodes, or floating-point matrices change colours."""
    return "jpeg" in name or "jitter" in name


def machine() -> dict[str, str]:
    versions = {"numpy": np.__version__, "pillow": PIL.__version__}
    return {**versions, "processor": golden.machine()["processor"]}


def measure() -> dict[str, Any]:
    batches: dict[str, Any] = {name: train(name) for name in TRAIN}
    for name in EVAL:
        batches |= {f"{name}_{kind}": evaluate(name, kind) for kind in ("png", "jpeg")}
    return {
        "machine": machine(),
        "digests": {name: digest(found) for name, found in batches.items()},
        "grey_levels": {
            name: grey_levels(found) for name, found in batches.items() if depends_on_machine(name)
        },
    }


STORED: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}


def assert_stored(name: str, batches: list[dict[str, Any]]) -> None:
    """Compare with the stored batches; to 3 grey levels where another libjpeg may be in use."""
    if depends_on_machine(name) and STORED["machine"] != machine():
        assert np.abs(np.subtract(grey_levels(batches), STORED["grey_levels"][name])).max() < 3
    else:
        assert digest(batches) == STORED["digests"][name]


@pytest.mark.parametrize("name", TRAIN)
def test_training_sees_the_stored_batches(name: str) -> None:
    assert_stored(name, train(name))


@pytest.mark.parametrize("kind", ["png", "jpeg"])
@pytest.mark.parametrize("name", EVAL)
def test_evaluation_sees_the_stored_batches(name: str, kind: str) -> None:
    assert_stored(f"{name}_{kind}", evaluate(name, kind))


@pytest.mark.parametrize("name", ["shift_png", "shift_views", "shift_jitter_views", "digits"])
@pytest.mark.parametrize("threads", [0, 5])
def test_images_in_memory_give_the_same(name: str, threads: int) -> None:
    assert_stored(name, train(name, cache=ImageCache(), threads=threads, prefetch=1))


def test_worker_processes_give_the_same_and_count_bad_records() -> None:
    bad = BadRecords(50)
    assert_stored("jitter_views", train("jitter_views", workers=2, bad_records=bad))
    assert bad.summary().startswith("1 of 50 records are bad: 11.png: not an image")


@pytest.mark.parametrize("name", ["shift_views", "whole_png", "digits"])
def test_images_on_the_device_give_the_same(name: str) -> None:
    transform, kind, own = TRAIN[name]
    source = open_source("digits") if kind == "digits" else Album(kind, 50)
    cache, mesh = ImageCache(), sharding.make_mesh(1)
    images = pipeline.read_all(source, TRANSFORMS[transform], cache, threads=2, timeout=60)
    assert images is not None
    on_device = DeviceImages(images, TRANSFORMS[transform].pad, mesh)
    settings = {"batch_size": 7, "seed": 3, "start_step": 0, "num_steps": 16}
    found = []
    for batch in pipeline.train_batches(
        source, TRANSFORMS[transform], cache=cache, pixels=False, **{**settings, **own}
    ):
        image = np.asarray(on_device(sharding.global_batch(batch, mesh)))
        found.append({k: batch[k] for k in ("index", "label", "weight")} | {"image": image})
    assert_stored(name, found)


def test_other_batches_are_noticed() -> None:
    batches = train("shift_png")
    batches[3]["image"][2, 5, 5, 0] ^= 1
    assert digest(batches) != STORED["digests"]["shift_png"]
    assert len(set(STORED["digests"].values())) == len(STORED["digests"])
    name = "jitter_jpeg"
    levels = grey_levels(train(name, seed=4))
    assert np.abs(np.subtract(levels, STORED["grey_levels"][name])).max() > 30


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure()) + "\n")
