"""Images on the device; test_golden_batches compares all that it makes of them with the host."""

import jax
import numpy as np
from faulty_records import SIZE, Faulty

from nat_jax.input import pipeline, transforms
from nat_jax.input.device_images import DeviceImages
from nat_jax.input.reader import ImageCache
from nat_jax.runtime import sharding


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
