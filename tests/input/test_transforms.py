"""Crops and moves against Pillow and slices of the picture; what random ones are drawn from."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pictures import encode, noise, photographs
from PIL import Image

from nat_jax.input.decode import SHRINKS, Picture, Pixels, open_picture
from nat_jax.input.transforms import (
    CenterCrop,
    Crop,
    FiveCrop,
    RandomCrop,
    RandomResizedCrop,
    Region,
    ShiftFlip,
    Transform,
    WholeImage,
    decode_and_crop,
    eval_transform,
    train_transform,
)

ROUNDING = 2  # grey levels by which two ways to scale differ: both round twice
LAST = 1 - 2**-53  # the largest number below 1


class Watched:
    """Records how often and at which fraction a picture is decoded; `full` always decodes all."""

    def __init__(self, picture: Picture, full: bool = False):
        self.height, self.width = picture.height, picture.width
        self.shrinks: list[int] = []
        self._picture, self._full = picture, full

    def pixels(self, shrink: int = 1) -> Pixels:
        self.shrinks.append(shrink)
        return self._picture.pixels(1 if self._full else shrink)


def cut_out(
    image: bytes | np.ndarray | Picture,
    crop: Crop | Transform,
    *uniforms: list[float],
) -> np.ndarray:
    """Return the crops of an image, uint8 [views * count, size, size, 3]."""
    transform = crop if isinstance(crop, Transform) else Transform(crop)
    picture = open_picture(image) if isinstance(image, bytes | np.ndarray) else image
    views = uniforms or ([],)
    out = np.zeros((len(views) * transform.count, transform.size, transform.size, 3), np.uint8)
    decode_and_crop(picture, transform, views, out)
    return out


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def scaled_as_a_whole(image: np.ndarray, shortest: int) -> np.ndarray:
    """Scale as Pillow does, the shorter side to `shortest` pixels."""
    height, width = image.shape[:2]
    if height <= width:
        size = (round(width * shortest / height), shortest)
    else:
        size = (shortest, round(height * shortest / width))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


SIDES = st.integers(1, 120)


@settings(max_examples=300, deadline=None)
@given(SIDES, SIDES, st.integers(1, 40), st.integers(0, 20), st.floats(0, LAST), st.floats(0, LAST))
@example(375, 500, 224, 32, 0.3, LAST)
@example(500, 333, 224, 0, LAST, 0.0)
@example(1, 120, 40, 20, 0.5, 0.999)
def test_a_region_is_the_same_as_cutting_the_whole_scaled_picture(
    height: int, width: int, size: int, more: int, down: float, right: float
):
    image = noise(height, width)
    whole = scaled_as_a_whole(image, size + more)
    room = whole.shape[0] - size, whole.shape[1] - size

    def window(top: int, left: int) -> np.ndarray:
        return whole[top : top + size, left : left + size]

    middle = window(room[0] // 2, room[1] // 2)
    corners = [window(top, left) for top in (0, room[0]) for left in (0, room[1])]
    chosen = window(int(down * (room[0] + 1)), int(right * (room[1] + 1)))
    random = cut_out(image, RandomCrop(size, size + more), [down, right])
    found = [*cut_out(image, CenterCrop(size, size + more)), *random]
    found += [*cut_out(image, FiveCrop(size, size + more))]
    expected = [middle, chosen, *corners, middle]
    # What the documentation of `decode_and_crop` states.
    assert difference(np.stack(found), np.stack(expected)) <= ROUNDING


@pytest.mark.parametrize("shape", [(30, 60), (61, 30), (7, 5), (1, 1), (9, 100)])
def test_the_whole_image_is_scaled_whatever_its_aspect_ratio(shape):
    image = noise(*shape)
    bilinear = Image.Resampling.BILINEAR
    expected = np.asarray(Image.fromarray(image).resize((10, 10), bilinear))
    assert np.array_equal(cut_out(image, WholeImage(10))[0], expected)


def test_pixels_that_need_no_scaling_are_untouched():
    image = noise(9, 12)
    assert np.array_equal(cut_out(image[:, :9], WholeImage(9))[0], image[:, :9])
    assert np.array_equal(cut_out(image, CenterCrop(5, 9))[0], image[2:7, 3:8])
    corners = cut_out(image, FiveCrop(8, 9))
    assert np.array_equal(corners[1:4], [image[:8, 4:], image[1:, :8], image[1:, 4:]])
    with_alpha = np.dstack([image, image[:, :, 0]])
    for file in (with_alpha, encode(image, "PNG")):
        assert np.array_equal(cut_out(file, CenterCrop(5, 9))[0], image[2:7, 3:8])


def test_a_region_one_pixel_off_would_be_seen():
    image = noise(90, 120)
    whole = scaled_as_a_whole(image, 40)
    (found,) = cut_out(image, CenterCrop(32, 40))
    assert difference(found, whole[4:36, 10:42]) <= ROUNDING
    assert difference(cut_out(np.roll(image, 1, axis=1), CenterCrop(32, 40))[0], found) > 10


CROPS = [
    WholeImage(8),
    CenterCrop(8, 8),
    CenterCrop(8, 11),
    FiveCrop(8, 11),
    RandomCrop(8, 11),
    RandomResizedCrop(8),
]


@pytest.mark.parametrize("crop", CROPS)
def test_images_of_one_pixel_can_be_cut(crop: Crop, jpeg_reader: str):
    for shape in ((1, 1), (1, 2), (2, 1), (1, 300), (300, 1), (3, 2000)):
        image = np.full((*shape, 3), [50, 120, 200], np.uint8)
        for number in (0.0, 0.5, LAST):
            for file in (image, encode(image, "JPEG", subsampling=0)):
                out = cut_out(file, crop, [number] * crop.draws)
                assert out.shape == (crop.count, 8, 8, 3)
                assert np.abs(out.astype(int) - [50, 120, 200]).max() <= 4


def test_views_are_cut_out_of_one_decoding_each_by_its_own_numbers():
    picture = Watched(open_picture(noise(40, 50)))
    crop = RandomResizedCrop(8)
    uniforms = np.random.default_rng(0).random((3, crop.draws)).tolist()
    views = cut_out(picture, crop, *uniforms)
    assert len(picture.shrinks) == 1
    for view, uniform in zip(views, uniforms, strict=True):
        assert np.array_equal(view, cut_out(noise(40, 50), crop, uniform)[0])
    assert not np.array_equal(views[0], views[2])


def test_ten_crops_of_each_view_are_corners_and_middle_then_their_mirror_images():
    image = noise(12, 15)
    ten = eval_transform(image_size=8, resize=12, ten_crops=True)
    corners = [image[:8, :8], image[:8, 7:], image[4:, :8], image[4:, 7:], image[2:10, 3:11]]
    five = np.stack(corners)
    back = five[:, :, ::-1]
    assert np.array_equal(cut_out(image, ten, [], []), np.concatenate([five, back, five, back]))


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 80), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_decoding_is_as_small_as_possible_but_no_smaller_than_the_crop(height, width, size, more):
    for crop in (WholeImage(size), CenterCrop(size, size + more), RandomResizedCrop(size)):
        uniform = [0.5] * crop.draws
        picture = Watched(open_picture(np.zeros((height, width, 3), np.uint8)))
        cut_out(picture, crop, uniform)
        region = crop.regions(height, width, uniform)[0]
        shortest = min(region.height, region.width)
        fits = [s for s in SHRINKS if shortest >= s * size]
        assert picture.shrinks == [max(fits, default=1)]


@pytest.mark.parametrize("crop", [WholeImage(16), CenterCrop(16, 20), FiveCrop(16, 20)])
@pytest.mark.parametrize("shape", [(133, 201), (67, 90), (256, 160)])
def test_regions_of_a_smaller_decoding_are_in_the_same_place(shape, crop: Crop, jpeg_reader: str):
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    image = np.stack([y * 255 / shape[0], x * 255 / shape[1], (x + y) * 0], -1).astype(np.uint8)
    data = encode(image, "JPEG", quality=98, subsampling=0)
    small = Watched(open_picture(data))
    places = cut_out(small, crop).astype(int)
    assert small.shrinks[0] > 1
    assert np.abs(places - cut_out(image, crop)).max() <= 4
    shifted = cut_out(np.roll(image, 6, axis=1)[:, 6:], crop)
    assert np.abs(places - shifted).max() > 4


def test_photographs_decoded_at_a_fraction_differ_little(shared_data: Path, jpeg_reader: str):
    rng = np.random.default_rng(0)
    shrinks, means, worst = set(), [], 0
    for data in photographs(shared_data, 100):
        for crop in (CenterCrop(32, 36), CenterCrop(96, 108), RandomResizedCrop(64)):
            uniform = rng.random(crop.draws).tolist()
            small = Watched(open_picture(data))
            exact = cut_out(Watched(open_picture(data), full=True), crop, uniform).astype(int)
            gap = np.abs(cut_out(small, crop, uniform) - exact)
            if small.shrinks[0] > 1:
                shrinks |= set(small.shrinks)
                means.append(gap.mean())
                worst = max(worst, gap.max())
    assert shrinks == {2, 4, 8} and len(means) > 200
    # What the documentation of `decode_and_crop` states, and that decoding was smaller at all.
    assert 0.5 < np.mean(means) < 2 and max(means) < 6 and 10 < worst < 64


def test_scaling_never_falls_below_the_shortest_side():
    for height in range(224, 300):
        for size in (64, 63):
            regions = FiveCrop(size, 64).regions(height, 301, [])
            for top, left, down, right in regions:
                assert top >= 0 and left >= 0 and down > 0 and right > 0
                assert top + down <= height + 1e-9 and left + right <= 301 + 1e-9


def test_random_crop_reaches_every_place_and_no_other():
    image = noise(5, 6)
    grid = (np.arange(12) + 0.5) / 12
    crops = {cut_out(image, RandomCrop(4, 5), [y, x]).tobytes() for y in grid for x in grid}
    assert crops == {image[y : y + 4, x : x + 4].tobytes() for y in range(2) for x in range(3)}
    first, last = cut_out(image, RandomCrop(4, 5), [0.0, 0.0], [LAST, LAST])
    assert np.array_equal(first, image[:4, :4]) and np.array_equal(last, image[1:, 2:])


def random_regions(height: int, width: int, wanted: int, **options) -> np.ndarray:
    crop = RandomResizedCrop(8, **options)
    uniform = np.random.default_rng(0).random((wanted, crop.draws)).tolist()
    return np.array([crop.regions(height, width, u)[0] for u in uniform])


@pytest.mark.parametrize("min_area", [0.08, 0.5, 1.0])
def test_random_regions_lie_inside_the_picture_on_whole_pixels(min_area: float):
    for height, width in ((1, 1), (1, 7), (9, 2), (37, 50), (500, 375), (40, 999)):
        found = random_regions(height, width, 500, min_area=min_area)
        assert np.array_equal(found, found.astype(int))
        top, left, down, right = found.T
        assert (top >= 0).all() and (left >= 0).all() and (down > 0).all() and (right > 0).all()
        assert (top + down <= height).all() and (left + right <= width).all()


def test_random_regions_have_the_areas_and_aspect_ratios_of_inception():
    """Against the density itself: on a square, those that fit have area <= min(r, 1/r)."""
    side, smallest, longest = 2000, 0.08, math.log(4 / 3)
    _, _, height, width = random_regions(side, side, 20_000).T
    area, aspect = height * width / side**2, np.log(width / height)
    assert area.min() > smallest - 0.001 and area.max() <= 1
    assert np.abs(aspect).max() < longest + 0.002
    a, r = np.meshgrid(np.linspace(smallest, 1, 1001), np.linspace(-longest, longest, 1001))
    fits = a <= np.exp(-np.abs(r))
    for found, values in ((area, a), (aspect, r), (area * aspect**2, a * r**2)):
        expected, spread = values[fits].mean(), values[fits].std()
        assert abs(found.mean() - expected) < 4 * spread / math.sqrt(20_000) + 0.0005
        assert abs(found.std() / spread - 1) < 0.03
        share = np.mean(found[:, None] < np.quantile(values[fits], (0.1, 0.5, 0.9)), axis=0)
        assert np.abs(share - (0.1, 0.5, 0.9)).max() < 0.02
    # Without the aspect ratio's part in what fits, areas would be uniform; they are not.
    assert abs(area.mean() - (1 + smallest) / 2) > 0.02


def test_random_regions_stand_anywhere_with_the_same_likelihood():
    top, left, height, width = random_regions(1000, 1000, 20_000).T
    down, right = (top + 0.5) / (1001 - height), (left + 0.5) / (1001 - width)
    for place in (down, right):
        shares = np.histogram(place, 10, (0, 1))[0] / 20_000
        assert np.abs(shares - 0.1).max() < 0.01
    pairs = np.corrcoef([down, right, height * width, np.log(width / height)])
    assert np.abs(pairs - np.eye(4)).max() < 0.03


@pytest.mark.parametrize(
    ("height", "width", "region"),
    [
        (100, 1000, Region(0, 433, 100, 133)),
        (1000, 90, Region(440, 0, 120, 90)),
        (100, 120, Region(0, 0, 100, 120)),
        (1, 50, Region(0, 24, 1, 1)),
        (50, 1, Region(24, 0, 1, 1)),
    ],
)
def test_where_no_random_region_fits_it_is_the_largest_in_the_middle(height, width, region):
    sideways = LAST if height > width else 0.0  # as wide as possible in a high picture
    uniform = [*[LAST, sideways] * 10, 0.9, 0.9]
    assert RandomResizedCrop(8).regions(height, width, uniform) == [region]


def test_shifts_and_mirror_images_are_as_likely_as_each_other():
    still = train_transform(image_size=8, pad=2, flip=False)
    assert still.draws == 2
    corners, flips = still.shift_flip(np.array([[0.0, LAST], [0.5, 0.0]]))
    assert corners.tolist() == [[0, 4], [2, 0]] and not flips.any()
    transform = train_transform(image_size=8, pad=2)
    corners, flips = transform.shift_flip(np.random.default_rng(0).random((20_000, 3)))
    assert len(np.unique(corners, axis=0)) == 25 and corners.min() == 0 and corners.max() == 4
    assert np.abs(np.bincount(corners[:, 0] * 5 + corners[:, 1]) / 20_000 - 1 / 25).max() < 0.006
    assert abs(flips.mean() - 0.5) < 0.012
    assert np.abs(np.corrcoef([*corners.T, flips]) - np.eye(3)).max() < 0.03


def moved(images: np.ndarray, corner: Sequence, flips: Sequence, pad: int) -> np.ndarray:
    images = images.copy()
    ShiftFlip(np.asarray(corner, np.int32), np.asarray(flips, bool)).apply(images, pad)
    return images


def test_a_shift_brings_in_black_borders():
    image = np.maximum(noise(4, 4), 1)
    corner = [[1, 1], [0, 0], [2, 1], [1, 2]]
    middle, corners, below, right = moved(np.stack([image] * 4), corner, [False] * 4, pad=1)
    assert np.array_equal(middle, image)
    assert (corners[0] == 0).all() and (corners[:, 0] == 0).all()
    assert np.array_equal(corners[1:, 1:], image[:3, :3])
    assert np.array_equal(below[:3], image[1:]) and (below[3] == 0).all()
    assert np.array_equal(right[:, :3], image[:, 1:]) and (right[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (train_transform, {"image_size": 0}, "image_size=0"),
        (train_transform, {"resize": -1}, "resize=-1"),
        (train_transform, {"resize": 7}, "resize=7 is smaller than the crop image_size=8"),
        (train_transform, {"pad": -2}, "pad=-2"),
        (train_transform, {"pad": 2, "resize": 9}, "pad=2 shifts .* set pad=0"),
        (train_transform, {"pad": 2, "crop": "random_resized_crop"}, "pad=2 shifts .* set pad=0"),
        (train_transform, {"crop": "center"}, "unknown crop 'center'; known: random_crop, random_"),
        (train_transform, {"min_area": 0.0}, "min_area .* got 0.0"),
        (train_transform, {"min_area": 1.1}, "min_area .* got 1.1"),
        (eval_transform, {"image_size": 0}, "image_size=0"),
        (eval_transform, {"resize": 7}, "resize=7 is smaller"),
        (eval_transform, {"ten_crops": True}, "ten crops .* set resize"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make, options, message: str):
    with pytest.raises(ValueError, match=message):
        make(**{"image_size": 8, **options})
