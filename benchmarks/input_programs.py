"""The programs of ``input_pipeline.py``, each run in a process of its own.

    python benchmarks/input_programs.py JSON

``program`` in the JSON is one of ``TURNS`` or ``FOLDERS``. The latter open a folder of many images,
once, and print JSON. The former are pipelines that take turns on the same cores: a turn is a line
on standard input with a number of images, the answer a line of JSON, and between turns they are
idle. All scale the shorter side to 256, cut out 224 at random, flip half of the
images (but for the limit), and make uint8 arrays. ``torch`` and ``tf.data`` run in environments
that have neither nat_jax nor JAX, so imports are inside the functions.
"""

import contextlib
import io
import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import measure

SIZE, SHORT = 224, 256
# Batches that are ready would count as made in no time. So many are thrown away first, for so many
# seconds at least.
_DRAIN = (16, 1.5)
_SETTLE = 10.0  # seconds at most until nothing more is made ahead

Spec = dict[str, Any]
Turn = Callable[[int], dict[str, float]]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def complete_turn(work: Callable[[], int]) -> dict[str, float]:
    """Time work that begins with nothing made and leaves nothing over; it returns the images."""
    wall, cpu = time.perf_counter(), measure.cpu_seconds()
    images = work()
    seconds = time.perf_counter() - wall
    return {"images": images, "seconds": seconds, "cpu": measure.cpu_seconds() - cpu}


def stream_turn(batches: Iterator[Any], count: int, batch_size: int) -> dict[str, float]:
    """Time `count` batches of an endless stream, after those that were waiting are gone."""
    least, seconds = _DRAIN
    begin, thrown = time.perf_counter(), 0
    while thrown < least or time.perf_counter() - begin < seconds:
        next(batches)
        thrown += 1

    def work() -> int:
        for _ in range(count):
            next(batches)
        return count * batch_size

    answer = complete_turn(work)
    # What is made ahead must be made before the next program's turn begins.
    end, before = time.perf_counter() + _SETTLE, measure.cpu_seconds()
    while time.perf_counter() < end:
        time.sleep(0.2)
        now = measure.cpu_seconds()
        if now - before < 0.05:
            break
        before = now
    return answer


def limit(spec: Spec) -> tuple[Spec, Turn]:
    """Set up the bare work in a loop: decode bytes in memory, scale what is cut out.

    With ``naive`` the complete image is scaled, then cropped.
    """
    import numpy as np
    from PIL import Image

    draw = random.Random(spec["seed"])
    images = [path.read_bytes() for path in sorted(Path(spec["folder"]).glob("*/*"))]
    draw.shuffle(images)
    bilinear, square = Image.Resampling.BILINEAR, (SIZE, SIZE)

    def decode(data: bytes) -> Image.Image:
        if spec["decoder"] == "simplejpeg":
            import simplejpeg

            return Image.fromarray(simplejpeg.decode_jpeg(data))
        image = Image.open(io.BytesIO(data))
        return image if image.mode == "RGB" else image.convert("RGB")

    def naive(image: Image.Image) -> None:
        scale = SHORT / min(image.size)
        scaled = image.resize([round(side * scale) for side in image.size], bilinear)
        x, y = (int(draw.random() * (side - SIZE + 1)) for side in scaled.size)
        np.asarray(scaled.crop((x, y, x + SIZE, y + SIZE)))

    def crop(image: Image.Image) -> None:
        box = scaled_box(*image.size, draw.random(), draw.random())
        np.asarray(image.resize(square, bilinear, box=box))

    def stream() -> Iterator[None]:
        while True:
            for data in images:
                yield (naive if spec["naive"] else crop)(decode(data))

    work = stream()

    def some(count: int) -> int:
        for _ in range(count):
            next(work)
        return count

    return {"decoder": spec["decoder"]}, lambda count: complete_turn(lambda: some(count))


