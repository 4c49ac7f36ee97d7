"""Batches: order, resuming, views, what is kept in memory, bad records, faults of a source."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import faulty_records
import numpy as np
import pytest
from faulty_records import SIZE, picture
from pictures import encode

from nat_jax.input import transforms
from nat_jax.input.bad_records import Bad, BadRecordError, BadRecords, TooManyBadRecords
from nat_jax.input.pipeline import eval_batches, read_all, steps_per_epoch, train_batches
from nat_jax.input.reader import Batch, ImageCache
from nat_jax.input.sources import Record, Source, UnreadableRecord

PLAIN = transforms.eval_transform(image_size=SIZE)
RANDOM = transforms.train_transform(image_size=SIZE, pad=2)


class Fake(faulty_records.Faulty):
    """Made records; `damaged` has the images of some of them, or exceptions."""

    name = "fake"

    def __init__(self, count: int, damaged: dict[int, Any] | None = None):
        super().__init__(count)
        self.damaged = damaged or {}
        self.reads: Counter[int] = Counter()

    def __getitem__(self, index: int) -> Record:
        self.reads[index] += 1
        assert 0 <= index < self.count
        image = self.damaged.get(index, picture(index))
        if isinstance(image, Exception):
            raise image
        return {"index": index, "name": f"{index}.png", "label": index % 3, "image": image}


def train(source: Source, transform=RANDOM, **options) -> list[Batch]:
    defaults: dict[str, Any] = {"batch_size": 4, "seed": 0, "start_step": 0, "threads": 2}
    return list(train_batches(source, transform, **{**defaults, **options}))


def indices(batches: Iterable[Batch]) -> list[int]:
    return [int(i) for b in batches for i in b["index"]]


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys()
        and all(
            np.asarray(a[k]).dtype == np.asarray(b[k]).dtype and np.array_equal(a[k], b[k])
            for k in a
        )
        for a, b in zip(left, right, strict=True)
    )


def visits_once(order: list[int], count: int) -> bool:
    return len(set(order)) == len(order) and set(order) <= set(range(count))


def test_steps_per_epoch_drops_the_remainder():
    found = [steps_per_epoch(*x) for x in ((37, 4), (4, 4), (2**31 - 1, 256))]
    assert found == [9, 1, 8388607]
    with pytest.raises(ValueError, match=r"batch_size=8 .* 7 records; give at most 7, .*size=4$"):
        steps_per_epoch(7, 8)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        steps_per_epoch(7, 0)
    with pytest.raises(ValueError, match="expected at most 2147483647, as their numbers are int32"):
        steps_per_epoch(2**31, 256)


def test_a_batch_holds_what_the_source_holds():
    for batch in train(Fake(10), PLAIN, num_steps=4):
        assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
            "image": ("uint8", (4, SIZE, SIZE, 3)),
            "index": ("int32", (4,)),
            "label": ("int32", (4,)),
            "weight": ("float32", (4,)),
        }
        assert np.array_equal(batch["image"], [picture(int(i)) for i in batch["index"]])
        assert np.array_equal(batch["label"], batch["index"] % 3)
        assert (batch["weight"] == 1).all()


def test_each_epoch_visits_each_record_at_most_once_and_drops_others():
    order = indices(train(Fake(39), num_steps=9 * 6))
    epochs = [order[e * 36 : (e + 1) * 36] for e in range(6)]
    assert all(visits_once(epoch, 39) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    dropped = [set(range(39)) - set(epoch) for epoch in epochs]
    assert len(set(map(frozenset, dropped))) > 1
    # One batch too many in an epoch.
    assert not all(visits_once(order[i : i + 40], 39) for i in range(0, 160, 36))


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    def order(**options) -> list[int]:
        return indices(train(Fake(36), **{"num_steps": 18, "seed": 3, **options}))

    wanted = order()
    assert order(threads=0) == order(threads=5, prefetch=1) == wanted
    assert order(transform=PLAIN) == order(cache=ImageCache()) == wanted
    assert order(batch_size=12, num_steps=6) == wanted
    assert order(seed=4) != wanted
    assert wanted[:36] != wanted[36:]

    def pixels(**options) -> dict[int, bytes]:
        batches = train(Fake(36), **{"num_steps": 9, **options})
        rows = [zip(b["index"].tolist(), b["image"], strict=True) for b in batches]
        return {index: image.tobytes() for row in rows for index, image in row}

    first = pixels()
    assert pixels(batch_size=12, num_steps=3) == first
    for other in (pixels(start_step=9, num_steps=18), pixels(seed=1)):
        assert sum(first[i] == other[i] for i in range(36)) < 10


@pytest.mark.parametrize("cached", [False, True])
def test_any_number_of_processes_goes_on_where_another_stopped(cached: bool):
    def cache() -> ImageCache | None:
        return ImageCache() if cached else None

    whole = train(Fake(40), batch_size=8, num_steps=12, views=2, cache=cache())
    other_seed = train(Fake(40), batch_size=8, num_steps=12, views=2, seed=1)
    assert not same(other_seed, whole) and not same(whole[1:], whole[:-1])
    # A run of 4 processes, resumed in the middle of its first epoch by 2, then by 1, then by 4.
    for start, stop, count in ((0, 3, 4), (3, 6, 2), (6, 9, 1), (9, 12, 4)):
        shards = [
            train(
                Fake(40),
                batch_size=8,
                start_step=start,
                num_steps=stop,
                views=2,
                cache=cache(),
                process_index=process,
                process_count=count,
            )
            for process in range(count)
        ]
        assert all(len(b["index"]) == 8 // count for shard in shards for b in shard)
        together = [
            {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            for parts in zip(*shards, strict=True)
        ]
        assert same(together, whole[start:stop])
    assert train(Fake(40), batch_size=8, start_step=12, num_steps=12) == []
    for epoch in (whole[:5], whole[5:10]):
        assert visits_once(indices(epoch), 40)


RESIZED = transforms.train_transform(image_size=SIZE, crop="random_resized_crop")


@pytest.mark.parametrize(("transform", "cached"), [(RANDOM, True), (RESIZED, False)])
def test_views_are_independent_images_of_one_record(transform, cached: bool):
    options = {"num_steps": 9, "cache": ImageCache() if cached else None}
    one = train(Fake(36), transform, **options)
    two = train(Fake(36), transform, views=2, **options)
    three = train(Fake(36), transform, views=3, **options)
    assert two[0]["image"].shape == (4, 2, SIZE, SIZE, 3)
    equal = 0
    for a, b, c in zip(one, two, three, strict=True):
        for key in ("index", "label", "weight"):
            assert np.array_equal(a[key], b[key])
        assert np.array_equal(a["image"], b["image"][:, 0])
        assert np.array_equal(b["image"], c["image"][:, :2])
        equal += sum(np.array_equal(x[0], x[1]) for x in b["image"])
    assert equal < 8  # of 36


def test_cached_images_are_read_once_for_training_and_evaluation():
    source, cache = Fake(16), ImageCache()
    train(source, RANDOM, num_steps=12, cache=cache, threads=1)
    passed = list(eval_batches(source, PLAIN, batch_size=5, cache=cache))
    assert set(source.reads.values()) == {1} and len(source.reads) == 16
    assert same(passed, list(eval_batches(Fake(16), PLAIN, batch_size=5)))
    train(source, RANDOM, num_steps=12)
    assert set(source.reads.values()) == {4}


def test_the_cache_keeps_to_its_bound_and_tells_transforms_and_sources_apart():
    need = 16 * SIZE * SIZE * 3
    source, other = Fake(16), Fake(16, damaged={i: picture(100 + i) for i in range(16)})
    cache = ImageCache(max_bytes=2 * need - 1)
    for _ in range(2):
        for one in (source, other):
            batch = next(eval_batches(one, PLAIN, batch_size=16, cache=cache))
            offset = 0 if one is source else 100
            assert np.array_equal(batch["image"], [picture(offset + i) for i in range(16)])
    assert set(source.reads.values()) == {1} and set(other.reads.values()) == {2}
    smaller = transforms.eval_transform(image_size=3)
    assert next(eval_batches(source, smaller, batch_size=4, cache=cache))["image"].shape[1] == 3


def test_images_that_are_not_kept_cannot_be_on_the_device():
    options = {"threads": 1, "timeout": 60.0}
    assert read_all(Fake(8), RANDOM, ImageCache(8), **options) is None
    random = transforms.train_transform(image_size=SIZE, resize=9)
    assert read_all(Fake(8), random, ImageCache(), **options) is None


@pytest.mark.parametrize(("batch_size", "count"), [(4, 1), (5, 1), (8, 2), (40, 4)])
def test_evaluation_sees_every_record_exactly_once_in_order(batch_size: int, count: int):
    options = {"batch_size": batch_size, "process_count": count}
    shards = [
        list(eval_batches(Fake(20), PLAIN, process_index=process, **options))
        for process in range(count)
    ]
    assert all(len(b["index"]) == batch_size // count for shard in shards for b in shard)
    parts = [b for step in zip(*shards, strict=True) for b in step]
    found = {key: np.concatenate([b[key] for b in parts]) for key in parts[0]}
    rest = -20 % batch_size
    assert found["index"].tolist() == [*range(20), *[-1] * rest]
    assert found["label"].tolist() == [*np.arange(20) % 3, *[-1] * rest]
    assert found["weight"].tolist() == [1] * 20 + [0] * rest
    assert found["name"].tolist() == [f"{i}.png" for i in range(20)] + [""] * rest
    assert np.array_equal(found["image"][:20], [picture(i) for i in range(20)])
    assert (found["image"][20:] == 128).all()


def test_white_is_that_of_each_transform_also_in_one_cache():
    deep = [np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * i for i in range(9)]
    source = Fake(9, {i: encode(image, "PNG") for i, image in enumerate(deep)})
    cache = ImageCache()
    for white in (0, 255, 100):
        transform = transforms.eval_transform(image_size=SIZE, white=white)
        levels = [i * 255.0 / white + 0.5 if white else i >> 8 for i in deep]
        expected = np.minimum(levels, 255).astype(np.uint8)
        for kept in (None, cache):
            (batch,) = eval_batches(source, transform, batch_size=9, cache=kept)
            assert np.array_equal(batch["image"][..., 0], expected)
        assert np.array_equal(
            read_all(source, transform, cache, threads=1, timeout=9)[..., 0], expected
        )


UNREADABLE = UnreadableRecord("5.png", 2, "no permission")
BROKEN = {
    2: b"not an image",
    5: UNREADABLE,
    9: encode(picture(9), "PNG")[:60],
    11: np.zeros((0, 3, 3), "u1"),
}


@pytest.mark.parametrize(("cached", "resize"), [(False, 7), (True, 0)])
def test_bad_records_keep_their_place(cached: bool, resize: int, caplog):
    transform = transforms.train_transform(image_size=SIZE, resize=resize, pad=0 if resize else 2)
    options = {"num_steps": 30, "views": 2, "cache": ImageCache() if cached else None}
    bad = BadRecords(400)
    found = train(Fake(40, BROKEN), transform, bad_records=bad, **options)
    whole = train(Fake(40), transform, num_steps=30, views=2)
    assert indices(found) == indices(whole)
    for batch, good in zip(found, whole, strict=True):
        assert np.array_equal(batch["label"], good["label"])
        broken = np.isin(batch["index"], list(BROKEN))
        assert np.array_equal(batch["weight"], np.where(broken, 0, 1))
        assert (batch["image"][broken] == 128).all()
        assert np.array_equal(batch["image"][~broken], good["image"][~broken])
    assert bad.count == 4
    assert bad.summary() == (
        "4 of 400 records are bad: 2.png: not an image, or of a format that Pillow cannot read: it "
        "is of no known kind (it begins with 'not an image'); 5.png: no permission; 9.png: "
        + bad.summary().split("9.png: ")[1]
    )
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert sorted(r.args[0] for r in warnings) == ["11.png", "2.png", "5.png", "9.png"]


def test_bad_records_in_evaluation_are_masked_and_counted_again_from_the_cache():
    source, cache = Fake(400, BROKEN), ImageCache()
    for _ in range(2):
        bad = BadRecords(400)
        passed = list(eval_batches(source, PLAIN, batch_size=64, bad_records=bad, cache=cache))
        weight = np.concatenate([b["weight"] for b in passed])[:400]
        assert np.flatnonzero(weight == 0).tolist() == sorted(BROKEN)
        assert bad.count == 4
    assert set(source.reads.values()) == {1}


def test_too_many_bad_records_stop_the_run_with_the_first_names():
    damaged: dict[int, Any] = dict.fromkeys(range(3), b"x")
    train(Fake(300, damaged), num_steps=75)
    damaged[3] = b"x"
    with pytest.raises(TooManyBadRecords) as info:
        train(Fake(300, damaged), num_steps=75, threads=4)
    message = str(info.value)
    assert message.startswith("4 of 300 records are bad: 0.png: not an image")
    assert all(f"{i}.png" in message for i in range(4)) and "At most 3 may be (1 %)" in message


def test_few_records_may_have_one_bad_one():
    bad = BadRecords(7)
    assert bad.limit == 1 and bad.summary() == "0 of 7 records are bad"
    for _ in range(3):
        bad.add(Bad(4, "4.png", "empty"))
    with pytest.raises(TooManyBadRecords, match=r"2 of 7 records are bad: 4\.png: empty; 5\.png"):
        bad.add(Bad(5, "5.png", "empty"))
    many = BadRecords(1000)
    for i in range(8):
        many.add(Bad(i, f"{i}.png", "empty"))
    assert many.summary().endswith("4.png: empty; and 3 more")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (KeyError("oops"), r"record 5 of fake: KeyError\('oops'\)"),
        ({"index": 4, "name": "5.png", "label": 0, "image": picture(5)}, "says it is number 4"),
        ({"index": 5, "name": "5.png", "label": 0, "image": None}, r"5 \(5\.png\): TypeError"),
        ({"index": 5, "name": "5.png", "label": 0, "image": b"x"}, r"bad record 5 \(5\.png\): not"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_fault_in_a_source_ends_the_run_with_the_record(fault, message: str, cached: bool):
    class Faulty(Fake):
        def __getitem__(self, index: int) -> Record:
            if index == 5:
                if isinstance(fault, Exception):
                    raise fault
                return fault
            return super().__getitem__(index)

    steps_before = indices(train(Fake(40), num_steps=10)).index(5) // 4
    options = {"cache": ImageCache() if cached else None, "on_bad_record": "error"}
    assert len(train(Faulty(40), num_steps=steps_before, **options)) == steps_before
    with pytest.raises(BadRecordError, match=message):
        train(Faulty(40), num_steps=steps_before + 1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 41},
            "batch_size=41 is larger than the training data, which has 40 records",
        ),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"seed": 2**32}, "seed must be in"),
        ({"start_step": -1}, "start_step must be 0 or more, got -1"),
        ({"on_bad_record": "skip"}, "unknown on_bad_record 'skip'; known: grey, error"),
        ({"process_count": 3}, "batch_size=4 is not divisible by the 3 processes"),
        ({"process_index": 2, "process_count": 2}, r"process_index=2 is not in \[0, 2\)"),
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"pixels": False}, "fake: its images are not kept in memory, so pixels are needed"),
    ],
)
def test_wrong_arguments_are_refused_before_the_first_batch(options, message: str):
    arguments = {"transform": RANDOM, "batch_size": 4, "seed": 0, "start_step": 0, "num_steps": 5}
    source = Fake(40)
    with pytest.raises(ValueError, match=message):
        train_batches(source, **{**arguments, **options})
    assert not source.reads


@pytest.mark.parametrize(
    ("transform", "count", "batch_size", "message"),
    [
        (RANDOM, 4, 2, "must not be random"),
        (PLAIN, 0, 2, "fake has no records in its train split"),
        (PLAIN, 4, 0, "batch_size must be at least 1, got 0"),
    ],
)
def test_evaluation_refuses_randomness_and_nothing(transform, count, batch_size, message):
    with pytest.raises(ValueError, match=message):
        eval_batches(Fake(count), transform, batch_size=batch_size)


def test_threads_end_with_the_stream():
    def workers() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith("grain-prefetch")]

    stream = train_batches(
        Fake(40), RANDOM, batch_size=4, seed=0, start_step=0, num_steps=50, threads=4
    )
    for _ in range(3):
        next(stream)
    assert workers()
    stream.close()
    end = time.monotonic() + 20
    while workers() and time.monotonic() < end:
        time.sleep(0.01)
    assert not workers()
