"""Where the time of ``benchmarks/input_pipeline.py`` goes: every stage alone, in one thread.

Everything is called as nat_jax's image reader calls it, on the same images, in turn; reported is
the median processor time for one image.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import input_contenders
import input_data
import numpy as np
from input_contenders import SIZE
from PIL import Image

from nat_jax.input import counter_random, decode, pipeline, transforms
from nat_jax.input.sources import Source, open_source

_LENGTHS = (1_281_167, 10**9)  # records: ImageNet's, and many
_BATCH = 256

Stage = Callable[[], Any]

_READ, _WHOLE, _BYTES, _TFDS = "read", "a whole batch", "tfds, the bytes alone", "tfds, by TFDS"


class _Decoded:
    """A picture whose pixels are there already."""

    def __init__(self, pixels: np.ndarray):
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def pixels(self, shrink: int = 1) -> np.ndarray:
        return self._pixels


def time_stages(stages: dict[str, Stage], *, images: int, rounds: int) -> dict[str, float]:
    """Return the median processor time in us for one image, of functions that do so many."""
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for turn in range(rounds + 1):
        for name, stage in stages.items():
            begin = time.process_time()
            stage()
            if turn:  # the first one warms it up
                taken[name].append(time.process_time() - begin)
    return {
        name: float(f"{1e6 * statistics.median(seconds) / images:.4g}")
        for name, seconds in taken.items()
    }


def measure(sources: dict[str, str], *, rounds: int, seed: int) -> dict[str, dict[str, float]]:
    """Time the stages of training on photographs.

    Args:
        sources: by kind; "folder" must be among them.
        rounds: in turn.
        seed: of what is read.

    Returns:
        us for one image, by group and stage.
    """
    rng = np.random.default_rng(seed)
    opened = {kind: open_source(spec, "train") for kind, spec in sources.items()}
    folder = opened["folder"]
    count = min(_BATCH, len(folder))
    chosen = rng.choice(len(folder), count, replace=False).tolist()
    files = [bytes(folder[i]["image"]) for i in chosen]
    return {
        _READ: time_stages(_reads(opened, sources, chosen), images=count, rounds=rounds),
        "decode": time_stages(_decodes(files), images=count, rounds=rounds),
        "cut out and scale": time_stages(_cuts(files, rng), images=count, rounds=rounds),
        "order and chance": time_stages(_chances(), images=_BATCH, rounds=10 * rounds),
        _WHOLE: time_stages(_wholes(opened, seed, count), images=count, rounds=rounds),
    }


def parsing(stages: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return the share of a batch's time that goes into parsing the records of TFDS."""
    reads, whole = stages[_READ], stages[_WHOLE].get("tfds")
    if whole is None:
        return {}
    ours, theirs = reads["tfds"] - reads[_BYTES], reads[_TFDS] - reads[_BYTES]
    # Were it TFDS that parses, a batch would take so much longer.
    return {"ours": ours / whole, "by TFDS": theirs / (whole - ours + theirs)}


def _each(function: Callable[[Any], Any], arguments: Iterable[Any]) -> None:
    """Call a function again and again; keep no result, as memory that is new takes time."""
    for argument in arguments:
        function(argument)


def _reads(opened: dict[str, Source], specs: dict[str, str], chosen: list[int]) -> dict[str, Stage]:
    def read(source: Any) -> Stage:
        return lambda: _each(source.__getitem__, chosen)

    stages = {kind: read(source) for kind, source in opened.items()}
    if "tfds" in opened:
        import tensorflow_datasets as tfds
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        directory = input_data.tfds_directory(specs["tfds"])
        files = sorted(str(path) for path in directory.glob("*-train.array_record-*"))
        stages[_BYTES] = read(ArrayRecordDataSource(files))
        stages[_TFDS] = read(
            tfds.builder_from_directory(directory).as_data_source(
                split="train", decoders={"image": tfds.decode.SkipDecoding()}
            )
        )
    return stages