def scaled_box(width: int, height: int, left: float, top: float) -> Box:
    """Return the part of an image that is a square of SIZE pixels once the image is scaled.

    Args:
        width: of the image, whose shorter side is to be scaled to SHORT pixels.
        height: of the same.
        left: in [0, 1), the position in the room that there is.
        top: the same.
    """
    scale = min(width, height) / SHORT
    room = max(width, height) / scale - SIZE, SHORT - SIZE
    across, down = room if width >= height else room[::-1]
    x, y = int(left * (across + 1)) * scale, int(top * (down + 1)) * scale
    side = SIZE * scale
    return x, y, min(x + side, width), min(y + side, height)


def ours(spec: Spec) -> tuple[Spec, Turn]:
    """Set up nat_jax's batches."""
    if spec["decoder"] == "Pillow":
        sys.modules["simplejpeg"] = None  # type: ignore[assignment]  # as if not installed
    else:
        import simplejpeg  # noqa: F401  # nat_jax would do without
    from nat_jax.input import pipeline, transforms
    from nat_jax.input.sources import open_source

    source = open_source(spec["source"], "train")
    transform = transforms.train_transform(image_size=SIZE, resize=SHORT, flip=True)
    done = 0  # batches

    def some(count: int) -> int:
        nonlocal done
        stop = done + max(1, count // spec["batch"])
        batches = pipeline.train_batches(
            source,
            transform,
            batch_size=spec["batch"],
            seed=spec["seed"],
            start_step=done,
            num_steps=stop,
            threads=spec["threads"],
        )
        images = sum(len(batch["image"]) for batch in batches)
        done = stop
        return images

    return {"decoder": spec["decoder"]}, lambda count: complete_turn(lambda: some(count))


def torch_loader(spec: Spec) -> tuple[Spec, Turn]:
    """Set up PyTorch's DataLoader over ImageFolder, with Pillow."""
    import torch
    import torchvision
    from torchvision import datasets, transforms

    class Shuffle(torch.utils.data.Sampler):
        """A wanted number of positions, in epochs of random order."""

        def __init__(self, length: int):
            self._length, self._random = length, random.Random(spec["seed"])
            self._left: list[int] = []
            self.wanted = 0

        def __len__(self) -> int:
            return self.wanted

        def __iter__(self) -> Iterator[int]:
            for _ in range(self.wanted):
                if not self._left:
                    self._left = self._random.sample(range(self._length), self._length)
                yield self._left.pop()

    crop = [transforms.Resize(SHORT), transforms.RandomCrop(SIZE)]
    steps = [*crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    images = datasets.ImageFolder(spec["folder"], transforms.Compose(steps))
    sampler = Shuffle(len(images))
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=spec["batch"],
        sampler=sampler,
        num_workers=spec["workers"],
        persistent_workers=True,
        drop_last=True,
    )

    def turn(count: int) -> dict[str, float]:
        sampler.wanted = count
        return complete_turn(lambda: sum(len(batch) for batch, _ in loader))

    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return {**versions, "pillow": metadata.version("pillow"), "decoder": "Pillow"}, turn


def tf_data(spec: Spec) -> tuple[Spec, Turn]:
    """Set up a tf.data pipeline, its parallelism left to AUTOTUNE."""
    import tensorflow as tf

    def load(path: Any) -> Any:
        data = tf.io.read_file(path)
        if spec["fused"]:  # decodes little more than what is cut out, then scales that
            height, width, _ = tf.unstack(tf.io.extract_jpeg_shape(data))
            side = tf.minimum(height, width) * SIZE // SHORT
            top = tf.random.uniform([], 0, height - side + 1, tf.int32)
            left = tf.random.uniform([], 0, width - side + 1, tf.int32)
            image = tf.io.decode_and_crop_jpeg(data, [top, left, side, side], channels=3)
            image = tf.image.resize(image, [SIZE, SIZE], antialias=True)
        else:
            image = tf.io.decode_jpeg(data, channels=3)
            size = tf.shape(image)[:2]
            scaled = tf.maximum(SHORT, size * SHORT // tf.reduce_min(size))
            image = tf.image.resize(image, scaled, antialias=True)
            image = tf.image.random_crop(image, [SIZE, SIZE, 3])
        return tf.cast(tf.round(tf.image.random_flip_left_right(image)), tf.uint8)

    files = sorted(str(path) for path in Path(spec["folder"]).glob("*/*"))
    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files), seed=spec["seed"])
    data = data.repeat().map(load, num_parallel_calls=tf.data.AUTOTUNE)
    data = data.batch(spec["batch"], drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.autotune.ram_budget = 2**29  # else half of the memory is filled between turns
    options.experimental_optimization.inject_prefetch = False
    batches = iter(data.with_options(options))  # one for all turns: a new one tunes itself again

    def turn(count: int) -> dict[str, float]:
        return stream_turn(batches, count // spec["batch"], spec["batch"])

    return {"tensorflow": tf.__version__, "decoder": "libjpeg-turbo (TensorFlow's)"}, turn


def opening(spec: Spec) -> Spec:
    """Open a folder and do nothing else."""
    from nat_jax.input.sources import open_source

    source, taken = measure.timed(lambda: open_source(spec["source"], "train"))
    _, read = measure.timed(lambda: source[0])
    return {"open_seconds": taken["seconds"], "first_record_seconds": read["seconds"]}


def using(spec: Spec) -> Spec:
    """Open a folder and use it as training does; return time and memory at every point."""
    begin = time.perf_counter()
    import grain  # noqa: F401  # batches need it, and should not pay for it
    import numpy as np

    from nat_jax.input import pipeline, transforms
    from nat_jax.input.sources import open_source

    points: dict[str, dict[str, float]] = {}

    def point(name: str, **more: float) -> None:
        nonlocal begin
        seconds = round(time.perf_counter() - begin, 4)
        status = Path("/proc/self/status").read_text()
        own, mapped = (
            round(int(status.partition(f"{key}:")[2].split()[0]) / 1000, 1)
            for key in ("RssAnon", "RssFile")
        )
        points[name] = {"seconds": seconds, **more, "own": own, "mapped": mapped}
        begin = time.perf_counter()

    point("libraries imported")
    source = open_source(spec["source"], "train")
    count = len(source)
    point("opened", records=count)
    seen = np.zeros(count, np.uint8)
    steps = pipeline.steps_per_epoch(count, spec["batch"])
    for batch in pipeline.train_batches(
        source,
        transforms.train_transform(image_size=32),
        batch_size=spec["batch"],
        seed=spec["seed"],
        start_step=0,
        num_steps=steps,
        threads=spec["threads"],
    ):
        seen[batch["index"]] += 1
    once = bool(seen.max() == 1 and seen.sum() == steps * spec["batch"])
    point("an epoch of batches", images=steps * spec["batch"])
    again = pickle.loads(pickle.dumps(source))  # as worker processes get it
    same = again.fingerprint == source.fingerprint and again[count - 1] == source[count - 1]
    checks = {"batches visit no record twice": once, "pickling keeps the records": same}
    return {"points": points, "checks": checks}


def serve(start: Callable[[Spec], tuple[Spec, Turn]], spec: Spec) -> None:
    """Set a program up, describe it in a line of JSON, and answer turns until the input ends."""
    # What libraries print must not come between the answers.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        about, turn = start(spec)
        print(json.dumps(about), file=answers, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            for line in sys.stdin:
                print(json.dumps(turn(int(line))), file=answers, flush=True)


TURNS = {"limit": limit, "ours": ours, "torch": torch_loader, "tf.data": tf_data}
FOLDERS = {"opening": opening, "using": using}

if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    if arguments["program"] in TURNS:
        serve(TURNS[arguments["program"]], arguments)
    else:
        print(json.dumps(FOLDERS[arguments["program"]](arguments)))
