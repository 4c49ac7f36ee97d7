"""Random colour jitter: each change alone equals Pillow's; together they are one affine map."""

import numpy as np
import pytest
from pictures import noise
from PIL import Image, ImageEnhance

from nat_jax.input.color_jitter import ColorJitter

LAST = 1 - 2**-53
ALONE = {"brightness": 1, "contrast": 2, "saturation": 3}
PILLOWS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


def images(count: int = 20, side: int = 12) -> np.ndarray:
    return np.stack([noise(side, side, seed) for seed in range(count)])


def numbers(count: int, **chosen: float) -> np.ndarray:
    """Return random numbers that change nothing, except those that are given."""
    columns = ("changed", "brightness", "contrast", "saturation", "hue", "grayscale")
    uniform = np.tile([0.0, 0.5, 0.5, 0.5, 0.5, LAST], (count, 1))
    for name, number in chosen.items():
        uniform[:, columns.index(name)] = number
    return uniform


def jittered(jitter: ColorJitter, images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    changed = images.copy()
    jitter.apply(changed, uniform)
    return changed


def differences(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other.astype(int))


@pytest.mark.parametrize("number", [0.0, 0.3, LAST])
@pytest.mark.parametrize("name", PILLOWS)
def test_each_change_alone_is_pillows(name: str, number: float):
    before = images()
    found = jittered(ColorJitter(0.5), before, numbers(20, **{name: number}))
    factor = 1 + 0.4 * (2 * number - 1)
    pillows = [PILLOWS[name](Image.fromarray(x)).enhance(factor) for x in before]
    assert differences(found, np.stack([np.asarray(x) for x in pillows])).max() <= 1
    assert differences(found, before).mean() > 2  # which is no comparison of two equal images


def test_grey_images_are_pillows():
    before = images()
    found = jittered(ColorJitter(grayscale=0.2), before, numbers(20, grayscale=0.19, changed=LAST))
    pillows = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in before])
    assert differences(found, pillows[..., None]).max() <= 1
    kept = jittered(ColorJitter(grayscale=0.2), before, numbers(20, grayscale=0.2))
    assert np.array_equal(kept, before)


def test_a_hue_turns_colours_and_keeps_their_luma():
    before = (images() // 3 + 80).astype(np.uint8)  # nothing is cut off
    luma = np.array([0.299, 0.587, 0.114])
    there = jittered(ColorJitter(1.0), before, numbers(20, hue=LAST))
    assert differences(there, before).mean() > 10
    assert np.abs(there @ luma - before @ luma).max() < 1
    back = jittered(ColorJitter(1.0), there, numbers(20, hue=0.0))
    assert differences(back, before).max() <= 2
    # A fifth of a circle five times is a whole one.
    fifths = before
    for _ in range(5):
        fifths = jittered(ColorJitter(1.0), fifths, numbers(20, hue=LAST))
    assert differences(fifths, before).max() <= 6 < differences(there, before).max()


def test_a_fifth_stays_and_a_fifth_is_grey():
    before = images(2000, 4)
    after = jittered(ColorJitter(0.5, 0.2), before, np.random.default_rng(0).random((2000, 6)))
    grey = (differences(after, after[..., :1]).max(axis=(1, 2, 3)) <= 1).mean()
    same = (after == before).all(axis=(1, 2, 3)).mean()
    assert abs(grey - 0.2) < 0.03 and abs(same - 0.2 * 0.8) < 0.03


@pytest.mark.parametrize("settings", [{"strength": -0.1}, {"strength": 1.5}, {"grayscale": 2.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]):
    with pytest.raises(
        ValueError, match=r"ColorJitter: expected a (strength|grayscale) in \[0, 1\], got"
    ):
        ColorJitter(**settings)
