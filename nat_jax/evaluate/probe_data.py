"""The records that probes learn on and are judged on, and their features under what is judged."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from nat_jax import input_pipeline
from nat_jax.bad_records import BadRecords
from nat_jax.evaluate import features
from nat_jax.evaluate.feature_cache import Entry, FeatureCache
from nat_jax.evaluate.features import Apply
from nat_jax.evaluate.stream import FeatureBatch, TrainEpoch, featured
from nat_jax.image_reader import ImageCache
from nat_jax.preprocess import Transform
from nat_jax.records import Record, Source

Batch = Mapping[str, np.ndarray]

TRAIN, TEST = "train", "test"


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read: see ``input_pipeline.eval_batches``."""

    batch_size: int
    threads: int
    workers: int
    prefetch: int
    timeout: float


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """What is judged: anything that turns images into features.

    Attributes:
        name: in the rows of tables.
        layers: what it has to offer.
        apply: from some of the layers to a function from uint8[B, S, S, 3] to {layer: [B, ...]}.
        transform: brings images to it.
        fingerprint: what its features depend on beside the images, as JSON has it.
    """

    name: str
    layers: tuple[str, ...]
    apply: Callable[[tuple[str, ...]], Apply]
    transform: Transform
    fingerprint: Callable[[], Any]


