"""Decoding: every format against the pixels that were encoded, both readers alike, faults."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pictures import encode, noise, read_jpeg_with, smooth
from PIL import Image

from nat_jax.input import decode as module
from nat_jax.input.decode import SHRINKS, BadImage, decode, deep_values, open_picture


@pytest.fixture
def both(monkeypatch):
    """Return a function that calls another with simplejpeg, then with Pillow."""
    read_jpeg_with("simplejpeg", monkeypatch)

    def call(function, *args):
        fast = function(*args)
        with monkeypatch.context() as patch:
            patch.setattr(module, "simplejpeg", None)
            return fast, function(*args)

    return call


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum


def png(width: int, height: int, *, depth: int = 8, colours: int = 2, rows: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


def png_of(values: np.ndarray, colours: int) -> bytes:
    """Write uint16 [H, W, C], which Pillow cannot."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, depth=16, colours=colours, rows=rows)


def tiff_of(values: np.ndarray) -> bytes:
    """Write uint16 [H, W, 3], which Pillow cannot."""
    height, width, _ = values.shape
    entries = {256: width, 257: height, 258: 16, 259: 1, 262: 2, 273: 200, 277: 3, 278: height}
    entries[279] = values.nbytes
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    tags = tags.replace(struct.pack("<HHII", 258, 4, 1, 16), struct.pack("<HHII", 258, 3, 3, 180))
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)
    return (
        head.ljust(180, b"\0")
        + struct.pack("<3H", 16, 16, 16).ljust(20, b"\0")
        + (values.astype("<u2").tobytes())
    )


def all_sizes(data: bytes) -> list[np.ndarray]:
    return [np.asarray(open_picture(data).pixels(shrink)) for shrink in SHRINKS]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA"])
def test_lossless_formats_give_back_their_pixels(kind: str):
    image = noise(5, 7)
    decoded = decode(encode(image, kind))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, image)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_give_back_about_their_pixels(kind: str, jpeg_reader: str):
    image = smooth(32, 48)
    decoded = decode(encode(image, kind)).astype(int)
    assert np.abs(decoded - image).mean() < 10
    assert np.abs(decoded - image[:, ::-1]).mean() > 20


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind: str, jpeg_reader: str):
    grey = smooth(16, 16)[:, :, 0]
    decoded = decode(encode(grey, kind))
    assert decoded.shape == (16, 16, 3)
    assert (decoded == decoded[:, :, :1]).all()
    assert np.abs(decoded[:, :, 0].astype(int) - grey).max() < 12


def test_palettes_and_single_bits_become_rgb():
    palette = Image.fromarray(noise(6, 6)).quantize(16)
    assert np.array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(np.eye(6, dtype=bool))
    assert np.array_equal(decode(encode(bits, "PNG")), np.repeat(np.eye(6)[:, :, None] * 255, 3, 2))


