"""A bundle: a network, its weights, its image preprocessing and its provenance.

The folder holds ``bundle.json``, ``weights.npz``, possibly programs (``nat_jax.export.program``),
and ``SHA256SUMS``, which ``sha256sum -c SHA256SUMS`` checks too. It is written to a
temporary folder and renamed, so a bundle is either complete or absent.
"""

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from PIL import Image

from nat_jax import models
from nat_jax.errors import UserError
from nat_jax.input.decode import open_picture
from nat_jax.input.transforms import Transform, decode_and_crop, eval_transform
from nat_jax.models.frozen import FrozenModel, resolve_layers
from nat_jax.runtime import atomic_files

FORMAT = 1  # of bundle.json; raised when its meaning changes
CARD, WEIGHTS, SUMS = "bundle.json", "weights.npz", "SHA256SUMS"

_BATCH = 256


class BundleError(UserError, RuntimeError):
    """A bundle cannot be read or written; the message names the fault."""


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle(FrozenModel):
    """A frozen network with its image preprocessing and its provenance.

    Attributes:
        arguments: those of ``models.make_model`` that make its definition, but for the platform.
        resize: shortest side of an image before the centre crop; 0: the complete image is scaled.
        white: the value that is white in images of more than 8 bits; 0: 65535.
        config: the config of its run, as JSON has it.
        run: seed, step (0: untrained), and the data that it was trained on.
    """

    arguments: Mapping[str, Any]
    resize: int
    config: Mapping[str, Any]
    run: Mapping[str, Any]
    white: int = 0

    def __call__(
        self,
        images: np.ndarray,
        layer: str = "z",
        *,
        max_features: int | None = None,
        batch_size: int = _BATCH,
    ) -> np.ndarray:
        """Return images' features, in evaluation mode.

        Args:
            images: uint8[B, S, S, 3], RGB, of the size that ``preprocess`` returns.
            layer: "z", "conv1", ..., or "last_conv"; see ``model.layer_names``.
            max_features: average-pool feature maps of more values to at most this many, as the
                probes do with ``eval.max_features``; None leaves them as they are.
            batch_size: images computed at a time; bounds the memory of the device.

        Returns:
            float32[B, D] for "z", of unit norm; [B, F] for fully connected layers; [B, h, w, C] for
            convolutions, after ReLU and pooling.

        Raises:
            ValueError: images of another type or shape, or an unknown layer.
        """
        size = self.model.image_size
        expected = f"expected uint8 [B, {size}, {size}, 3]"
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            kind = getattr(images, "dtype", type(images).__name__)
            raise ValueError(f"images: {expected}, in RGB from 0 to 255; got {kind}")
        if images.shape[1:] != (size, size, 3):
            raise ValueError(
                f"images: {expected}; got {list(images.shape)}. Make them with preprocess(image)"
            )
        if not len(images):
            raise ValueError(f"images: {expected}; got none")
        (name,) = resolve_layers((layer,), self.model, "layer")
        extract = self.extractor((name,), max_features)
        found = [
            np.asarray(extract(part)[name], np.float32)[:length]
            for part, length in _padded_batches(images, batch_size)
        ]
        return np.concatenate(found)

    def preprocess(
        self, image: str | os.PathLike[str] | bytes | np.ndarray | Image.Image
    ) -> np.ndarray:
        """Resize and crop an image as in evaluation.

        Args:
            image: a file's path or its bytes, a PIL image, or uint8 [H, W] or [H, W, 1|3|4].

        Returns:
            uint8[S, S, 3].

        Raises:
            BadImage: it cannot be decoded.
        """
        if isinstance(image, str | os.PathLike):
            image = Path(image).read_bytes()
        transform = self.transform
        out = np.empty((1, transform.size, transform.size, 3), np.uint8)
        decode_and_crop(open_picture(image, transform.white), transform, [()], out)
        return out[0]

    @property
    def transform(self) -> Transform:
        """The preprocessing of images for this network."""
        return eval_transform(
            image_size=self.model.image_size, resize=self.resize, white=self.white
        )

    def save(
        self, folder: str | os.PathLike[str], extras: Mapping[str, bytes] | None = None
    ) -> Path:
        """Write the bundle, replacing an existing one.

        Args:
            folder: where; missing, empty, or an older bundle.
            extras: further files, such as programs, by name.

        Returns:
            The folder.

        Raises:
            BundleError: the folder holds something else, or cannot be written.
        """
        place = Path(folder).expanduser()
        files = {CARD: atomic_files.as_json(self._card()), WEIGHTS: self._weights()} | dict(
            extras or {}
        )
        try:
            if place.exists() and any(place.iterdir()) and not (place / CARD).exists():
                raise BundleError(f"{place} holds something else; name an empty or a new folder")
            with atomic_files.replacing(place) as partial:
                partial.mkdir()
                for name, data in files.items():
                    (partial / name).write_bytes(data)
                sums = {name: atomic_files.sha256(partial / name) for name in files}
                (partial / SUMS).write_bytes(atomic_files.sums_text(sums))
        except OSError as error:
            raise BundleError(f"bundle: {error}") from error
        return place

    def layer_shapes(self) -> dict[str, list[int]]:
        """Return the shape of every layer's output for one image."""
        size = self.model.image_size
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        outputs, _ = jax.eval_shape(self.model.apply, self.params, self.batch_stats, image)
        return {name: list(outputs[name].shape[1:]) for name in self.model.layer_names}

    def _card(self) -> dict[str, Any]:
        from nat_jax import __version__

        return {
            "format": FORMAT,
            "nat_jax": __version__,
            "model": dict(self.arguments),
            "images": {
                "image_size": self.model.image_size,
                "resize": self.resize,
                "white": self.white,
            },
            "layers": self.layer_shapes(),
            "run": dict(self.run),
            "config": dict(self.config),
        }

    def _weights(self) -> bytes:
        file = io.BytesIO()
        np.savez(file, **self.named_weights())  # type: ignore[arg-type]
        return file.getvalue()