class ProbeData:
    """Records to learn on and to judge on."""

    def __init__(
        self,
        train: Source,
        test: Source,
        *,
        reading: Reading,
        max_train: int = 0,
        seed: int = 0,
        cache: ImageCache,
        keep: FeatureCache | None = None,
    ):
        """Prepare to read.

        Args:
            train: records that probes learn on.
            test: records that they are judged on.
            reading: how.
            max_train: at most so many of the former, drawn by seed; 0: all.
            seed: of that draw.
            cache: keeps decoded images from pass to pass.
            keep: keeps features; None computes them each time.

        Raises:
            ValueError: the two sources do not have the same classes.
        """
        self.train, self.test = thinned(train, max_train, seed), test
        self.num_classes = check_labels(train, test)
        self._drawn = {"max": max_train, "seed": seed} if self.train is not train else None
        self._reading, self._cache, self._keep = reading, cache, keep
        # One count over all passes, so that a bad record is reported once.
        self._bad = {source.split: BadRecords(len(source)) for source in (self.train, test)}

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

    def extract(
        self, subject: Subject, split: str, layers: tuple[str, ...] | None = None
    ) -> dict[str, Entry]:
        """Return features of every record that can be read, layer by layer.

        Args:
            subject: what is judged.
            split: "train" or "test".
            layers: some of its layers; all if None.

        Returns:
            {layer: features and record numbers}, mapped from files where they are kept.
        """
        wanted = subject.layers if layers is None else layers
        if self._keep is None:
            return self._in_memory(*self._rows(subject, split, wanted))
        keys = {layer: self._key(subject, split, layer) for layer in wanted}
        found = {layer: self._keep.find(key) for layer, key in keys.items()}
        missing = tuple(layer for layer in wanted if found[layer] is None)
        if missing:
            rows, index = self._rows(subject, split, missing)
            first = next(rows, None)
            if first is None:
                raise ValueError(f"{split}: there is no record to take features of")
            rows = itertools.chain([first], rows)
            width = sum(values.shape[1] for values in first[0].values())
            if not self._keep.has_room(4 * width * len(self._source(split))):
                return {**found, **self._in_memory(rows, index)}  # type: ignore[dict-item]
            self._keep.write({layer: keys[layer] for layer in missing}, rows, index)
            found |= {layer: self._keep.find(keys[layer]) for layer in missing}
        return {layer: entry for layer, entry in found.items() if entry is not None}

    def batches(
        self, source: Source, transform: Transform, *, keep: bool = True
    ) -> Iterable[Batch]:
        """Read records in order, with ``index``; those of the splits are kept in memory."""
        return self._batches(source, transform, self._reading.batch_size, keep=keep)

    def train_epochs(
        self, subject: Subject, layers: tuple[str, ...], augment: Transform, seed: int
    ) -> TrainEpoch:
        """Return the features of an epoch of augmented training images, anew in each epoch.

        Args:
            subject: what is judged.
            layers: some of its layers.
            augment: what becomes of the images, by chance.
            seed: of the chance.
        """
        size = self.stream_batch
        steps = input_pipeline.steps_per_epoch(len(self.train), size)

        def epoch(number: int) -> Iterator[FeatureBatch]:
            batches = input_pipeline.train_batches(
                self.train,
                augment,
                batch_size=size,
                seed=seed,
                start_step=number * steps,
                num_steps=(number + 1) * steps,
                cache=self._cache,
                bad_records=self._bad[self.train.split],
                **self._how(),
            )
            shown = tqdm(
                batches, f"{subject.name}, epoch {number + 1}", steps, leave=False, disable=None
            )
            return featured(subject.apply(layers), shown)

        return epoch

    @property
    def stream_batch(self) -> int:
        """Records in a batch of ``train_epochs``."""
        return min(self._reading.batch_size, len(self.train))

    def test_views(
        self, subject: Subject, layers: tuple[str, ...], transform: Transform
    ) -> Iterator[FeatureBatch]:
        """Return the features of test images, of each of the views that a transform makes."""
        size = max(1, self._reading.batch_size // transform.count)
        return featured(
            subject.apply(layers), self._batches(self.test, transform, size, keep=False)
        )

    def images(self, split: str, records: np.ndarray, transform: Transform) -> np.ndarray:
        """Return some records' images uint8[n, S, S, 3]; one that cannot be read is grey."""
        chosen = Selection(self._source(split), records)
        batches = self._batches(chosen, transform, self._reading.batch_size, keep=False)
        parts = [batch["image"] for batch in batches]
        return np.concatenate(parts)[: len(records)]

    def _source(self, split: str) -> Source:
        return {TRAIN: self.train, TEST: self.test}[split]

    def _rows(
        self, subject: Subject, split: str, layers: tuple[str, ...]
    ) -> tuple[Iterator[tuple[dict[str, np.ndarray], np.ndarray]], list[np.ndarray]]:
        """Return rows as they are computed, and a list that fills with their record numbers."""
        source, index = self._source(split), []
        said = f"{subject.name}, {split}"
        bar = tqdm(None, said, len(source), unit="image", leave=False, disable=None)

        def noting() -> Iterator[Batch]:
            with bar:
                for batch in self.batches(source, subject.transform):
                    index.append(batch["index"][batch["weight"] > 0])
                    yield batch
                    bar.update(len(index[-1]))

        return features.extracted_rows(subject.apply(layers), noting()), index

    def _in_memory(
        self,
        rows: Iterable[tuple[Mapping[str, np.ndarray], np.ndarray]],
        index: list[np.ndarray],
    ) -> dict[str, Entry]:
        sets = features.joined(rows)
        records = np.concatenate(index)
        return {layer: Entry(data, records) for layer, data in sets.items()}

    def _key(self, subject: Subject, split: str, layer: str) -> dict[str, Any]:
        return {
            "subject": subject.fingerprint(),
            "layer": layer,
            "transform": repr(subject.transform),
            "batch_size": self._reading.batch_size,
            "split": split,
            "drawn": self._drawn if split == TRAIN else None,
            "records": len(self._source(split)),
            "fingerprint": self._source(split).fingerprint,
        }

    def _batches(
        self, source: Source, transform: Transform, batch_size: int, *, keep: bool
    ) -> Iterable[Batch]:
        return input_pipeline.eval_batches(
            source,
            transform,
            batch_size=batch_size,
            cache=self._cache if keep else None,
            bad_records=self._bad[source.split] if keep else None,
            **self._how(),
        )

    def _how(self) -> dict[str, Any]:
        how = dataclasses.asdict(self._reading)
        del how["batch_size"]
        return how


def check_labels(train: Source, test: Source) -> int | None:
    """Return the number of classes; None where one of the sources is unlabelled.

    Raises:
        ValueError: the two sources do not have the same classes.
    """
    if train.num_classes is None or test.num_classes is None:
        return None
    if train.num_classes != test.num_classes or train.class_names != test.class_names:
        raise ValueError(
            f"eval: expected the same classes in {train.name} and {test.name}; got "
            f"{train.num_classes} and {test.num_classes} ({train.class_names}, {test.class_names})"
        )
    return train.num_classes


class Selection:
    """Some records of a source, renumbered from 0."""

    def __init__(self, source: Source, rows: np.ndarray):
        self._source, self._rows = source, rows
        self.name, self.split = source.name, source.split
        self.class_names, self.num_classes = source.class_names, source.num_classes
        self.fingerprint = source.fingerprint
        self.labels = None if source.labels is None else source.labels[rows]

    def __len__(self) -> int:
        return len(self._rows)

    def record_name(self, index: int) -> str:
        return self._source.record_name(int(self._rows[index]))

    def __getitem__(self, index: int) -> Record:
        record = self._source[int(self._rows[index])]
        return Record(**{**record, "index": index})


def thinned(source: Source, most: int, seed: int) -> Source:
    """Return at most so many records of a source, drawn by seed; 0: all of them."""
    if not most or most >= len(source):
        return source
    rows = np.sort(np.random.default_rng(seed).choice(len(source), most, replace=False))
    return Selection(source, rows)