def test_transparency_is_dropped_without_a_warning():
    image = noise(6, 6)
    clear = np.arange(36, dtype=np.uint8).reshape(6, 6, 1)
    assert np.array_equal(decode(encode(np.dstack([image, clear]), "PNG")), image)
    grey = image[:, :, :1]
    decoded = decode(encode(np.dstack([grey, clear]), "PNG"))
    assert np.array_equal(decoded, np.repeat(grey, 3, 2))
    palette = Image.fromarray(image).quantize(16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transparency in (3, bytes(range(16))):  # one colour of the palette, or each its own
            file = encode(palette, "PNG", transparency=transparency)
            assert np.array_equal(decode(file), np.asarray(palette.convert("RGB")))
        one_colour = encode(image, "PNG", transparency=tuple(image[0, 0].tolist()))
        assert np.array_equal(decode(one_colour), image)


@pytest.mark.parametrize("kind", ["CMYK", "YCCK", "RGB"])
def test_jpeg_of_other_colours_becomes_rgb(kind: str, jpeg_reader: str):
    colour, options = (200, 60, 30), {"quality": 100, "subsampling": 0}
    if kind == "RGB":
        file = encode(np.full((16, 16, 3), colour, np.uint8), "JPEG", keep_rgb=True, quality=95)
    else:
        image = Image.new("RGB", (16, 16), colour)
        planes = (image.convert("YCbCr") if kind == "YCCK" else image).split()
        inverted = [plane.point(lambda value: 255 - value) for plane in planes]
        black = Image.new("L", (16, 16), 0)
        file = encode(Image.merge("CMYK", [*inverted, black]), "JPEG", **options)
        file = as_ycck(file) if kind == "YCCK" else file
        colour = (55, 195, 225) if kind == "YCCK" else colour
    assert np.abs(decode(file)[8, 8].astype(int) - colour).max() < 4


def as_ycck(cmyk_jpeg: bytes) -> bytes:
    """Set Adobe's marker to planes Y, Cb, Cr and black, which Pillow cannot write."""
    transform = cmyk_jpeg.index(b"Adobe") + 11
    assert cmyk_jpeg[transform] == 0
    return cmyk_jpeg[:transform] + b"\2" + cmyk_jpeg[transform + 1 :]


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    scaled = np.repeat((deep >> 8)[:, :, None], 3, 2)
    assert np.array_equal(decode(encode(deep, "PNG")), scaled)
    assert np.array_equal(decode(b"P5 4 4 65535\n" + deep.astype(">u2").tobytes()), scaled)
    colours = np.stack([deep, deep.T, deep[::-1]], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    assert np.array_equal(decode(png(4, 4, depth=16, rows=rows)), colours >> 8)


DEEP = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)  # 12 of 16 bits
DEEP_COLOURS = np.stack([DEEP, DEEP.T, DEEP[::-1]], -1)
SIXTEEN_BITS = {
    "PNG": (encode(DEEP, "PNG"), DEEP),
    "TIFF": (encode(DEEP, "TIFF"), DEEP),
    "TIFF, LZW": (encode(DEEP, "TIFF", compression="tiff_lzw"), DEEP),
    "PGM": (b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes(), DEEP),
    "PGM, plain": (b"P2 8 8 65535\n" + b" ".join(b"%d" % n for n in DEEP.flat), DEEP),
    "PPM": (b"P6 8 8 65535\n" + DEEP_COLOURS.astype(">u2").tobytes(), DEEP_COLOURS),
    "PNG, RGB": (png_of(DEEP_COLOURS, 2), DEEP_COLOURS),
    "PNG, RGBA": (png_of(np.dstack([DEEP_COLOURS, DEEP]), 6), DEEP_COLOURS),
    "TIFF, RGB": (tiff_of(DEEP_COLOURS), DEEP_COLOURS),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_the_value_that_is_white_can_be_told(kind: str):
    data, values = SIXTEEN_BITS[kind]
    assert np.array_equal(deep_values(data), values)
    for white in (4095, 1000, 65535):
        expected = np.minimum(np.floor(values * (255.0 / white) + 0.5), 255)
        expected = expected if expected.ndim == 3 else np.repeat(expected[:, :, None], 3, 2)
        assert np.array_equal(np.asarray(open_picture(data, white).pixels()), expected)
    assert np.asarray(open_picture(data).pixels()).max() <= 16  # and without, 16 levels are left


def test_white_changes_no_image_that_tells_its_own():
    image = noise(8, 8)
    stated = b"P5 8 8 4095\n" + DEEP.astype(">u2").tobytes()
    files = [encode(image, kind) for kind in ("PNG", "TIFF", "JPEG", "PPM", "BMP")] + [stated]
    for data in files:
        assert np.array_equal(open_picture(data, 100).pixels(), open_picture(data).pixels())
    assert all(deep_values(data) is None for data in files if data[:2] != b"\xff\xd8")
    with pytest.raises(BadImage, match=r"LA;16B, to which data\.white cannot be applied"):
        open_picture(png_of(DEEP_COLOURS[..., :2], 4), 4095)


def test_white_turns_photographs_upright_too():
    for kind in ("PNG", "TIFF"):
        data = encode(DEEP[:4], kind, exif=exif_of(6))
        expected = np.asarray(open_picture(encode(DEEP[:4], kind), 4095).pixels())
        assert np.array_equal(open_picture(data, 4095).pixels(), TURNED[6](expected))


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "iCCP", "behind the pixels"])
def test_texts_of_any_size_are_no_part_of_the_pixels(kind: str):
    image, many = noise(8, 8), b"many words " * 200_000
    body = {
        "tEXt": b"a\0" + many * 40,  # more than Pillow keeps of all texts
        "iTXt": b"a\0\1\0\0\0" + zlib.compress(many),
        "iCCP": b"a\0\0" + zlib.compress(many),
    }.get(kind, b"a\0\0" + zlib.compress(many))
    plain = encode(image, "PNG")
    place = 33 if kind != "behind the pixels" else plain.rindex(b"IEND") - 4
    name = kind.encode() if place == 33 else b"zTXt"
    data = plain[:place] + png_chunk(name, body) + plain[place:]
    with pytest.raises((ValueError, OSError)):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(decode(data), image)
    assert np.array_equal(decode(encode(image, "PNG", exif=exif_of(6))), TURNED[6](image))
    with pytest.raises(BadImage):
        decode(data[: data.index(b"IDAT") + 40])  # cut off


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_picture_of_an_animation_is_taken(kind: str):
    first, second = (np.full((8, 8, 3), value, np.uint8) for value in (20, 200))
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = {"save_all": True, "append_images": [Image.fromarray(second)], **options}
    assert np.array_equal(decode(encode(first, kind, **frames)), first)
    assert not np.array_equal(decode(encode(second, kind, **options)), first)


