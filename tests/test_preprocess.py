import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nat_jax import preprocess
from nat_jax.preprocess import (
    BadImage,
    CenterCrop,
    RandomCrop,
    RandomFlip,
    Resize,
    ResizeExact,
    apply,
    decode,
)


def pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([y * 255 // height, x * 255 // width, (x + y) % 128 + 60], -1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stack(*images: np.ndarray) -> np.ndarray:
    return np.stack(images)


@pytest.fixture(params=["pillow", "simplejpeg"])
def jpeg_reader(request, monkeypatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(preprocess, "simplejpeg", None)
    elif preprocess.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


# decode


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_back_their_pixels(kind: str):
    image = pixels(5, 7)
    decoded = decode(encode(Image.fromarray(image), kind))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, image)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_give_back_about_their_pixels(kind: str, jpeg_reader: str):
    image = smooth(32, 48)
    decoded = decode(encode(Image.fromarray(image), kind))
    assert decoded.shape == image.shape
    assert np.abs(decoded.astype(int) - image).mean() < 12


def test_both_jpeg_readers_agree(monkeypatch):
    if preprocess.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    files = [
        encode(Image.fromarray(smooth(h, w)), "JPEG", quality=q, subsampling=s, progressive=p)
        for h, w in ((8, 8), (33, 47))
        for q in (30, 95)
        for s in (0, 1, 2)
        for p in (False, True)
    ]
    files.append(encode(Image.fromarray(smooth(9, 9)).convert("L"), "JPEG"))
    fast = [decode(f) for f in files]
    monkeypatch.setattr(preprocess, "simplejpeg", None)
    assert all(np.array_equal(a, decode(f)) for a, f in zip(fast, files, strict=True))


def test_both_jpeg_readers_agree_on_photographs(shared_data: Path, monkeypatch):
    if preprocess.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    from nat_jax import records

    for archive, wanted in (("imagenette_like.zip", 12), ("voc2007_subset.zip", 6)):
        source = records.open_source(f"folder:{shared_data}/{archive}")
        files = [source[i * len(source) // wanted]["image"] for i in range(wanted)]
        fast = [decode(f) for f in files]
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "simplejpeg", None)
            assert all(np.array_equal(a, decode(f)) for a, f in zip(fast, files, strict=True))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(kind: str, jpeg_reader: str):
    grey = smooth(16, 16)[:, :, 0]
    decoded = decode(encode(Image.fromarray(grey), kind))
    assert decoded.shape == (16, 16, 3)
    assert (decoded == decoded[:, :, :1]).all()
    assert np.abs(decoded[:, :, 0].astype(int) - grey).max() < 12


def test_palette_alpha_and_one_bit_become_rgb():
    image = Image.fromarray(pixels(6, 6))
    palette = image.quantize(16)
    assert np.array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    rgba = np.dstack([np.asarray(image), np.zeros((6, 6), np.uint8)])
    assert np.array_equal(decode(encode(Image.fromarray(rgba), "PNG")), np.asarray(image))
    bits = Image.fromarray(np.eye(6, dtype=bool))
    assert np.array_equal(decode(encode(bits, "PNG"))[:, :, 0], np.eye(6) * 255)


def test_cmyk_becomes_rgb(jpeg_reader: str):
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(decode(encode(cmyk, "JPEG"))[4, 4].astype(int) - [0, 255, 255]).max() < 4


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    assert np.array_equal(decode(encode(Image.fromarray(deep), "PNG"))[:, :, 0], deep >> 8)
    header = b"P5 4 4 65535\n"
    assert np.array_equal(decode(header + deep.astype(">u2").tobytes())[:, :, 0], deep >> 8)


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_photographs_are_turned_upright(orientation: int, turns: int, jpeg_reader: str):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth(16, 32)
    data = encode(Image.fromarray(image), "JPEG", exif=exif, quality=95, subsampling=0)
    upright = np.rot90(image, turns)
    decoded = decode(data)
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 8


def test_arrays_of_every_kind_become_rgb():
    image = pixels(3, 4)
    assert np.array_equal(decode(image), image)
    assert np.array_equal(decode(np.dstack([image, image[:, :, 0]])), image)
    for grey in (image[:, :, 0], image[:, :, :1]):
        assert np.array_equal(decode(grey), np.dstack([image[:, :, 0]] * 3))


GOOD_JPEG = encode(Image.fromarray(smooth(40, 40)), "JPEG")
GOOD_PNG = encode(Image.fromarray(pixels(40, 40)), "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text", "not an image"),
        (b"\xff\xd8 and then text", "not an image|cannot be decoded"),
        (GOOD_JPEG[:300], "cannot be decoded: Truncated File Read"),
        (GOOD_JPEG[:-20], "cannot be decoded: image file is truncated"),
        (GOOD_PNG[: len(GOOD_PNG) // 2], "cannot be decoded"),
        (GOOD_PNG[:60] + b"xxxx" + GOOD_PNG[64:], "cannot be decoded"),
    ],
)
def test_bytes_that_are_no_image_are_refused_with_the_reason(data: bytes, reason, jpeg_reader: str):
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_both_jpeg_readers_refuse_the_same_cut_files(monkeypatch):
    if preprocess.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")

    def outcomes() -> list[bytes | None]:
        found: list[bytes | None] = []
        for end in range(len(GOOD_JPEG) - 60, len(GOOD_JPEG) + 1):
            try:
                found.append(decode(GOOD_JPEG[:end]).tobytes())
            except BadImage:
                found.append(None)
        return found

    fast = outcomes()
    assert fast[0] is None and fast[-1] is not None
    monkeypatch.setattr(preprocess, "simplejpeg", None)
    assert fast == outcomes()


def test_whole_files_are_not_refused(jpeg_reader: str):
    assert decode(GOOD_JPEG).shape == decode(GOOD_PNG).shape == (40, 40, 3)


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"")
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_images_without_pixels_are_refused():
    with pytest.raises(BadImage):
        decode(png_of_size(0, 4))
    with pytest.raises(BadImage, match=r"no pixels: \[0, 4, 3\]"):
        decode(np.zeros((0, 4, 3), np.uint8))


def test_enormous_images_are_refused_before_they_fill_the_memory():
    with pytest.raises(BadImage, match="exceeds limit"):
        decode(png_of_size(60_000, 60_000))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 4, 3), np.float32), r"got float32\[4, 4, 3\]"),
        (np.zeros((4, 4, 2), np.uint8), r"expected 1, 3 or 4 channels, got \[4, 4, 2\]"),
        (np.zeros(4, np.uint8), r"got uint8\[4\]"),
    ],
)
def test_arrays_that_are_no_image_are_refused(array: np.ndarray, reason: str):
    with pytest.raises(BadImage, match=reason):
        decode(array)


