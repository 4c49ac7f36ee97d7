"""From a record's bytes to uint8 pixels of one size: decode, resize, crop, flip.

A transform maps a stack of images of one shape to another such stack, and takes the randomness it
needs as numbers in [0, 1): `draws` of them for each image. So it runs on a whole batch at once, and
what it does to an image depends on nothing but the image and those numbers.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

try:
    import simplejpeg  # about three times as fast on JPEG as Pillow, with the same pixels
except ImportError:
    simplejpeg = None


class BadImage(ValueError):
    """Bytes or an array that are not an image; the message is the reason."""


class Transform(Protocol):
    """Map images uint8 [B, H, W, 3] and uniform float64 [B, draws] to images uint8 [B, h, w, 3]."""

    @property
    def draws(self) -> int: ...

    def __call__(self, images: np.ndarray, uniform: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Resize:
    """Scale so that the shorter side has `shortest_side` pixels; the aspect ratio stays."""

    shortest_side: int
    draws = 0

    def __call__(self, images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        height, width = images.shape[1:3]
        scale = self.shortest_side / min(height, width)
        new_height = max(self.shortest_side, round(height * scale))
        new_width = max(self.shortest_side, round(width * scale))
        return _resize(images, new_height, new_width)


@dataclasses.dataclass(frozen=True)
class ResizeExact:
    """Scale to a square of `size` pixels whatever the aspect ratio; leave that size untouched."""

    size: int
    draws = 0

    def __call__(self, images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        return _resize(images, self.size, self.size)


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Cut the square of `size` pixels out of the middle."""

    size: int
    draws = 0

    def __call__(self, images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        height, width = _room(images, self.size)
        top, left = height // 2, width // 2
        return images[:, top : top + self.size, left : left + self.size]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Add `pad` black pixels on every side, then cut out a square of `size` anywhere inside."""

    size: int
    pad: int = 0
    draws = 2

    def __call__(self, images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        if self.pad:
            pad = (self.pad, self.pad)
            images = np.pad(images, ((0, 0), pad, pad, (0, 0)))
        room = np.asarray(_room(images, self.size))
        corner = (uniform * (room + 1)).astype(np.int64)  # [B, 2]
        cropped = np.empty((len(images), self.size, self.size, 3), np.uint8)
        for out, image, (top, left) in zip(cropped, images, corner.tolist(), strict=True):
            out[:] = image[top : top + self.size, left : left + self.size]
        return cropped


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirror left and right with probability `p`."""

    p: float = 0.5
    draws = 1

    def __call__(self, images: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        mirrored = uniform[:, 0] < self.p
        flipped = images.copy()
        flipped[mirrored] = images[mirrored, :, ::-1]
        return flipped


def train_transform(
    *, image_size: int, resize: int = 0, pad: int = 0, flip: bool = True, crop: bool = True
) -> tuple[Transform, ...]:
    """Build the transform of training images.

    Args:
        image_size: pixels per side of what comes out.
        resize: scale the shorter side to this many pixels, then crop; 0 scales the whole image to
            `image_size` and leaves images of that size untouched.
        pad: black pixels added on every side before the random crop.
        flip: mirror half of the images.
        crop: cut out at random; otherwise from the middle.

    Returns:
        Transforms in the order they apply.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check_sizes(image_size, resize, pad)
    if pad and not crop:
        raise ValueError(f"pad={pad} only shifts what a random crop cuts out: set crop=True")
    steps: list[Transform] = [Resize(resize) if resize else ResizeExact(image_size)]
    if crop and (resize or pad):
        steps.append(RandomCrop(image_size, pad))
    elif resize:
        steps.append(CenterCrop(image_size))
    if flip:
        steps.append(RandomFlip())
    return tuple(steps)


def eval_transform(*, image_size: int, resize: int = 0) -> tuple[Transform, ...]:
    """Build the transform of evaluation images, which has no randomness.

    Args:
        image_size: pixels per side of what comes out.
        resize: scale the shorter side to this many pixels, then crop the middle; 0 scales the
            whole image to `image_size`.

    Returns:
        Transforms in the order they apply.

    Raises:
        ValueError: the sizes do not fit together.
    """
    _check_sizes(image_size, resize, 0)
    if resize:
        return Resize(resize), CenterCrop(image_size)
    return (ResizeExact(image_size),)


def split(transform: Sequence[Transform]) -> tuple[tuple[Transform, ...], tuple[Transform, ...]]:
    """Divide a transform before its first random step: (deterministic head, tail)."""
    transform = tuple(transform)
    first = next((i for i, t in enumerate(transform) if t.draws), len(transform))
    return transform[:first], transform[first:]


def draws(transform: Sequence[Transform]) -> int:
    """Count the numbers in [0, 1) that each image needs."""
    return sum(t.draws for t in transform)


def output_size(transform: Sequence[Transform]) -> int:
    """Give the pixels per side of what comes out, whatever goes in.

    Raises:
        ValueError: no step fixes the size, so that images could not be stacked into batches.
    """
    sizes = [t.size for t in transform if isinstance(t, ResizeExact | CenterCrop | RandomCrop)]
    if not sizes or isinstance(transform[-1], Resize):
        raise ValueError(
            f"{tuple(transform)} leaves images of different sizes; end with ResizeExact, "
            "CenterCrop or RandomCrop"
        )
    return sizes[-1]


def apply(
    transform: Sequence[Transform], images: np.ndarray, uniform: np.ndarray | None = None
) -> np.ndarray:
    """Run transforms one after the other.

    Args:
        transform: the steps.
        images: uint8 [B, H, W, 3].
        uniform: float64 [B, draws(transform)] in [0, 1); may be left out where that is none.

    Returns:
        uint8 [B, h, w, 3]; may share memory with `images`.

    Raises:
        ValueError: an image is smaller than a crop, or `uniform` has another shape.
    """
    if uniform is None:
        uniform = np.empty((len(images), 0))
    if uniform.shape != (len(images), draws(transform)):
        raise ValueError(
            f"uniform is {list(uniform.shape)}; this transform of {len(images)} images needs "
            f"[{len(images)}, {draws(transform)}]"
        )
    start = 0
    for step in transform:
        images = step(images, uniform[:, start : start + step.draws])
        start += step.draws
    return images


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Give an image as RGB.

    Grey, palette, CMYK and 16-bit images are converted, transparency is dropped, the first frame of
    an animation is taken, and a photograph is turned upright as its EXIF tag says.

    Args:
        image: an encoded file, or uint8 [H, W] or [H, W, 1|3|4] with values 0..255.

    Returns:
        uint8 [H, W, 3].

    Raises:
        BadImage: it cannot be decoded, is cut off, or has no pixels.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if simplejpeg is not None and image[:2] == b"\xff\xd8" and b"Exif\0" not in image:
        try:
            if simplejpeg.decode_jpeg_header(image)[2] != "CMYK":
                return simplejpeg.decode_jpeg(image, colorspace="RGB")
        except ValueError:
            pass  # Pillow below says what is wrong with it
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return _from_pillow(opened)
    except BadImage:
        raise
    except Exception as error:
        # Pillow's readers raise OSError, SyntaxError, struct.error and more on damaged files.
        raise BadImage(_reason(image, error)) from error


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format that Pillow cannot read"
    return f"cannot be decoded: {error}"


def _from_array(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3):
        raise BadImage(f"expected uint8 [H, W] or [H, W, C], got {image.dtype}{list(image.shape)}")
    if image.size == 0:
        raise BadImage(f"no pixels: {list(image.shape)}")
    if image.ndim == 2:
        image = image[:, :, None]
    channels = image.shape[2]
    if channels == 1:
        return np.repeat(image, 3, axis=2)
    if channels not in (3, 4):
        raise BadImage(f"expected 1, 3 or 4 channels, got {list(image.shape)}")
    return image[:, :, :3]


def _from_pillow(image: Image.Image) -> np.ndarray:
    if 0 in image.size:
        raise BadImage(f"no pixels: {image.size[1]} x {image.size[0]}")
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; store 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits to 0..255 rather than scale them.
        grey = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        return _from_array(grey)
    return np.asarray(image.convert("RGB"))


def _resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale with the triangle filter, widened when shrinking so that nothing aliases."""
    if images.shape[1:3] == (height, width):
        return images
    bilinear = Image.Resampling.BILINEAR
    resized = [Image.fromarray(i).resize((width, height), bilinear) for i in images]
    return np.stack([np.asarray(i) for i in resized])


def _room(images: np.ndarray, size: int) -> tuple[int, int]:
    """Give by how much images exceed a crop, in height and width."""
    height, width = images.shape[1:3]
    if min(height, width) < size:
        raise ValueError(
            f"images of {height} x {width} pixels are smaller than the crop of {size} x {size}; "
            "set resize or pad"
        )
    return height - size, width - size


def _check_sizes(image_size: int, resize: int, pad: int) -> None:
    if image_size < 1 or resize < 0 or pad < 0:
        raise ValueError(
            f"sizes in pixels cannot be negative or 0: image_size={image_size}, "
            f"resize={resize} (0: off), pad={pad}"
        )
    if resize and resize < image_size:
        raise ValueError(f"resize={resize} is smaller than the crop image_size={image_size}")
