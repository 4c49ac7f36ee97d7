"""The records that probes learn on and are scored on, and their features."""

import dataclasses
import itertools
import platform
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nat_jax import __version__
from nat_jax.errors import InputError, some_of
from nat_jax.evaluate.features import (
    Apply,
    Batch,
    Columns,
    Epoch,
    FeatureBatch,
    FeatureSet,
    TrainEpoch,
    extracted,
    featured,
    joined,
)
from nat_jax.evaluate.store import FeatureStore, check_room
from nat_jax.input import pipeline
from nat_jax.input.bad_records import BadRecords
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Source
from nat_jax.input.sources.subset import Subset
from nat_jax.input.transforms import Transform
from nat_jax.training.metrics import shown

_LESS = (
    "Lower eval.max_train or eval.max_features, name fewer eval.layers, or take a --workdir on a "
    "larger disk"
)
TRAIN, TEST = "train", "test"
_SHOWN = 5  # names of classes in a message


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A network or a baseline, as a function from images to features; a table has lines for it.

    Attributes:
        name: in the rows of tables.
        layers: the names of its features.
        apply: from some of the layers to a function from uint8[B, S, S, 3] to {layer: [B, ...]}.
        transform: brings images to it.
        fingerprint: what its features depend on besides the images, as JSON has it.
    """

    name: str
    layers: tuple[str, ...]
    apply: Callable[[tuple[str, ...]], Apply]
    transform: Transform
    fingerprint: Callable[[], Any]


class ProbeData:
    """Records to learn on and to be scored on."""

    def __init__(
        self,
        train: Source,
        test: Source,
        *,
        batch_size: int,
        reading: Mapping[str, Any],
        max_train: int = 0,
        seed: int = 0,
        cache: ImageCache,
        store: FeatureStore | None = None,
    ):
        """Prepare to read.

        Args:
            train: records that probes learn on.
            test: records that they are scored on.
            batch_size: of the images that are read at a time.
            reading: further arguments of ``pipeline.eval_batches``.
            max_train: at most so many of the former, drawn by seed; 0: all.
            seed: of that draw.
            cache: keeps decoded images from pass to pass.
            store: keeps features; None computes them in memory, once for each extractor.

        Raises:
            InputError: the two sources do not have the same classes.
        """
        self.num_classes = count_classes(train, test)
        if self.num_classes is not None:
            train, test = labelled(train), labelled(test)
        self.train, self.test = thinned(train, max_train, seed), test
        self._drawn = {"max": max_train, "seed": seed} if self.train is not train else None
        self._batch_size, self._reading = batch_size, reading
        self._cache, self._store = cache, store
        # {extractor: {split: {layer: features}}} without a store, while the extractor is in use.
        self._extracted: weakref.WeakKeyDictionary[
            FeatureExtractor, dict[str, dict[str, FeatureSet]]
        ] = weakref.WeakKeyDictionary()
        # One count over all passes, so that a bad record is reported once.
        self._bad = {source.split: BadRecords(len(source)) for source in (self.train, test)}

    @property
    def unlabelled(self) -> Source | None:
        """The source that has no classes; None if both have."""
        return next((s for s in (self.train, self.test) if s.num_classes is None), None)

    def describe(self) -> dict[str, Any]:
        """Return what results must share to be compared."""
        return {
            name: {
                "source": source.name,
                "split": source.split,
                "records": len(source),
                "fingerprint": source.fingerprint,
            }
            for name, source in ((TRAIN, self.train), (TEST, self.test))
        }

    def sets(
        self, extractor: FeatureExtractor
    ) -> tuple[dict[str, FeatureSet], dict[str, FeatureSet]]:
        """Return the features of all its layers to learn on, and those to be scored on."""
        return self.extract(extractor, TRAIN), self.extract(extractor, TEST)

    def extract(
        self, extractor: FeatureExtractor, split: str, layers: tuple[str, ...] | None = None
    ) -> dict[str, FeatureSet]:
        """Return features of every record that can be read, layer by layer.

        Args:
            extractor: computes them.
            split: "train" or "test".
            layers: some of its layers; all if None.

        Returns:
            {layer: features with record numbers}, mapped from files if there is a store; else kept
            in memory as long as the extractor exists.

        Raises:
            InputError: there is no record; or the disk has no room, which is found out with the
                first batch, and for the test records too when the training ones are asked for.
        """
        wanted = extractor.layers if layers is None else layers
        if self._store is None:
            known = self._extracted.setdefault(extractor, {}).setdefault(split, {})
            if missing := tuple(layer for layer in wanted if layer not in known):
                known |= joined(self._columns(extractor, split, missing))
            return {layer: features for layer, features in known.items() if layer in wanted}
        keys = {layer: self._key(extractor, split, layer) for layer in wanted}
        kept = ((layer, self._store.find(key)) for layer, key in keys.items())
        found = {layer: features for layer, features in kept if features is not None}
        keys = {layer: key for layer, key in keys.items() if layer not in found}
        if keys:
            columns = self._columns(extractor, split, tuple(keys))
            first = next(columns, None)
            if first is None:
                raise InputError(f"{split}: there is no record to take features of")
            records = len(self._source(split))
            if split == TRAIN and self._store.find(self._key(extractor, TEST, wanted[0])) is None:
                records += len(self.test)
            row_bytes = sum(first[layer].shape[1] * 4 + 8 for layer in keys)
            check_room(self._store.folder, records * row_bytes, _LESS)
            found |= self._store.write(keys, itertools.chain([first], columns))
        return {layer: found[layer] for layer in wanted}

    def batches(
        self, source: Source, transform: Transform, *, batch_size: int = 0, keep: bool = True
    ) -> Iterable[Batch]:
        """Read records in order, with ``index``.

        Args:
            source: one of the splits, or some of its records.
            transform: brings the images to the network.
            batch_size: 0 for the usual one.
            keep: images stay decoded in memory, and bad records are counted; of a split only.
        """
        return pipeline.eval_batches(
            source,
            transform,
            batch_size=batch_size or self._batch_size,
            cache=self._cache if keep else None,
            bad_records=self._bad[source.split] if keep else None,
            **self._reading,
        )

    def train_epochs(
        self, extractor: FeatureExtractor, augment: Transform, seed: int
    ) -> TrainEpoch:
        """Return a function from an epoch to the features of its augmented training images.

        Args:
            extractor: computes the features.
            augment: the random augmentation, which differs from epoch to epoch.
            seed: of the augmentation.
        """
        size = self.stream_batch
        steps = pipeline.steps_per_epoch(len(self.train), size)

        def epoch(number: int) -> Epoch:
            batches = pipeline.train_batches(
                self.train,
                augment,
                batch_size=size,
                seed=seed,
                start_step=number * steps,
                num_steps=(number + 1) * steps,
                cache=self._cache,
                bad_records=self._bad[self.train.split],
                **self._reading,
            )
            return Epoch(featured(extractor.apply(extractor.layers), batches), steps)

        return epoch

    @property
    def stream_batch(self) -> int:
        """Records in a batch of ``train_epochs``."""
        return min(self._batch_size, len(self.train))

    def test_views(
        self, extractor: FeatureExtractor, transform: Transform
    ) -> Iterator[FeatureBatch]:
        """Return the features of test images, of each of the views that a transform makes."""
        size = max(1, self._batch_size // transform.count)
        batches = self.batches(self.test, transform, batch_size=size, keep=False)
        title, total = f"{extractor.name}, views of test images", -(-len(self.test) // size)
        return featured(extractor.apply(extractor.layers), shown(batches, total, title))

    def images(self, split: str, records: np.ndarray, transform: Transform) -> np.ndarray:
        """Return some records' images uint8[n, S, S, 3]; one that cannot be read is grey."""
        chosen = Subset(self._source(split), records)
        parts = [batch["image"] for batch in self.batches(chosen, transform, keep=False)]
        return np.concatenate(parts)[: len(records)]

    def _source(self, split: str) -> Source:
        return {TRAIN: self.train, TEST: self.test}[split]

    def _columns(
        self, extractor: FeatureExtractor, split: str, layers: tuple[str, ...]
    ) -> Iterator[Columns]:
        """Yield the features of each batch as they are computed."""
        source = self._source(split)
        batches = self.batches(source, extractor.transform)
        title, total = f"{extractor.name}, {split} images", -(-len(source) // self._batch_size)
        for _, columns in extracted(extractor.apply(layers), shown(batches, total, title)):
            yield columns

    def _key(self, extractor: FeatureExtractor, split: str, layer: str) -> dict[str, Any]:
        return {
            "extractor": extractor.fingerprint(),
            "layer": layer,
            "transform": repr(extractor.transform),
            "batch_size": self._batch_size,
            "split": split,
            "drawn": self._drawn if split == TRAIN else None,
            "records": len(self._source(split)),
            "fingerprint": self._source(split).fingerprint,
            **_computer(),
        }


def _computer() -> dict[str, Any]:
    """Return what the last bits of features depend on, as JSON has it."""
    return {
        "nat_jax": __version__,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
        # A device gets its share of a batch, and another length rounds in another way.
        "devices": jax.local_device_count(),
        "machine": platform.machine(),
    }


def count_classes(train: Source, test: Source) -> int | None:
    """Return the number of classes; None where one of the sources is unlabelled.

    Raises:
        InputError: the two sources do not have the same classes.
    """
    if train.class_names is None or test.class_names is None:
        return None
    if train.class_names != test.class_names:
        only = {*train.class_names} ^ {*test.class_names}
        raise InputError(
            f"eval: expected the same classes in {train.name} and {test.name}; got "
            f"{train.num_classes} and {test.num_classes}, and in one of them only: "
            f"{some_of(sorted(only), _SHOWN) or 'none, but in another order'}"
        )
    return train.num_classes


def check_learnable(train: Source, test: Source) -> None:
    """Check that the training records are of several classes, and of all those of the test records.

    Raises:
        InputError: they are not, as far as the sources know it without reading the records.
    """
    names = train.class_names
    if names is None or test.class_names is None or train.labels is None:
        return
    advice = "To train without scores, set --config.eval.probes='()'"
    learned = {*np.unique(train.labels).tolist()} - {-1}
    asked = set() if test.labels is None else {*np.unique(test.labels).tolist()} - {-1}
    if unseen := asked - learned:
        lacking = some_of(sorted(names[i] for i in unseen), _SHOWN)
        raise InputError(
            f"eval: {test.name} has test records of {len(unseen)} class(es) without a training "
            f"record: {lacking}. Spell every class alike in both splits, or give each of them "
            f"training images. {advice}"
        )
    if len(learned) < 2:
        raise InputError(
            f"eval: expected training records of at least 2 classes in {train.name}; all are of "
            f"{some_of((names[i] for i in learned), _SHOWN)}. {advice}"
        )


def labelled(source: Source) -> Source:
    """Return the records that have a label, as far as the source knows without reading them."""
    if source.labels is None or (source.labels >= 0).all():
        return source
    return Subset(source, np.flatnonzero(source.labels >= 0))


def thinned(source: Source, most: int, seed: int) -> Source:
    """Return at most so many records of a source, drawn by seed; 0: all of them."""
    if not most or most >= len(source):
        return source
    rows = np.sort(np.random.default_rng(seed).choice(len(source), most, replace=False))
    return Subset(source, rows)