def test_arrays_of_every_kind_become_rgb():
    image = noise(3, 4)
    assert np.array_equal(decode(image), image)
    assert np.array_equal(decode(np.dstack([image, image[:, :, 0]])), image)
    for grey in (image[:, :, 0], image[:, :, :1]):
        assert np.array_equal(decode(grey), np.dstack([image[:, :, 0]] * 3))
    assert (open_picture(image).height, open_picture(image).width) == (3, 4)


@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (2, 3), (4, 7), (7, 4), (7, 7), (8, 8), (9, 31), (33, 47), (64, 1), (100, 257)],
)
def test_both_readers_agree_at_every_size(height: int, width: int, both):
    shrinks = [s for s in SHRINKS if s <= min(height, width) and (s == 1 or max(height, width) > 6)]
    kinds: tuple[dict[str, int], ...] = (
        *({"quality": q, "subsampling": s} for q in (30, 95) for s in (0, 1, 2)),
        {"progressive": True},
        {"progressive": True, "subsampling": 0},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
    )
    for options in kinds:
        data = encode(noise(height, width), "JPEG", **options)
        for shrink in shrinks:
            fast, slow = both(lambda data, shrink: open_picture(data).pixels(shrink), data, shrink)
            assert fast.shape == (-(-height // shrink), -(-width // shrink), 3)
            assert np.array_equal(fast, np.asarray(slow)), (options, shrink)
    grey = encode(noise(height, width)[:, :, 0], "JPEG")
    inks = np.dstack([noise(height, width), noise(height, width)[::-1, :, 0]])
    cmyk = encode(Image.fromarray(inks, "CMYK"), "JPEG")
    for data in (grey, cmyk, as_ycck(cmyk)):
        fast, slow = both(lambda data: open_picture(data).pixels(shrinks[0]), data)
        assert np.array_equal(np.asarray(fast), np.asarray(slow))


def test_readers_that_disagree_would_be_seen(both, monkeypatch):
    exact = module.simplejpeg.decode_jpeg

    def rough(data: bytes, *args, **options) -> np.ndarray:
        return exact(data, *args, fastupsample=True, **options)

    monkeypatch.setattr(module.simplejpeg, "decode_jpeg", rough)
    fast, slow = both(all_sizes, encode(smooth(33, 47), "JPEG"))
    assert not all(map(np.array_equal, fast, slow))


def test_shrinking_is_a_fraction_of_the_same_picture(jpeg_reader: str):
    image = smooth(64, 96)
    data = encode(image, "JPEG", quality=95, subsampling=0)
    for shrink in SHRINKS:
        pixels = np.asarray(open_picture(data).pixels(shrink)).astype(float)
        blocks = image.reshape(64 // shrink, shrink, 96 // shrink, shrink, 3).mean((1, 3))
        assert np.abs(pixels - blocks).mean() < 4
        assert np.abs(pixels[::-1] - blocks).mean() > 20


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


def exif_of(orientation: int, order: str = "<") -> bytes:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F] = "A maker of cameras"
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x9003] = "2007:06:05 04:03:02"
    return exif.tobytes()


def with_segment(jpeg: bytes, body: bytes, marker: int = 0xE1) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


@pytest.mark.parametrize("order", ["<", ">"])
def test_photographs_are_turned_upright(order: str, jpeg_reader: str):
    plain = encode(smooth(17, 40), "JPEG")
    whole = set()
    for orientation, turn in TURNED.items():
        data = with_segment(plain, exif_of(orientation, order))
        picture, found = open_picture(data), all_sizes(data)
        assert (picture.height, picture.width) == found[-1].shape[:2]
        assert all(map(np.array_equal, found, map(turn, all_sizes(plain))))
        whole.add(found[-1].tobytes())
    assert len(whole) == 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "MPO", "AVIF"])