def load(folder: str | os.PathLike[str], *, platform: str | None = None) -> Bundle:
    """Open a bundle and check every byte of it.

    Args:
        folder: as ``Bundle.save`` or the task ``export`` wrote it.
        platform: "cpu", "gpu" or "tpu"; the default backend if None.

    Raises:
        BundleError: it is missing, damaged, incomplete, or of another version.
    """
    place = Path(folder).expanduser()
    _check_files(place)
    card = json.loads((place / CARD).read_text())
    if card["format"] != FORMAT:
        raise BundleError(
            f"{place} was written by another version of nat_jax (format {card['format']}; this one "
            f"reads {FORMAT}). Open it with nat_jax {card['nat_jax']}"
        )
    try:
        model = models.make_model(**card["model"], platform=platform)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{place}: its network cannot be made: {error}") from error
    with np.load(place / WEIGHTS) as file:
        weights = {name: file[name] for name in file.files}
    _check_weights(place, model, weights)
    parts = traverse_util.unflatten_dict(weights, sep="/")
    return Bundle(
        model,
        parts["params"],
        parts["batch_stats"],
        arguments=card["model"],
        resize=card["images"]["resize"],
        white=card["images"].get("white", 0),
        config=card["config"],
        run=card["run"],
    )


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder looks like a bundle, possibly a damaged one."""
    return any((Path(folder).expanduser() / name).exists() for name in (CARD, SUMS, WEIGHTS))


def _check_files(place: Path) -> None:
    """Raise BundleError unless the files are those that were written, to the byte."""
    again = "Copy it again, or export it again (--config.task=export)"
    if not place.is_dir():
        raise BundleError(f"there is no folder {place.absolute()}; expected that of a bundle")
    if not is_bundle(place):
        raise BundleError(
            f"{place} is not a bundle: it has no {CARD}. A run's folder becomes one with "
            "--config.task=export"
        )
    try:
        text = (place / SUMS).read_text()
        lines = (line.partition("  ") for line in text.splitlines())
        sums = {name: digest for digest, _, name in lines}
        for name in (CARD, WEIGHTS, *sums):
            if not (place / name).is_file():
                raise BundleError(f"{place} is incomplete: {name} is missing. {again}")
            if sums.get(name) != atomic_files.sha256(place / name):
                raise BundleError(f"{place} is damaged: {name} does not match {SUMS}. {again}")
        if atomic_files.sums_text(sums) != text.encode():
            raise BundleError(f"{place} is damaged: {SUMS} was changed. {again}")
    except (OSError, ValueError) as error:  # the text is no UTF-8, or a name is no file's
        raise BundleError(f"{place} cannot be read: {SUMS}: {error}. {again}") from error


def _check_weights(place: Path, model: models.Model, weights: Mapping[str, np.ndarray]) -> None:
    params, batch_stats = jax.eval_shape(model.init, jax.random.key(0))
    wanted = traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats}, sep="/")
    for name in sorted(wanted.keys() | weights.keys()):
        there, here = (
            f"{found[name].dtype}{list(found[name].shape)}" if name in found else "nothing"
            for found in (weights, wanted)
        )
        if there != here:
            raise BundleError(f"{place}: {name}: expected {here}, as its network has; got {there}")


def _padded_batches(images: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield padded batches and the number of valid rows of each.

    The last one is padded to the others' length, a lone one to a power of two: few shapes are
    compiled, and images are computed in batches of the length in which they were judged.
    """
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        length = batch_size if start else min(batch_size, 1 << (len(part) - 1).bit_length())
        padding = np.zeros((length - len(part), *part.shape[1:]), np.uint8)
        yield (np.concatenate([part, padding]) if len(padding) else part), len(part)
