"""Decode images to RGB pixels, JPEG files at a fraction of their size where that suffices.

Opening a JPEG file reads its header only, so that a crop can be chosen from its size, and a crop
much larger than its output is decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper. Other
formats are decoded when they are opened. simplejpeg, if installed, and Pillow return the same
pixels and refuse the same files.
"""

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image

from nat_jax.errors import UserError

try:
    import simplejpeg  # the same pixels as Pillow's in about two thirds of the time
except ImportError:
    simplejpeg = None

SHRINKS = (8, 4, 2, 1)  # fractions of their size at which libjpeg decodes faster

Pixels = np.ndarray | Image.Image  # uint8 [H, W, 3], or mode RGB

_UPRIGHT = {  # by EXIF orientation; `ImageOps.exif_transpose` would also follow XMP
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError, ValueError):
    """Bytes or an array that are not an image; the message is the reason."""


class Picture(Protocol):
    """An image whose header has been read: its size in pixels, upright."""

    @property
    def height(self) -> int: ...

    @property
    def width(self) -> int: ...

    def pixels(self, shrink: int = 1) -> Pixels:
        """Decode.

        Args:
            shrink: of `SHRINKS`, no more than the shorter side. The sides of a JPEG are divided by
                it and rounded up; other formats are returned in full size.

        Raises:
            BadImage: the rest of the file does not match its header.
        """
        ...


def open_picture(image: bytes | np.ndarray | Image.Image) -> Picture:
    """Read the header of an image.

    Args:
        image: an encoded file; uint8 [H, W] or [H, W, 1|3|4] with values 0..255; or Pillow's.

    Raises:
        BadImage: it is not an image, has no pixels, or more than twice `PIL.Image.MAX_IMAGE_PIXELS`
            (a decompression bomb).
    """
    if isinstance(image, np.ndarray):
        return _Decoded(_from_array(image))
    if isinstance(image, Image.Image):
        with _refusing(b"of Pillow"):
            return _Decoded(_to_rgb(image.copy(), _orientation(image.info.get("exif", b""))))
    if image[:2] == b"\xff\xd8":
        return _Jpeg(image)
    with _refusing(image):
        opened = Image.open(io.BytesIO(image), formats=_formats())
        # Only then: Pillow turns TIFF files itself, and a PNG file's tag may follow its pixels.
        opened.load()
        return _Decoded(_to_rgb(opened, _orientation(opened.info.get("exif", b""))))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return the formats that Pillow reads without starting another program, as EPS needs."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Return an image as RGB, uint8 [H, W, 3].

    Greyscale, palette, CMYK and 16-bit images are converted, transparency is dropped, the first
    frame of an animation is taken, and photographs are turned upright by their EXIF orientation.

    Args:
        image: as in `open_picture`.

    Raises:
        BadImage: it cannot be decoded, is truncated, or has no pixels.
    """
    return np.asarray(open_picture(image).pixels())


class _Decoded:
    """An image that is decoded already."""

    def __init__(self, pixels: Pixels):
        if isinstance(pixels, np.ndarray):
            self.height, self.width = pixels.shape[:2]
        else:
            self.width, self.height = pixels.size
        self._pixels = pixels

    def pixels(self, shrink: int = 1) -> Pixels:
        return self._pixels


class _Jpeg:
    """A JPEG file, of which simplejpeg decodes what it can, and Pillow the rest."""

    def __init__(self, data: bytes):
        self._data = data
        self._orientation = _orientation(_exif(data))
        self._opened: Image.Image | None = None
        self._fast = simplejpeg is not None and self._orientation == 1 and self._read_header()
        if not self._fast:
            with _refusing(data):
                self._opened = Image.open(io.BytesIO(data))
            self.width, self.height = self._opened.size
            if self._orientation >= 5:
                self.width, self.height = self.height, self.width

    def _read_header(self) -> bool:
        """Read the size by simplejpeg; return whether it can decode the file as Pillow does."""
        try:
            self.height, self.width, colors, _ = simplejpeg.decode_jpeg_header(self._data)
        except Exception:  # ValueError, or KeyError on rare subsampling; Pillow decides
            return False
        limit = Image.MAX_IMAGE_PIXELS  # above, Pillow warns or refuses
        small = limit is None or self.height * self.width <= limit
        return small and colors in ("Gray", "YCbCr", "RGB")

    def pixels(self, shrink: int = 1) -> Pixels:
        if self._fast:
            height, width = -(-self.height // shrink), -(-self.width // shrink)
            # From 7 pixels on, no smaller scale of libjpeg reaches these sides.
            with contextlib.suppress(Exception):  # Pillow decodes it, or raises with the reason
                return simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        with _refusing(self._data):
            image, self._opened = self._opened or Image.open(io.BytesIO(self._data)), None
            if shrink > 1:
                # It takes the largest scale that leaves these sides.
                image.draft(None, (image.width // shrink, image.height // shrink))
            return _to_rgb(image, self._orientation)


def _exif(data: bytes) -> bytes:
    """Return the EXIF segment of a JPEG file; Pillow would take a tenth of the decoding."""
    place = 2
    with contextlib.suppress(IndexError):  # a truncated file, which the decoder reports
        while data[place] == 0xFF and data[place + 1] != 0xDA:  # the pixels begin
            if data[place + 1] == 0xFF:  # a fill byte before a marker
                place += 1
                continue
            end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
            if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
                return data[place + 4 : end]
            place = end
    return b""


def _orientation(exif: bytes) -> int:
    """Return the EXIF orientation, 1 (upright) if there is none or it cannot be read."""
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        value = tags.get(ExifTags.Base.Orientation)
    except Exception:  # the pixels may be good all the same
        value = None
    return value if value in _UPRIGHT else 1


@contextlib.contextmanager
def _refusing(data: bytes) -> Iterator[None]:
    """Turn all that Pillow's readers raise on damaged files into BadImage."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # OSError, SyntaxError, struct.error and more
        raise BadImage(_reason(data, error)) from error


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


def _to_rgb(image: Image.Image, orientation: int) -> Pixels:
    image.load()
    if orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; store 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow would clip 16 bits to 0..255 rather than scale them.
        grey: Any = np.clip(np.asarray(image, np.int64) >> 8, 0, 255).astype(np.uint8)
        return _from_array(grey)
    image.info.pop("transparency", None)  # Pillow would warn of losing it
    return image.convert("RGB")