def _decodes(files: list[bytes]) -> dict[str, Stage]:
    def run(decoder: str) -> None:
        kept = decode.simplejpeg
        try:
            input_contenders.use_decoder(decoder)
            for data in files:
                np.asarray(decode.open_picture(data).pixels())
        finally:
            decode.simplejpeg = kept

    stages: dict[str, Stage] = {"Pillow": lambda: run("Pillow")}
    if decode.simplejpeg is not None:
        bare = decode.simplejpeg.decode_jpeg
        stages["simplejpeg"] = lambda: run("simplejpeg")
        stages["simplejpeg, called directly"] = lambda: _each(bare, files)
    return stages


def _cuts(files: list[bytes], rng: np.random.Generator) -> dict[str, Stage]:
    pictures = [_Decoded(decode.decode(data)) for data in files]

    def cut(crop: str, views: int, mirror: bool) -> Stage:
        transform = input_contenders.make_transform(crop)
        out = np.empty((len(pictures), views, SIZE, SIZE, 3), np.uint8)
        uniform = rng.random((len(pictures), views, transform.crop.draws)).tolist()
        mirrored = [mirror] * views

        def run() -> None:
            for picture, chance, place in zip(pictures, uniform, out, strict=True):
                transforms.cut(picture, transform, chance, mirrored, place)

        return run

    images = [Image.fromarray(picture.pixels()) for picture in pictures]
    square, bilinear = (SIZE, SIZE), Image.Resampling.BILINEAR

    def bare() -> None:
        for image in images:
            side = min(image.size) * SIZE / input_contenders.SHORT
            image.resize(square, bilinear, box=(0, 0, side, side))

    return {
        "random crop": cut("random_crop", 1, False),
        "random crop, mirrored": cut("random_crop", 1, True),
        "random crop, two views": cut("random_crop", 2, False),
        "random resized crop": cut("random_resized_crop", 1, False),
        "middle crop": cut("center_crop", 1, False),
        "of which Pillow's copy of the pixels": lambda: _each(
            lambda picture: Image.fromarray(picture.pixels()), pictures
        ),
        "of which Pillow's scaling": bare,
    }


def _chances() -> dict[str, Stage]:
    """Compare our shuffled order with grain's: where the images of a batch stand."""
    import grain
    from grain.experimental import index_shuffle

    positions = np.arange(_BATCH)
    stages: dict[str, Stage] = {}
    for length in _LENGTHS:
        key = counter_random.stream(0, 0)
        start = length // 2
        of = f"of {length:,} records"

        def mine(length: int = length, start: int = start, key: np.ndarray = key) -> Any:
            return counter_random.shuffled(start + positions, length, key)

        shuffled = grain.MapDataset.range(length).shuffle(seed=0)

        def theirs(start: int = start, shuffled: Any = shuffled) -> Any:
            return [shuffled[start + i] for i in range(_BATCH)]

        def bare(length: int = length, start: int = start) -> Any:
            return [
                index_shuffle(start + i, max_index=length - 1, seed=0, rounds=4)
                for i in range(_BATCH)
            ]

        stages[f"order {of}"] = mine
        stages[f"order {of}, grain's"] = theirs
        stages[f"order {of}, grain's, its C++ alone"] = bare
    key = counter_random.stream(0, 0, 1)
    stages["3 random numbers"] = lambda: counter_random.uniform(key, positions, 3)
    stages["22 random numbers"] = lambda: counter_random.uniform(key, positions, 22)
    return stages


def _wholes(opened: dict[str, Source], seed: int, count: int) -> dict[str, Stage]:
    transform = input_contenders.make_transform("random_crop")

    def batch(source: Source) -> Stage:
        def run() -> None:
            batches: Any = pipeline.train_batches(
                source,
                transform,
                batch_size=count,
                seed=seed,
                start_step=0,
                num_steps=1,
                threads=0,
            )
            next(batches)
            batches.close()

        return run

    return {kind: batch(source) for kind, source in opened.items()}
