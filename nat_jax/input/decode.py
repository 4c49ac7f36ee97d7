"""Decode images to RGB pixels, JPEG files at a fraction of their size where that suffices.

Opening a JPEG file reads its header only, so that a crop can be chosen from its size, and a crop
much larger than its output is decoded at 1/2, 1/4 or 1/8 of its size, which is cheaper. Other
formats are decoded when they are opened. simplejpeg, if installed, and Pillow return the same
pixels and refuse the same files.
"""

import contextlib
import functools
import io
import math
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageFile

from nat_jax.errors import UserError
from nat_jax.input.file_kinds import kind_of

try:
    import simplejpeg  # the same pixels as Pillow's in about two thirds of the time
except ImportError:
    simplejpeg = None

SHRINKS = (8, 4, 2, 1)  # fractions of their size at which libjpeg decodes faster
DEEP_WHITE = 65535  # the value that is white in an image of 16 bits, unless another one is given

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


# Chunks of a PNG file that hold texts and a colour profile, compressed or not.
_PNG_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))
# By Pillow's name of how 16 bits are stored, of which it keeps the upper 8, that of the lower 8.
_LOWER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in ("BL", "LB", "NB" if sys.byteorder == "little" else "NL")
}


def open_picture(image: bytes | np.ndarray | Image.Image, white: int = 0) -> Picture:
    """Read the header of an image.

    Args:
        image: an encoded file; uint8 [H, W] or [H, W, 1|3|4] with values 0..255; or Pillow's.
        white: the value that is white in a PNG, TIFF or PNM file of more than 8 bits, which larger
            values become too; 0: `DEEP_WHITE`. A PNM file that states another largest value, and
            images of 8 bits, are not affected.

    Raises:
        BadImage: it is not an image, has no pixels, or more than twice `PIL.Image.MAX_IMAGE_PIXELS`
            (a decompression bomb).
    """
    if isinstance(image, np.ndarray):
        return _Decoded(_from_array(image))
    if isinstance(image, Image.Image):
        with _refusing(b"of Pillow"):
            orientation = _orientation(image.info.get("exif", b""))
            if white and image.mode.startswith("I") and image.format in (None, "PNG", "TIFF"):
                image = _scaled(np.asarray(image, np.int64), white)
            return _Decoded(_to_rgb(image.copy(), orientation))
    if image[:2] == b"\xff\xd8":
        return _Jpeg(image)
    with _refusing(image):
        opened = open_file(image)
        deep = deep_values(image, opened) if white else None
        # Only then: Pillow turns TIFF files itself, and a PNG file's tag may follow its pixels.
        opened.load()
        orientation = _orientation(opened.info.get("exif", b""))
        if deep is not None:
            return _Decoded(_to_rgb(_scaled(deep, white), orientation))
        return _Decoded(_to_rgb(opened, orientation))


def _scaled(values: np.ndarray, white: int) -> Image.Image:
    """Return int64 values scaled from 0..white to 8 bits; larger ones are white."""
    return Image.fromarray(np.clip((values * 255 + white // 2) // white, 0, 255).astype(np.uint8))


def open_file(data: bytes) -> ImageFile.ImageFile:
    """Read the header of a file by Pillow, which raises exceptions of many kinds."""
    if data[:4] == b"\x89PNG":
        data = _without_texts(data)
    return Image.open(io.BytesIO(data), formats=_formats())


def _without_texts(png: bytes) -> bytes:
    """Return a PNG file without its texts and colour profile.

    Pillow refuses images with larger ones than it wants to inflate; they do not change pixels.
    """
    parts, start, place = [], 0, 8
    while place < len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] in _PNG_TEXTS:
            parts.append(png[start:place])
            start = end
        place = end
    return b"".join([*parts, png[start:]]) if start else png


def deep_values(data: bytes, opened: ImageFile.ImageFile | None = None) -> np.ndarray | None:
    """Return the values of a PNG, TIFF or PNM file of more than 8 bits as they are stored.

    Args:
        data: the file.
        opened: what Pillow made of it, before its pixels are loaded.

    Returns:
        int64 [H, W] or [H, W, 3]; None for images of 8 bits, and of other formats.

    Raises:
        BadImage: it cannot be decoded, or its values cannot be read in full.
    """
    with _refusing(data):
        opened = opened or open_file(data)
        tile = opened.tile[0] if opened.format in ("PNG", "TIFF", "PPM") and opened.tile else None
        if tile is None:
            return None
        stored, *rest = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if tile.codec_name.startswith("ppm"):
            if rest != [DEEP_WHITE]:
                return None  # Pillow scales it by the largest value that it states
            if opened.mode == "RGB":
                shape = (opened.height, opened.width, 3)
                values = np.frombuffer(data, ">u2", math.prod(shape), tile.offset)
                return values.reshape(shape).astype(np.int64)
        if opened.mode.startswith("I"):
            return np.asarray(opened, np.int64)
        if ";16" not in str(stored):
            return None
        if stored not in _LOWER_BYTES:
            raise BadImage(
                f"pixels of 16 bits of the kind {stored}, to which data.white cannot be applied; "
                "store them as grey or RGB"
            )
        lower = open_file(data)
        lower.tile = [part._replace(args=_of_lower_bytes(part.args)) for part in lower.tile]
        upper, below = (np.asarray(image, np.int64)[..., :3] for image in (opened, lower))
        return upper << 8 | below


def _of_lower_bytes(args: Any) -> Any:
    """Return the arguments of Pillow's decoder that take the lower 8 of 16 bits."""
    return (_LOWER_BYTES[args[0]], *args[1:]) if isinstance(args, tuple) else _LOWER_BYTES[args]


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
        return f"not an image, or of a format that Pillow cannot read: it is {kind_of(data)}"
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
