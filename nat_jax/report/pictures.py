"""Pictures as PNG files: first-layer filters, and nearest neighbours of query images."""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Legible on white and on black: the pictures are transparent around the tiles.
_TEXT = (128, 134, 142, 255)
_RIGHT, _WRONG = (46, 160, 103, 255), (214, 84, 84, 255)
_MOST_FILTERS = 256
# For screens of two pixels per point: a page shows the pictures at half their size.
_TILE, _PHOTO, _FONT, _TOP, _WIDEST = 88, 128, 28, 56, 2060


def filters(kernel: np.ndarray, title: str = "First-layer filters") -> bytes:
    """Draw the filters of a convolution as a PNG.

    With three input channels a filter is one colour tile, otherwise one grey tile per channel (for
    a Sobel front end: horizontal and vertical gradient). Every filter is scaled by its largest
    absolute value, zero being mid-grey. Only the first 256 filters are drawn.

    Args:
        kernel: float[kh, kw, Cin, Cout].
        title: drawn above them.

    Raises:
        ValueError: wrong rank, or values that are not finite.
    """
    kernel = np.asarray(kernel, np.float32)
    if kernel.ndim != 4 or not kernel.size:
        raise ValueError(f"filters: expected a kernel [kh, kw, Cin, Cout], got {kernel.shape}")
    if not np.isfinite(kernel).all():
        raise ValueError("filters: expected finite values, got NaN or infinity")
    height, width, channels, total = kernel.shape
    count = min(total, _MOST_FILTERS)
    peak = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True)
    grey = np.round(127.5 + 127.5 * kernel / np.where(peak > 0, peak, 1)).astype(np.uint8)
    planes = 1 if channels == 3 else channels
    zoom = max(1, round(_TILE / max(height, width)))
    tile = (width * zoom, height * zoom)
    inner, outer = 4, 20
    cell = (planes * (tile[0] + inner) - inner + outer, tile[1] + outer)
    columns = max(
        1, min(count, _WIDEST // cell[0], math.ceil(1.8 * math.sqrt(count * cell[1] / cell[0])))
    )
    text = f"{title}: {count}{f' of {total}' if total > count else ''}, {width} x {height} pixels"
    text += "" if channels == 3 else f", {channels} input channel{'s' * (channels > 1)}"
    canvas, top = _canvas(
        text, columns * cell[0] - outer, math.ceil(count / columns) * cell[1] - outer
    )
    for number in range(count):
        left, upper = number % columns * cell[0], top + number // columns * cell[1]
        one = grey[:, :, :, number]
        for plane in range(planes):
            image = Image.fromarray(one if channels == 3 else one[:, :, plane])
            image = image.resize(tile, Image.Resampling.NEAREST)
            canvas.paste(image.convert("RGBA"), (left + plane * (tile[0] + inner), upper))
    return _png(canvas)


def stacked(pictures: Sequence[bytes]) -> bytes:
    """Join PNG files vertically into one.

    Raises:
        ValueError: no pictures.
    """
    if not pictures:
        raise ValueError("stacked: expected at least one picture, got none")
    images = [Image.open(io.BytesIO(data)) for data in pictures]
    gap = _FONT
    height = sum(image.height + gap for image in images) - gap
    canvas = Image.new("RGBA", (max(image.width for image in images), height), (0, 0, 0, 0))
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height + gap
    return _png(canvas)


def neighbours(
    queries: np.ndarray, neighbours: np.ndarray, correct: np.ndarray | None = None
) -> bytes:
    """Draw query images on the left and their neighbours, nearest first, on the right, as a PNG.

    Args:
        queries: uint8[Q, H, W, 3].
        neighbours: uint8[Q, K, H, W, 3].
        correct: bool[Q, K], whether the labels agree (green or red frame); None draws no frames.

    Raises:
        ValueError: shapes do not match.
    """
    count, near = neighbours.shape[:2]
    if neighbours.ndim != 5 or queries.shape != (count, *neighbours.shape[2:]) or not count * near:
        raise ValueError(
            "neighbours: expected queries [Q, H, W, 3] and neighbours [Q, K, H, W, 3], got "
            f"{queries.shape} and {neighbours.shape}"
        )
    if correct is not None and correct.shape != (count, near):
        raise ValueError(f"correct: expected shape {(count, near)}, got {correct.shape}")
    longest = max(queries.shape[1:3])
    # Small images are enlarged by an integer factor, which keeps their pixels square.
    side = longest * round(_PHOTO / longest) if longest < _PHOTO else _PHOTO
    frame, gap, divide = 7, 9, 40
    cell = side + 2 * frame + gap
    text = "Query, and the nearest training images, most similar first"
    if correct is not None:
        text += f"; {int(np.sum(correct))} of {correct.size} share the query's label (green)"
    canvas, top = _canvas(text, (near + 1) * cell + divide - gap, count * cell - gap)
    draw = ImageDraw.Draw(canvas)
    for row in range(count):
        upper = top + row * cell
        canvas.paste(_thumbnail(queries[row], side), (frame, upper + frame))
        for column in range(near):
            left = (column + 1) * cell + divide
            if correct is not None:
                color = _RIGHT if correct[row, column] else _WRONG
                box = (left, upper, left + side + 2 * frame - 1, upper + side + 2 * frame - 1)
                draw.rounded_rectangle(box, radius=5, fill=color)
            canvas.paste(_thumbnail(neighbours[row, column], side), (left + frame, upper + frame))
    return _png(canvas)


def _canvas(text: str, width: int, height: int) -> tuple[Image.Image, int]:
    """Return a transparent image with a line of text on top, and the y of the first tiles."""
    font = ImageFont.load_default(_FONT)
    right = math.ceil(font.getbbox(text)[2])
    canvas = Image.new("RGBA", (max(width, right), _TOP + height), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((0, 4), text, font=font, fill=_TEXT)
    return canvas, _TOP


def _thumbnail(image: np.ndarray, side: int) -> Image.Image:
    """Return a square RGBA image; small ones keep their sharp pixels."""
    picture = Image.fromarray(np.asarray(image, np.uint8)).convert("RGBA")
    small = max(picture.size) <= side
    scale = side / max(picture.size)
    size = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
    method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    square = Image.new("RGBA", (side, side), (128, 128, 128, 255))
    square.paste(picture.resize(size, method), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
