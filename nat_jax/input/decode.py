"""From a record's bytes to RGB pixels, as small as the caller can use them.

Opening a JPEG reads its header only: so a crop can be chosen from its size, and one that is much
larger than what is needed is decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper. Other files
are decoded when they are opened. simplejpeg, where it is installed, and Pillow give the same pixels
and refuse the same files.
"""

import contextlib
import functools
import io
import struct
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import Image

from nat_jax.errors import UserError

try:
    import simplejpeg  # the same pixels as Pillow's from JPEG, in about two thirds of the time
except ImportError:
    simplejpeg = None

SHRINKS = (8, 4, 2, 1)  # what libjpeg scales down by at a gain

Pixels = np.ndarray | Image.Image  # uint8 [H, W, 3], or mode RGB

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # by its value, what makes an image upright
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
            shrink: of `SHRINKS`, no more than the shorter side; a JPEG comes with its sides divided
                by it, rounded up. Other formats come in full size.

        Raises:
            BadImage: the rest of the file is not what the header promised.
        """
        ...


def open_picture(image: bytes | np.ndarray | Image.Image) -> Picture:
    """Read the header of an image.

    Args:
        image: an encoded file; uint8 [H, W] or [H, W, 1|3|4] with values 0..255; or Pillow's.

    Raises:
        BadImage: it is not an image, has no pixels, or more than a file in good faith has
            (twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if isinstance(image, np.ndarray):
        return _Decoded(_from_array(image))
    if isinstance(image, Image.Image):
        with _refusing(b"of Pillow"):
            return _Decoded(_to_rgb(image.copy(), _orientation(image.info.get("exif", b""))))
    if image[:2] == b"\xff\xd8":
        return _open_jpeg(image)
    with _refusing(image):
        opened = Image.open(io.BytesIO(image), formats=_formats())
        opened.load()
        # Only now: Pillow turns TIFF files itself, and a PNG file's tag may come after its pixels.
        return _Decoded(_to_rgb(opened, _orientation(opened.info.get("exif", b""))))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Give the formats that Pillow reads without starting another program, as it does for EPS."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Give an image as RGB, uint8 [H, W, 3].

    Grey, palette, CMYK and 16-bit images are converted, transparency is dropped, the first frame of
    an animation is taken, and a photograph is turned upright as its EXIF tag says.

    Args:
        image: as in `open_picture`.

    Raises:
        BadImage: it cannot be decoded, is cut off, or has no pixels.
    """
    return np.asarray(open_picture(image).pixels())


class _Decoded:
    """An image whose pixels are there."""

    def __init__(self, pixels: Pixels):
        if isinstance(pixels, np.ndarray):
            self.height, self.width = pixels.shape[:2]
        else:
            self.width, self.height = pixels.size
        self._pixels = pixels

    def pixels(self, shrink: int = 1) -> Pixels:
        return self._pixels


class _Jpeg:
    """A JPEG file that simplejpeg reads."""

    def __init__(self, data: bytes, height: int, width: int):
        self.height, self.width = height, width
        self._data = data

    def pixels(self, shrink: int = 1) -> Pixels:
        height, width = -(-self.height // shrink), -(-self.width // shrink)
        try:
            # Of 7 pixels or more, no smaller scale of libjpeg reaches these sides.
            return simplejpeg.decode_jpeg(self._data, "RGB", min_height=height, min_width=width)
        except Exception:  # Pillow reads it after all, or says what is wrong with it
            return _PillowJpeg(self._data).pixels(shrink)


class _PillowJpeg:
    """A JPEG file that Pillow reads."""

    def __init__(self, data: bytes, orientation: int = 1):
        self._data, self._orientation = data, orientation
        with _refusing(data):
            self._opened: Image.Image | None = Image.open(io.BytesIO(data))
        self.width, self.height = self._opened.size
        if orientation >= 5:
            self.width, self.height = self.height, self.width

    def pixels(self, shrink: int = 1) -> Pixels:
        with _refusing(self._data):
            image, self._opened = self._opened or Image.open(io.BytesIO(self._data)), None
            if shrink > 1:
                # It takes the largest scale that leaves these sides.
                image.draft(None, (image.width // shrink, image.height // shrink))
            return _to_rgb(image, self._orientation)


def _open_jpeg(data: bytes) -> Picture:
    orientation = _jpeg_orientation(data)
    if simplejpeg is None or orientation != 1:
        return _PillowJpeg(data, orientation)
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except Exception:  # ValueError, or KeyError on rare subsampling; Pillow has the last word
        return _PillowJpeg(data)
    limit = Image.MAX_IMAGE_PIXELS  # above, Pillow warns or refuses
    if colors in ("Gray", "YCbCr", "RGB") and (limit is None or height * width <= limit):
        return _Jpeg(data, height, width)
    return _PillowJpeg(data)


def _jpeg_orientation(data: bytes) -> int:
    """Give a JPEG file's EXIF orientation; 1, upright, where none can be read.

    Pillow would take as long for it as for a twelfth of a photograph.
    """
    place = 2
    try:
        while data[place] == 0xFF and data[place + 1] != 0xDA:  # the pixels begin
            if data[place + 1] == 0xFF:  # markers may be preceded by any number of these
                place += 1
                continue
            (length,) = struct.unpack_from(">H", data, place + 2)
            if data[place + 1] == 0xE1 and data[place + 4 : place + 10] == b"Exif\0\0":
                return _orientation(data[place + 4 : place + 2 + length])
            place += 2 + length
    except (IndexError, struct.error):
        pass  # Pillow will say what is wrong with it
    return 1


def _orientation(exif: bytes) -> int:
    """Give the orientation; 1, upright, if it cannot be read, as the pixels may still be good."""
    exif = exif.removeprefix(b"Exif\0\0")
    try:
        order = {b"II": "<", b"MM": ">"}[exif[:2]]
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + {3: "H", 4: "I"}[kind], exif, entry + 8)
                return value if value in _TURNS else 1
    except (KeyError, struct.error):
        pass
    return 1


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
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
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
