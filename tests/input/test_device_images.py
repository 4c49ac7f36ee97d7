import jax
import numpy as np
import pytest
from faulty_records import SIZE, Faulty

from nat_jax.input import pipeline, transforms
from nat_jax.input.device_images import DeviceImages
from nat_jax.input.reader import ImageCache
from nat_jax.runtime import sharding


@pytest.mark.parametrize(
    ("pad", "flip", "views"), [(0, False, 1), (2, True, 1), (0, True, 2), (3, False, 2)]
)
def test_the_device_gives_the_pixels_of_the_host(pad: int, flip: bool, views: int):
    transform = transforms.train_transform(image_size=SIZE, pad=pad, flip=flip)
    source, cache, mesh = Faulty(120, "broken", 17), ImageCache(), sharding.make_mesh()
    images = pipeline.read_all(source, transform, cache, threads=2, timeout=60)
    assert images is not None and images.shape == (120, SIZE, SIZE, 3)
    on_device = DeviceImages(images, pad, mesh)
    options = {"batch_size": 8, "seed": 3, "start_step": 0, "num_steps": 15, "views": views}
    host = pipeline.train_batches(source, transform, cache=cache, **options)
    moves = pipeline.train_batches(source, transform, cache=cache, pixels=False, **options)
    greys = 0
    for left, right in zip(host, moves, strict=True):
        found = on_device(sharding.global_batch(right, mesh))
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(np.asarray(found), left["image"])
        for key in ("index", "label", "weight"):
            np.testing.assert_array_equal(left[key], right[key])
        greys += int((right["weight"] == 0).sum())
    assert greys == 1  # the broken record, once in an epoch


def test_other_moves_give_other_pixels():
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    on_device = DeviceImages(images, 2, sharding.make_mesh())

    def take(corner: tuple[int, int], mirrored: bool) -> np.ndarray:
        batch = {
            "index": np.arange(4, dtype=np.int32),
            "corner": np.tile(np.int32(corner), (4, 1, 1)),
            "mirrored": np.full((4, 1), mirrored),
            "weight": np.ones(4, np.float32),
        }
        return np.asarray(on_device(jax.tree.map(jax.numpy.asarray, batch)))

    np.testing.assert_array_equal(take((2, 2), False), images)
    np.testing.assert_array_equal(take((2, 2), True), images[:, :, ::-1])
    np.testing.assert_array_equal(take((0, 2), False)[:, 2:], images[:, :-2])
    assert (take((0, 2), False)[:, :2] == 0).all()
    assert not np.array_equal(take((2, 1), False), images)


def test_images_that_are_not_kept_cannot_be_read_at_once():
    transform = transforms.train_transform(image_size=SIZE)
    options = {"threads": 1, "timeout": 60.0}
    assert pipeline.read_all(Faulty(8), transform, ImageCache(8), **options) is None
    random = transforms.train_transform(image_size=SIZE, resize=9)
    assert pipeline.read_all(Faulty(8), random, ImageCache(), **options) is None