def test_floating_point_pixels_are_refused():
    image = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(BadImage, match="floating-point pixels"):
        decode(encode(image, "TIFF"))


# Transforms.


@pytest.mark.parametrize(
    ("shape", "expected"), [((30, 60), (10, 20)), ((61, 30), (20, 10)), ((5, 5), (10, 10))]
)
def test_resize_keeps_the_aspect_ratio(shape, expected):
    assert apply((Resize(10),), stack(pixels(*shape))).shape == (1, *expected, 3)


def test_resize_never_falls_below_the_shortest_side():
    for height in range(224, 300):
        resized = apply((Resize(64),), np.zeros((1, height, 301, 3), np.uint8))
        assert min(resized.shape[1:3]) == 64


def test_resizing_keeps_constant_images_and_averages_when_shrinking():
    constant = np.full((1, 31, 17, 3), 77, np.uint8)
    assert (apply((ResizeExact(8),), constant) == 77).all()
    noise = stack(pixels(256, 256))
    assert np.abs(apply((ResizeExact(4),), noise).astype(float) - 127.5).max() < 12


def test_resize_exact_leaves_its_size_untouched():
    images = stack(pixels(9, 9), pixels(9, 9, 1))
    assert np.array_equal(apply((ResizeExact(9),), images), images)
    assert apply((ResizeExact(9),), stack(pixels(18, 12))).shape == (1, 9, 9, 3)


def test_center_crop_cuts_the_middle():
    image = pixels(7, 10)
    assert np.array_equal(apply((CenterCrop(3),), stack(image))[0], image[2:5, 3:6])


def test_random_crop_reaches_every_place_and_no_other():
    image = pixels(5, 6)
    grid = (np.arange(12) + 0.5) / 12
    uniform = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    crops = apply((RandomCrop(4),), np.repeat(image[None], len(uniform), 0), uniform)
    windows = {image[y : y + 4, x : x + 4].tobytes() for y in range(2) for x in range(3)}
    assert {crop.tobytes() for crop in crops} == windows
    extremes = apply((RandomCrop(4),), stack(image, image), np.array([[0, 0], [1 - 2**-53] * 2]))
    assert np.array_equal(extremes[0], image[:4, :4])
    assert np.array_equal(extremes[1], image[1:, 2:])


