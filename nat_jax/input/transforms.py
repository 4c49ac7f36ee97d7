"""Image transforms: crop, scale, shift and flip to uint8 squares of one size.

A transform has two halves. Its crop chooses regions of a picture by the picture's size, which are
decoded and scaled to squares; a shift and a flip then change a stack of squares, on the host or on
a device (`nat_jax.input.device_images`). Random colour jitter (`nat_jax.input.color_jitter`) comes
last, on the host. Randomness is passed in as uniform numbers, `draws` of them for each image, so
output depends on the image and those numbers alone.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from nat_jax.errors import InputError
from nat_jax.input.color_jitter import ColorJitter
from nat_jax.input.decode import SHRINKS, Picture, Pixels

CROPS = ("random_crop", "random_resized_crop")
_PIXEL = np.dtype("V3")  # reversed faster than three bytes
_TRIES = 10  # of a random resized crop to find a region inside the picture


class Region(NamedTuple):
    """A rectangle of a picture at full size, in pixels; may lie between pixels."""

    top: float
    left: float
    height: float
    width: float


class Crop(Protocol):
    """Chooses the regions of a picture that are scaled to squares.

    Attributes:
        size: pixels per side of a square.
        draws: random numbers in [0, 1) that it needs; without any it is deterministic.
        count: number of regions.
    """

    @property
    def size(self) -> int: ...

    @property
    def draws(self) -> int: ...

    @property
    def count(self) -> int: ...

    def regions(self, height: int, width: int, uniform: Sequence[float]) -> list[Region]: ...


@dataclasses.dataclass(frozen=True)
class WholeImage:
    """The complete image, ignoring its aspect ratio; one of `size` pixels is unchanged."""

    size: int
    draws = 0
    count = 1

    def regions(self, height: int, width: int, uniform: Sequence[float]) -> list[Region]:
        return [Region(0, 0, height, width)]


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """The middle square of `size` pixels after scaling the shorter side to `resize` pixels."""

    size: int
    resize: int
    draws = 0
    count = 1

    def regions(self, height: int, width: int, uniform: Sequence[float]) -> list[Region]:
        scaled = _Scaled(height, width, self.resize)
        room = scaled.room(self.size)
        return [scaled.region(room[0] // 2, room[1] // 2, self.size)]


@dataclasses.dataclass(frozen=True)
class FiveCrop:
    """The middle and the four corners, after scaling the shorter side to `resize` pixels.

    In the order top left, top right, bottom left, bottom right, middle. With their mirror images
    they are the ten crops of Krizhevsky et al. (2012), section 4.1.
    """

    size: int
    resize: int
    draws = 0
    count = 5

    def regions(self, height: int, width: int, uniform: Sequence[float]) -> list[Region]:
        scaled = _Scaled(height, width, self.resize)
        down, right = scaled.room(self.size)
        corners = [(0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)]
        return [scaled.region(top, left, self.size) for top, left in corners]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """A square of `size` pixels anywhere, after scaling the shorter side to `resize` pixels."""

    size: int
    resize: int
    draws = 2
    count = 1

    def regions(self, height: int, width: int, uniform: Sequence[float]) -> list[Region]:
        scaled = _Scaled(height, width, self.resize)
        down, right = scaled.room(self.size)
        top, left = int(uniform[0] * (down + 1)), int(uniform[1] * (right + 1))
        return [scaled.region(top, left, self.size)]


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A region of random area and aspect ratio (Szegedy et al., Going deeper, 2015, section 6).

    Its share of the picture's area is uniform in [min_area, 1], the logarithm of its aspect ratio
    uniform between those of 3/4 and 4/3. Where none of ten such regions fits into the picture, it
    is the largest in the middle whose aspect ratio lies in those bounds.
    """

    size: int
    min_area: float = 0.08
    draws = 2 * _TRIES + 2
    count = 1

    def regions(self, height: int, width: int, uniform: Sequence[float]) -> list[Region]:
        longest = math.log(4 / 3)
        for i in range(_TRIES):
            area = height * width * (self.min_area + (1 - self.min_area) * uniform[2 * i])
            aspect = math.exp(longest * (2 * uniform[2 * i + 1] - 1))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(uniform[-2] * (height - h + 1))
                left = int(uniform[-1] * (width - w + 1))
                return [Region(top, left, h, w)]
        h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        return [Region((height - h) // 2, (width - w) // 2, h, w)]


class ShiftFlip(NamedTuple):
    """The random shift and flip of a stack of squares.

    Attributes:
        corner: int32 [b, 2], top and left of the part that is kept of an image with a black border
            of `Transform.pad` pixels.
        mirrored: bool [b], whether left and right are swapped.
    """

    corner: np.ndarray
    mirrored: np.ndarray

    def apply(self, images: np.ndarray, pad: int) -> None:
        """Shift and then flip images, uint8 [b, size, size, 3], in place."""
        if pad:
            size, border = images.shape[1], (pad, pad)
            padded = np.pad(images, ((0, 0), border, border, (0, 0)))
            for out, image, (top, left) in zip(images, padded, self.corner.tolist(), strict=True):
                out[:] = image[top : top + size, left : left + size]
        if self.mirrored.any():
            images[self.mirrored] = mirrored(images[self.mirrored])


@dataclasses.dataclass(frozen=True)
class Transform:
    """All that happens to a picture.

    Attributes:
        crop: the regions that are cut out, and the size of the output.
        pad: shift by up to this many pixels in each direction; black pixels fill the gap.
        flip: mirror half of the images.
        both_ways: append the mirror images of all crops.
        colors: random colour jitter, if any.
        white: the value that is white in images of more than 8 bits, see `decode.open_picture`.
    """

    crop: Crop
    pad: int = 0
    flip: bool = False
    both_ways: bool = False
    colors: ColorJitter | None = None
    white: int = 0

    @property
    def size(self) -> int:
        """Pixels per side of the output."""
        return self.crop.size

    @property
    def count(self) -> int:
        """Images made of each picture."""
        return self.crop.count * (2 if self.both_ways else 1)

    @property
    def draws(self) -> int:
        """Random numbers for each image, those of crop, shift (2), flip (1) and color jitter."""
        return self._flip_draw + self.flip + (self.colors.draws if self.colors else 0)

    @property
    def _flip_draw(self) -> int:
        return self.crop.draws + (2 if self.pad else 0)

    def shift_flip(self, uniform: np.ndarray) -> ShiftFlip:
        """Choose shifts and flips by float64 [b, draws] in [0, 1)."""
        corner = np.zeros((len(uniform), 2), np.int32)
        if self.pad:
            drawn = uniform[:, self.crop.draws : self.crop.draws + 2]
            corner = (drawn * (2 * self.pad + 1)).astype(np.int32)
        flips = uniform[:, self._flip_draw] < 0.5 if self.flip else np.zeros(len(uniform), bool)
        return ShiftFlip(corner, flips)


def train_transform(
    *,
    image_size: int,
    resize: int = 0,
    pad: int = 0,
    flip: bool = True,
    crop: str = "random_crop",
    min_area: float = 0.08,
    colors: ColorJitter | None = None,
    white: int = 0,
) -> Transform:
    """Build the transform of training images.

    Args:
        image_size: pixels per side of the output.
        resize: for "random_crop", scale the shorter side to this many pixels, then crop; 0 scales
            the complete image to `image_size`, and images of that size are unchanged.
        pad: shift images by up to this many pixels; needs the complete image, so resize = 0.
        flip: mirror half of the images.
        crop: "random_crop", or "random_resized_crop" (Inception's), which uses neither `resize`
            nor `pad`.
        min_area: smallest fraction of the area for "random_resized_crop".
        colors: random colour jitter; None for none.
        white: see `Transform`.

    Raises:
        ValueError: the settings do not fit together.
    """
    _check_sizes(image_size, resize, pad)
    if crop not in CROPS:
        raise InputError(f"unknown crop {crop!r}; known: {', '.join(CROPS)}")
    if not 0 < min_area <= 1:
        raise InputError(f"min_area is a share of the area, in (0, 1], got {min_area}")
    if pad and (resize or crop == "random_resized_crop"):
        raise InputError(
            f"pad={pad} shifts images that are scaled as a whole, but resize={resize} and "
            f"crop={crop!r} cut out a part already: set pad=0"
        )
    chosen: Crop = WholeImage(image_size)
    if crop == "random_resized_crop":
        chosen = RandomResizedCrop(image_size, min_area)
    elif resize:
        chosen = RandomCrop(image_size, resize)
    return Transform(chosen, pad=pad, flip=flip, colors=colors, white=white)


def eval_transform(
    *, image_size: int, resize: int = 0, ten_crops: bool = False, white: int = 0
) -> Transform:
    """Build the transform of evaluation images, which has no randomness.

    Args:
        image_size: pixels per side of the output.
        resize: scale the shorter side to this many pixels, then crop the middle; 0 scales the
            complete image to `image_size`.
        ten_crops: corners and middle, then their mirror images: ten images of each picture.
        white: see `Transform`.

    Raises:
        ValueError: the settings do not fit together.
    """
    _check_sizes(image_size, resize, 0)
    if ten_crops:
        if not resize:
            raise InputError("ten crops are cut out of a larger image: set resize")
        return Transform(FiveCrop(image_size, resize), both_ways=True, white=white)
    crop: Crop = CenterCrop(image_size, resize) if resize else WholeImage(image_size)
    return Transform(crop, white=white)


def decode_and_crop(
    picture: Picture, transform: Transform, uniforms: Sequence[Sequence[float]], out: np.ndarray
) -> None:
    """Decode a picture once, and crop and scale it once for each view.

    The result is that of scaling the complete picture by Pillow's triangle filter, to within 2
    levels of 255, which are rounding. A JPEG of which every region has at least 2, 4 or 8 times
    `size` pixels a side is decoded at that fraction. Over 700 photographs and crops of 32 to 128
    pixels this changed pixels by 1.4 levels on average, images by at most 6, and single pixels by
    at most 52.

    Args:
        picture: a picture whose header has been read.
        transform: the crop, and whether mirror images follow.
        uniforms: for each view the crop's random numbers in [0, 1).
        out: uint8 [views * transform.count, size, size, 3], written to.

    Raises:
        BadImage: the picture cannot be decoded.
    """
    crop, size = transform.crop, transform.size
    shape = picture.height, picture.width
    views = out.reshape(len(uniforms), transform.count, size, size, 3)
    squares = [
        (square, region)
        for view, uniform in zip(views[:, : crop.count], uniforms, strict=True)
        for square, region in zip(view, crop.regions(*shape, uniform), strict=True)
    ]
    if all(_keeps_pixels(region, size) for _, region in squares):
        pixels = np.asarray(picture.pixels())
        for square, (top, left, _, _) in squares:
            square[:] = pixels[int(top) : int(top) + size, int(left) : int(left) + size]
    else:
        shortest = min(min(region.height, region.width) for _, region in squares)
        shrink = next((s for s in SHRINKS if shortest >= s * size), 1)
        image = _as_image(picture.pixels(shrink))
        if (image.height, image.width) == shape:
            shrink = 1  # only JPEG files shrink
        for square, region in squares:
            square[:] = _scale(image, Region(*(side / shrink for side in region)), size)
    if transform.both_ways:
        views[:, crop.count :] = mirrored(views[:, : crop.count])


def mirrored(images: np.ndarray) -> np.ndarray:
    """Return uint8 [..., H, W, 3] with left and right swapped."""
    return np.ascontiguousarray(images.view(_PIXEL)[..., ::-1, :]).view(np.uint8)


@functools.lru_cache(maxsize=4096)  # most data sets have few sizes
class _Scaled:
    """A picture whose shorter side is scaled to `shortest` pixels; the aspect ratio stays."""

    def __init__(self, height: int, width: int, shortest: int):
        self._height = round(height * shortest / min(height, width))
        self._width = round(width * shortest / min(height, width))
        self._down, self._right = height / self._height, width / self._width

    def room(self, size: int) -> tuple[int, int]:
        """Return by how much it exceeds a square, in height and width."""
        return self._height - size, self._width - size

    def region(self, top: int, left: int, size: int) -> Region:
        """Return the part of the unscaled picture that becomes a square."""
        down, right = self._down, self._right
        return Region(top * down, left * right, size * down, size * right)


def _keeps_pixels(region: Region, size: int) -> bool:
    top, left, height, width = region
    return height == width == size and top == int(top) and left == int(left)


def _as_image(pixels: Pixels) -> Image.Image:
    # A function, so that an array is freed before the scaling: its memory is then used again
    # rather than requested from the system for each picture, a quarter of a main thread's time.
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def _scale(image: Image.Image, region: Region, size: int) -> np.ndarray:
    """Crop a region and scale it with the triangle filter, widened when shrinking."""
    top, left, height, width = region
    # A region's end may be past the image's by a rounding error.
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _check_sizes(image_size: int, resize: int, pad: int) -> None:
    if image_size < 1 or resize < 0 or pad < 0:
        raise InputError(
            f"sizes in pixels cannot be negative or 0: image_size={image_size}, "
            f"resize={resize} (0: off), pad={pad}"
        )
    if resize and resize < image_size:
        raise InputError(f"resize={resize} is smaller than the crop image_size={image_size}")
