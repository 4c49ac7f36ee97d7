"""The rivals of ``benchmarks/input_pipeline.py``, each in its own environment: PyTorch, tf.data.

Run by ``input_turns.py`` with a JSON argument: rival, folder, batch, workers, crop, seed. Both read
the same files, scale the shorter side to 256 and cut out 224 at random (or take an Inception-style
crop), flip half of the images, and give uint8 batches.
"""

import json
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from input_serve import serve, stream_turn, whole_turn

SIZE, SHORT = 224, 256


def torch_loader(spec: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], dict]]:
    """Set up a DataLoader over ImageFolder, with Pillow."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        # A torchvision for GPUs beside a torch for CPUs: its compiled operators do not load. None
        # of them is used here, but torchvision wants to describe them.
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        described = "torchvision._meta_registrations"
        sys.modules[described] = types.ModuleType(described)
        import torchvision
    import PIL
    from torchvision import datasets, transforms

    class Shuffle(torch.utils.data.Sampler):
        """As many positions as are asked for, in epochs of random order."""

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

    if spec["crop"] == "random_crop":
        crop = [transforms.Resize(SHORT), transforms.RandomCrop(SIZE)]
    else:
        crop = [transforms.RandomResizedCrop(SIZE)]
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
        return whole_turn(lambda: sum(len(batch) for batch, _ in loader))

    about = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return {**about, "pillow": PIL.__version__, "decoder": "Pillow"}, turn


def tf_data(spec: dict[str, Any]) -> tuple[dict[str, Any], Callable[[int], dict]]:
    """Set up a tf.data pipeline; `threads` None leaves the parallelism to AUTOTUNE."""
    import tensorflow as tf

    parallel = tf.data.AUTOTUNE if spec["threads"] is None else spec["threads"]

    def region(height: Any, width: Any) -> tuple[Any, Any, Any]:
        """Draw what of the image is cut out, before scaling: top, left and side."""
        side = tf.minimum(height, width) * SIZE // SHORT
        top = tf.random.uniform([], 0, height - side + 1, tf.int32)
        left = tf.random.uniform([], 0, width - side + 1, tf.int32)
        return top, left, side

    def load(path: Any) -> Any:
        data = tf.io.read_file(path)
        if spec["fused"]:
            # Decodes little more than what is cut out, then scales that.
            shape = tf.io.extract_jpeg_shape(data)
            top, left, side = region(shape[0], shape[1])
            image = tf.io.decode_and_crop_jpeg(data, [top, left, side, side], channels=3)
            image = tf.image.resize(image, [SIZE, SIZE], antialias=True)
        else:
            image = tf.io.decode_jpeg(data, channels=3)
            size = tf.shape(image)[:2]
            scaled = tf.maximum(SHORT, size * SHORT // tf.reduce_min(size))
            image = tf.image.resize(image, scaled, antialias=True)
            image = tf.image.random_crop(image, [SIZE, SIZE, 3])
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8)

    files = sorted(str(path) for path in Path(spec["folder"]).glob("*/*"))
    data = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files), seed=spec["seed"])
    data = data.repeat().map(load, num_parallel_calls=parallel)
    data = data.batch(spec["batch"], drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.autotune.ram_budget = 2**29  # it would go on filling half of the memory between turns
    options.experimental_optimization.inject_prefetch = False
    if spec["threads"] is not None:
        options.threading.private_threadpool_size = spec["threads"]
    data = data.with_options(options)
    batches = iter(data)

    def turn(count: int) -> dict[str, float]:
        # One iterator for all turns: a new one would tune itself anew.
        return stream_turn(batches, count // spec["batch"], spec["batch"])

    return {"tensorflow": tf.__version__, "decoder": "libjpeg-turbo (TensorFlow's)"}, turn


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    rivals = {"torch": torch_loader, "tf.data": tf_data}
    serve(lambda: rivals[arguments["rival"]](arguments))
