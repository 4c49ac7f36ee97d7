"""Filters and neighbours as PNG files."""

import io

import numpy as np
import pytest
from PIL import Image

from nat_jax.report.pictures import _RIGHT, _WRONG, filters, neighbours, stacked


def _pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG" and image.mode == "RGBA"
    return np.asarray(image)


def _count(pixels: np.ndarray, color: tuple[int, ...]) -> int:
    return int((pixels == np.asarray(color, np.uint8)).all(axis=-1).sum())


@pytest.mark.parametrize("shape", [(11, 11, 3, 96), (5, 5, 1, 7), (3, 3, 64, 4)])
def test_filters_of_any_shape(shape: tuple[int, ...]) -> None:
    pixels = _pixels(filters(np.random.default_rng(0).normal(size=shape)))
    assert pixels.shape[0] < 3000
    assert pixels[56:, :, :3].std() > 20  # below the title


def test_a_filter_is_drawn_as_it_is() -> None:
    kernel = np.zeros((2, 2, 1, 1))
    kernel[0, 1], kernel[1, 0] = 5.0, -5.0
    pixels = _pixels(filters(kernel))[56:, :88, :3]
    assert pixels[5, 5].tolist() == pixels[-5, -5].tolist() == [128, 128, 128]
    assert pixels[5, -5].tolist() == [255, 255, 255] and pixels[-5, 5].tolist() == [0, 0, 0]
    red = np.zeros((1, 1, 3, 1))
    red[0, 0, 0, 0] = 1.0
    assert _pixels(filters(red))[80, 20].tolist() == [255, 128, 128, 255]
    assert _pixels(filters(0 * kernel))[80, 20, :3].tolist() == [128] * 3


def test_frames_tell_right_from_wrong() -> None:
    queries = np.full((2, 8, 8, 3), 10, np.uint8)
    near = np.full((2, 3, 8, 8, 3), 20, np.uint8)
    correct = np.asarray([[True, True, False], [True, True, True]])
    pixels = _pixels(neighbours(queries, near, correct))
    assert _count(pixels, _RIGHT) == pytest.approx(5 * _count(pixels, _WRONG), rel=1e-6)
    plain = _pixels(neighbours(queries, near))
    assert _count(plain, _RIGHT) == _count(plain, _WRONG) == 0
    assert _count(plain, (10, 10, 10, 255)) == 2 * 128 * 128
    assert _count(plain, (20, 20, 20, 255)) == 6 * 128 * 128


IMAGES = np.zeros((2, 4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        (filters, (np.zeros((3, 3, 2)),), "Cout"),
        (filters, (np.full((3, 3, 1, 1), np.nan),), "finite"),
        (neighbours, (IMAGES[:1, 0], IMAGES), r"queries \[Q, H, W, 3\]"),
        (neighbours, (IMAGES[:, 0], IMAGES, np.zeros((2, 3), bool)), r"\(2, 4\), got \(2, 3\)"),
        (stacked, ([],), "at least one picture"),
    ],
)
def test_rejects(draw, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


def test_pictures_are_stacked_in_order() -> None:
    parts = [filters(np.ones((3, 3, 1, count)), "some") for count in (1, 40)]
    first, second = (_pixels(part) for part in parts)
    whole = _pixels(stacked(parts))
    assert whole.shape[1] == max(first.shape[1], second.shape[1])
    np.testing.assert_array_equal(whole[: len(first), : first.shape[1]], first)
    np.testing.assert_array_equal(whole[-len(second) :, : second.shape[1]], second)
