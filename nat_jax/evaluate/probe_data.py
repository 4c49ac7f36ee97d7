"""The records that probes learn on and are judged on, and their features under what is judged."""

import dataclasses
import itertools
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nat_jax import __version__
from nat_jax.errors import InputError
from nat_jax.evaluate import features
from nat_jax.evaluate.feature_cache import Entry, FeatureCache, Key, Rows, entry_bytes, fingerprint
from nat_jax.evaluate.features import Apply, FeatureBatch, TrainEpoch, featured
from nat_jax.input import pipeline
from nat_jax.input.bad_records import BadRecords
from nat_jax.input.reader import ImageCache
from nat_jax.input.sources import Record, Source
from nat_jax.input.transforms import Transform

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

    def sets(
        self, subject: Subject
    ) -> tuple[dict[str, features.FeatureSet], dict[str, features.FeatureSet]]:
        """Return the features of all its layers to learn on, and those to be judged on."""
        train, test = (
            {layer: entry.data for layer, entry in self.extract(subject, split).items()}
            for split in (TRAIN, TEST)
        )
        return train, test

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

        Raises:
            ValueError: there is no record; or neither disk nor memory has room, which is found
                out with the first batch, and for the test records too when the training ones are
                asked for.
        """
        wanted = subject.layers if layers is None else layers
        if self._keep is None:
            return self._in_memory(*self._rows(subject, split, wanted))
        self._keep.serve(fingerprint([subject.fingerprint(), self.describe()]))
        found = self._found(self._keep, subject, split, wanted)
        missing = tuple(layer for layer in wanted if layer not in found)
        if missing:
            rows, index = self._rows(subject, split, missing)
            first = next(rows, None)
            if first is None:
                raise InputError(f"{split}: there is no record to take features of")
            widths = {layer: entry.data.features.shape[1] for layer, entry in found.items()}
            widths |= {layer: values.shape[1] for layer, values in first[0].items()}
            sizes = self._sizes(split, missing, widths)
            ahead = {}
            if split == TRAIN:
                there = self._found(self._keep, subject, TEST, wanted)
                ahead = self._sizes(TEST, [n for n in wanted if n not in there], widths)
            kept = self._keep.plan(sizes | ahead) & set(sizes)
            self._keep.make_room(sum(sizes[name] for name in kept))
            keys = {layer: self._key(subject, split, layer) for _, layer in kept}
            found |= self._computed(self._keep, keys, itertools.chain([first], rows), index)
        return {layer: found[layer] for layer in wanted}

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
        steps = pipeline.steps_per_epoch(len(self.train), size)

        def epoch(number: int) -> Iterator[FeatureBatch]:
            batches = pipeline.train_batches(
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

    def _found(
        self, keep: FeatureCache, subject: Subject, split: str, layers: Iterable[str]
    ) -> dict[str, Entry]:
        """Return those of some layers that are kept."""
        entries = {layer: keep.find(self._key(subject, split, layer)) for layer in layers}
        return {layer: entry for layer, entry in entries.items() if entry is not None}

    def _sizes(
        self, split: str, layers: Iterable[str], widths: Mapping[str, int]
    ) -> dict[tuple[str, str], int]:
        """Return the bytes of {(split, layer)}, from values per record."""
        records = len(self._source(split))
        return {(split, layer): entry_bytes(records, widths[layer]) for layer in layers}

    def _computed(
        self, keep: FeatureCache, keys: Mapping[str, Key], rows: Rows, index: list[np.ndarray]
    ) -> dict[str, Entry]:
        """Return the features of all rows: layers that have a key are kept, others in memory."""
        if not keys:
            return self._in_memory(rows, index)
        aside: deque[tuple[dict[str, np.ndarray], np.ndarray]] = deque()

        def split_rows() -> Rows:
            for layers, labels in rows:
                others = {name: values for name, values in layers.items() if name not in keys}
                aside.append((others, labels))
                yield {name: layers[name] for name in keys}, labels

        written = keep.write(keys, split_rows(), index)
        # Popping leaves the pieces to `joined`, which frees them as it goes.
        held = self._in_memory((aside.popleft() for _ in range(len(aside))), index)
        return {**written, **held}

    def _in_memory(self, rows: Rows, index: list[np.ndarray]) -> dict[str, Entry]:
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
            **_computer(),
        }

    def _batches(
        self, source: Source, transform: Transform, batch_size: int, *, keep: bool
    ) -> Iterable[Batch]:
        return pipeline.eval_batches(
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


def check_labels(train: Source, test: Source) -> int | None:
    """Return the number of classes; None where one of the sources is unlabelled.

    Raises:
        ValueError: the two sources do not have the same classes.
    """
    if train.num_classes is None or test.num_classes is None:
        return None
    if train.num_classes != test.num_classes or train.class_names != test.class_names:
        raise InputError(
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