def test_other_formats_are_turned_upright(kind: str, jpeg_reader: str):
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {kind}")
    image = smooth(16, 40)
    for orientation, turn in TURNED.items():
        picture = open_picture(encode(image, kind, exif=exif_of(orientation)))
        pixels, upright = np.asarray(picture.pixels()), turn(image).astype(int)
        assert (picture.height, picture.width) == pixels.shape[:2] == upright.shape[:2]
        assert np.abs(pixels - upright).mean() < 10


def test_the_exif_data_is_found_behind_other_data(jpeg_reader: str):
    plain = encode(smooth(16, 24), "JPEG", comment="not yet")
    data = with_segment(plain, exif_of(6))
    for marker in (0xE2, 0xE1, 0xE2):
        data = with_segment(data, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000), marker)
    for fill in (b"", b"\xff", b"\xff" * 5):  # which may precede a marker
        found = decode(data[:2] + fill + data[2:])
        assert np.array_equal(found, TURNED[6](decode(plain)))


def broken_exif() -> Iterator[bytes]:
    whole = exif_of(6)
    assert whole[:6] == b"Exif\0\0" and whole[6:8] == b"II"
    yield from (whole[:end] for end in range(6, whole.index(b"\x12\x01") + 9))
    yield b"Exif\0\0XX" + whole[8:]
    yield whole[:10] + b"\xff\xff\xff\x7f" + whole[14:]  # the tags stand behind the end
    yield whole[:14] + b"\0\0" + whole[16:]  # there are no tags
    kind = whole.index(b"\x12\x01") + 2
    yield whole[:kind] + b"\x63" + whole[kind + 1 :]
    for value in (0, 9, 65535):
        yield exif_of(value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_with_broken_exif_data_are_read_as_upright(kind: str, jpeg_reader: str):
    plain = encode(smooth(16, 24), kind)
    upright = decode(plain)
    cases = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of corrupt EXIF data
        for exif in broken_exif():
            if kind == "JPEG":
                data = with_segment(plain, exif)
            else:
                data = encode(smooth(16, 24), kind, exif=exif)
                assert len(data) > len(plain) or exif == b"Exif\0\0"
            picture = open_picture(data)
            assert (picture.height, picture.width) == (16, 24), exif
            assert np.array_equal(np.asarray(picture.pixels()), upright), exif
            cases += 1
    assert cases > 20


GOOD_JPEG = encode(smooth(40, 40), "JPEG")
GOOD_PNG = encode(noise(40, 40), "PNG")


def jpeg_of_size(width: int, height: int) -> bytes:
    """Return a JPEG file with a wrong size in its header."""
    frame = GOOD_JPEG.index(b"\xff\xc0") + 5
    return GOOD_JPEG[:frame] + struct.pack(">HH", height, width) + GOOD_JPEG[frame + 4 :]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text", "not an image, .*: it is of no known kind .*'just some text'"),
        (b"<html>Sorry", "not an image, .*: it is markup, as web pages are"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "it is a HEIC photograph; convert to JPEG"),
        (b"\xff\xd8", "not an image|cannot be decoded"),
        (b"\xff\xd8 and then text", "not an image|cannot be decoded"),
        (GOOD_JPEG[:300], "cannot be decoded: Truncated File Read"),
        (GOOD_JPEG[:-20], "cannot be decoded: image file is truncated"),
        (GOOD_JPEG[:-200] + bytes(10), "cannot be decoded: image file is truncated"),
        (GOOD_PNG[: len(GOOD_PNG) // 2], "cannot be decoded"),
        (GOOD_PNG[:60] + b"xxxx" + GOOD_PNG[64:], "cannot be decoded"),
        (png(0, 4), "no pixels|not an image"),
        (jpeg_of_size(0, 40), "no pixels|not an image"),
        (jpeg_of_size(40, 0), "no pixels|not an image"),
        (png(60_000, 60_000), "exceeds limit"),  # before it fills the memory
        (jpeg_of_size(60_000, 60_000), "exceeds limit"),
        (encode(np.ones((4, 4), np.float32), "TIFF"), "^floating-point pixels"),
        (EPS, "not an image, or of a format"),  # which starts a program
        (np.zeros((4, 4, 3), np.float32), r"got float32\[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"expected 1, 3 or 4 channels, got \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"got uint8\[4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"no pixels: \[0, 4, 3\]"),
    ],
)
def test_what_is_no_image_is_refused_with_the_reason(data, reason: str, jpeg_reader: str):
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_what_follows_a_jpeg_is_ignored(jpeg_reader: str):
    for rest in (b"\0", b"\xff", b"some text" * 100, GOOD_JPEG, GOOD_PNG):
        assert np.array_equal(decode(GOOD_JPEG + rest), decode(GOOD_JPEG))


def damaged(files: list[bytes], rng: np.random.Generator) -> Iterator[bytes]:
    """Yield files with flipped bits, cut off, with bytes swapped in, or grown together."""
    while True:
        data = bytearray(files[rng.integers(len(files))])
        # Headers are small and full of meaning: half of the damage goes there.
        reach = len(data) if rng.random() < 0.5 else min(len(data), 700)
        kind = rng.integers(4)
        if kind == 0:
            for place in rng.integers(2, reach, rng.integers(1, 9)).tolist():
                data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            del data[rng.integers(2, reach) :]
        elif kind == 2:
            start, length = int(rng.integers(2, reach)), int(rng.integers(1, 40))
            data[start : start + length] = rng.bytes(int(rng.integers(0, 40)))
        else:
            other = files[rng.integers(len(files))]
            data[rng.integers(2, reach) :] = other[rng.integers(0, len(other)) :]
        yield bytes(data)


def test_damaged_files_are_read_or_refused_alike_by_both_readers(both):
    image = smooth(48, 64)
    files = [
        GOOD_JPEG,
        GOOD_PNG,
        with_segment(GOOD_JPEG, exif_of(6)),
        with_segment(GOOD_JPEG, exif_of(1)),
        encode(image, "JPEG", progressive=True),
        encode(image[:, :, 0], "JPEG"),
        encode(Image.fromarray(image).convert("CMYK"), "JPEG"),
        encode(Image.fromarray(image).quantize(16), "PNG"),
        encode(image, "GIF"),
    ]

    def outcome(data: bytes, shrink: int) -> bytes | None:
        """Return the pixels of a file, or None if it is refused; anything else raises."""
        try:
            pixels = np.asarray(open_picture(data).pixels(shrink))
        except BadImage:
            return None
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        return pixels.tobytes()

    refused = 0
    cases = zip(range(1500), damaged(files, np.random.default_rng(0)), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's of odd files
        for number, data in cases:
            fast, slow = both(outcome, data, SHRINKS[number % 4])
            assert fast == slow, f"the readers disagree on case {number}"
            refused += fast is None
    assert 100 < refused < 1400
