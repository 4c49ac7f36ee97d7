"""What takes turns in ``benchmarks/input_pipeline.py`` on this environment's side.

Run by ``input_turns.py`` with a JSON argument. ``kind`` is

    limit  the bare work in a plain loop: decode, and scale what is cut out, from bytes in memory
    ours   nat_jax's own batches, from a source

``decoder`` is "simplejpeg" or "Pillow" for both; ``crop`` is random_crop, random_resized_crop or
center_crop; ``views`` how many crops are taken of one decoded image.
"""

import io
import json
import math
import random
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from input_serve import serve, stream_turn, whole_turn
from PIL import Image

SIZE, SHORT = 224, 256

Turn = Callable[[int], dict[str, Any]]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def load_decoder(name: str) -> Callable[[bytes], Image.Image]:
    """Return the function that decodes a file."""
    if name == "simplejpeg":
        import simplejpeg

        return lambda data: Image.fromarray(simplejpeg.decode_jpeg(data))

    def decode(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        return image if image.mode == "RGB" else image.convert("RGB")

    return decode


def scaled_box(width: int, height: int, left: float, top: float) -> Box:
    """Return the part of an image that is a square of SIZE pixels once the image is scaled.

    Args:
        width: of the image, whose shorter side is to be scaled to SHORT pixels.
        height: of the same.
        left: in [0, 1), where in the room that there is.
        top: the same.
    """
    scale = min(width, height) / SHORT
    room = max(width, height) / scale - SIZE, SHORT - SIZE
    across, down = room if width >= height else room[::-1]
    x, y = int(left * (across + 1)) * scale, int(top * (down + 1)) * scale
    side = SIZE * scale
    return x, y, min(x + side, width), min(y + side, height)


def inception_box(width: int, height: int, draw: Callable[[], float]) -> Box:
    """Return a part of random area (at least 0.08) and aspect ratio (3/4 to 4/3)."""
    for _ in range(10):
        area = width * height * (0.08 + 0.92 * draw())
        aspect = math.exp((2 * draw() - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            x, y = int(draw() * (width - w + 1)), int(draw() * (height - h + 1))
            return x, y, x + w, y + h
    side = min(width, height)
    return 0, 0, side, side


def limit(spec: dict[str, Any]) -> tuple[dict[str, Any], Turn]:
    """Set up the bare loop. With ``naive`` the whole image is scaled, then cropped."""
    decode, draw = load_decoder(spec["decoder"]), random.Random(spec["seed"])
    images = [path.read_bytes() for path in sorted(Path(spec["folder"]).glob("*/*"))]
    draw.shuffle(images)
    bilinear, square = Image.Resampling.BILINEAR, (SIZE, SIZE)

    def box(image: Image.Image) -> Box:
        if spec["crop"] == "random_resized_crop":
            return inception_box(*image.size, draw.random)
        if spec["crop"] == "center_crop":
            return scaled_box(*image.size, 0.5, 0.5)
        return scaled_box(*image.size, draw.random(), draw.random())

    def stream() -> Iterator[None]:
        while True:
            for data in images:
                image = decode(data)
                for _ in range(spec["views"]):
                    np.asarray(image.resize(square, bilinear, box=box(image)))
                yield

    def naive_stream() -> Iterator[None]:
        while True:
            for data in images:
                image = decode(data)
                scale = SHORT / min(image.size)
                whole = image.resize([round(side * scale) for side in image.size], bilinear)
                x, y = (int(draw.random() * (side - SIZE + 1)) for side in whole.size)
                np.asarray(whole.crop((x, y, x + SIZE, y + SIZE)))
                yield

    work = naive_stream() if spec.get("naive") else stream()

    def turn(count: int) -> dict[str, Any]:
        def some() -> int:
            for _ in range(count):
                next(work)
            return count

        return whole_turn(some)

    return {"decoder": spec["decoder"]}, turn


def use_decoder(name: str) -> None:
    """Make nat_jax decode with one of its two decoders."""
    import nat_jax.input.decode

    if name == "Pillow":
        nat_jax.input.decode.simplejpeg = None
    elif nat_jax.input.decode.simplejpeg is None:
        raise SystemExit("simplejpeg is not installed")


def make_transform(crop: str) -> Any:
    """Return nat_jax's transform of that name."""
    from nat_jax.input import transforms

    if crop == "center_crop":
        return transforms.eval_transform(image_size=SIZE, resize=SHORT)
    return transforms.train_transform(image_size=SIZE, resize=SHORT, flip=True, crop=crop)


def ours(spec: dict[str, Any]) -> tuple[dict[str, Any], Turn]:
    """Set up nat_jax's batches."""
    from nat_jax.input import pipeline
    from nat_jax.input.sources import open_source

    use_decoder(spec["decoder"])
    source = open_source(spec["source"], "train")
    transform, size = make_transform(spec["crop"]), spec["batch"]
    done = 0  # batches

    def train(stop: int) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.train_batches(
            source,
            transform,
            batch_size=size,
            seed=spec["seed"],
            start_step=done,
            num_steps=stop,
            threads=spec["threads"],
            workers=spec["workers"],
            views=spec["views"],
        )

    def whole(count: int) -> int:
        nonlocal done
        stop = done + max(1, count // size)
        images = sum(len(batch["image"]) for batch in train(stop))
        done = stop
        return images

    def passes(count: int) -> int:
        images = 0
        while images < count:
            batches = pipeline.eval_batches(
                source, transform, batch_size=size, threads=spec["threads"]
            )
            images += sum(int((batch["weight"] > 0).sum()) for batch in batches)
        return images

    about = {"decoder": spec["decoder"], "nat_jax": metadata_version("nat_jax")}
    if spec["workers"]:
        # Workers take seconds to start: one stream for all turns.
        endless = train(10**9)
        return about, lambda count: stream_turn(endless, max(1, count // size), size)
    work = passes if spec["crop"] == "center_crop" else whole
    return about, lambda count: whole_turn(lambda: work(count))


def metadata_version(package: str) -> str:
    """Return the version of an installed package, or "checkout" where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "checkout"


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    serve(lambda: {"limit": limit, "ours": ours}[arguments["kind"]](arguments))