def test_padding_is_black_and_shifts_the_image():
    image = np.maximum(pixels(4, 4), 1)
    uniform = np.array([[0.5, 0.5], [0.0, 0.0], [0.99, 0.5]])
    centre, corner, below = apply((RandomCrop(4, pad=1),), stack(image, image, image), uniform)
    assert np.array_equal(centre, image)
    assert (corner[0] == 0).all() and (corner[:, 0] == 0).all()
    assert np.array_equal(corner[1:, 1:], image[:3, :3])
    assert np.array_equal(below[:3], image[1:]) and (below[3] == 0).all()


def test_flip_mirrors_the_share_it_is_asked_for_and_leaves_its_input_alone():
    images = stack(*(pixels(4, 5, seed) for seed in range(4)))
    before = images.copy()
    flipped = apply((RandomFlip(0.5),), images, np.array([[0.49], [0.5], [0.0], [0.99]]))
    assert np.array_equal(flipped, [before[0, :, ::-1], before[1], before[2, :, ::-1], before[3]])
    assert np.array_equal(images, before)
    assert np.array_equal(apply((RandomFlip(0.0),), images, np.zeros((4, 1))), images)


def test_each_step_gets_its_own_numbers():
    images = stack(pixels(6, 6), pixels(6, 6, 1))
    uniform = np.array([[0.9, 0.1, 0.3], [0.2, 0.6, 0.8]])
    together = apply((RandomCrop(4), RandomFlip()), images, uniform)
    one = apply((RandomCrop(4),), images, uniform[:, :2])
    assert np.array_equal(together, apply((RandomFlip(),), one, uniform[:, 2:]))
    assert not np.array_equal(together, apply((RandomFlip(),), one, uniform[:, :1]))


def test_a_batch_is_its_images_one_by_one():
    transform = preprocess.train_transform(image_size=6, resize=9, flip=True)
    images = stack(*(pixels(12, 10, seed) for seed in range(5)))
    uniform = np.random.default_rng(0).random((5, preprocess.draws(transform)))
    alone = [apply(transform, images[i : i + 1], uniform[i : i + 1])[0] for i in range(5)]
    assert np.array_equal(apply(transform, images, uniform), alone)


def test_randomness_must_be_given():
    with pytest.raises(ValueError, match=r"uniform is \[2, 0\]; .* needs \[2, 1\]"):
        apply((RandomFlip(),), stack(pixels(4, 4), pixels(4, 4)))


def test_crops_larger_than_the_image_are_refused():
    with pytest.raises(ValueError, match="4 x 9 pixels are smaller than the crop of 5 x 5"):
        apply((CenterCrop(5),), stack(pixels(4, 9)))
    with pytest.raises(ValueError, match="smaller than the crop"):
        apply((RandomCrop(7, pad=1),), stack(pixels(4, 9)), np.zeros((1, 2)))


# What the presets put together.


def test_transforms_for_training_and_evaluation():
    flip = RandomFlip()
    train, evaluate = preprocess.train_transform, preprocess.eval_transform
    assert train(image_size=8) == (ResizeExact(8), flip)
    assert train(image_size=8, pad=1, flip=False) == (ResizeExact(8), RandomCrop(8, 1))
    assert train(image_size=224, resize=256) == (Resize(256), RandomCrop(224), flip)
    assert train(image_size=8, resize=9, crop=False) == (Resize(9), CenterCrop(8), flip)
    assert evaluate(image_size=8) == (ResizeExact(8),)
    assert evaluate(image_size=224, resize=256) == (Resize(256), CenterCrop(224))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 8, "resize": -1}, "resize=-1"),
        ({"image_size": 8, "resize": 7}, "resize=7 is smaller than the crop image_size=8"),
        ({"image_size": 8, "pad": -2}, "pad=-2"),
        ({"image_size": 8, "pad": 2, "crop": False}, "pad=2 only shifts .* set crop=True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message: str):
    with pytest.raises(ValueError, match=message):
        preprocess.train_transform(**options)


def test_split_puts_everything_from_the_first_chance_on_into_the_tail():
    transform = (Resize(9), CenterCrop(8), RandomFlip(), ResizeExact(6))
    assert preprocess.split(transform) == (transform[:2], transform[2:])
    assert preprocess.split(transform[:2]) == (transform[:2], ())
    assert preprocess.split(()) == ((), ())


def test_output_size_is_that_of_the_last_step_that_fixes_it():
    assert preprocess.output_size((Resize(9), RandomCrop(8), RandomFlip())) == 8
    assert preprocess.output_size((ResizeExact(9), CenterCrop(5))) == 5
    for transform in ((), (Resize(9),), (RandomFlip(),), (ResizeExact(9), Resize(3))):
        with pytest.raises(ValueError, match="leaves images of different sizes"):
            preprocess.output_size(transform)
