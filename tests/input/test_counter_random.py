import numpy as np
import pytest

from nat_jax.input.counter_random import hash64, shuffled, stream, uniform


def permutation(count: int, *key: int) -> np.ndarray:
    return shuffled(np.arange(count), count, stream(*key))


def test_hash64_is_splitmix64():
    # The published generator's first outputs for the seed 1234567: its state is a running sum.
    increment = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * increment) % 2**64 for k in range(3)], np.uint64)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert hash64(states).tolist() == expected


def test_streams_differ_by_every_number_and_its_place():
    keys = {int(stream(*n)[0]) for n in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 1)]}
    assert len(keys) == 7


@pytest.mark.parametrize("count", [*range(1, 40), 1000, 1024, 1025, 1437, 65_537])
def test_shuffled_is_a_permutation(count: int):
    for epoch in range(3):
        assert np.array_equal(np.sort(permutation(count, 5, epoch)), np.arange(count))


def test_parts_of_a_permutation_are_those_of_the_whole():
    whole = permutation(1437, 5, 0)
    assert np.array_equal(shuffled(np.arange(300, 428), 1437, stream(5, 0)), whole[300:428])


def test_a_position_of_a_huge_data_set_needs_no_memory():
    count = 10**12
    found = shuffled(np.arange(1000) * 10**9, count, stream(0))
    assert len(np.unique(found)) == 1000 and found.min() >= 0 and found.max() < count
    assert abs(found.mean() / count - 0.5) < 0.05


def spread(permutations: np.ndarray) -> float:
    """Give chi squared, over its expectation, of how often each place holds each number."""
    epochs, count = permutations.shape
    seen = np.zeros((count, count))
    for one in permutations:
        seen[np.arange(count), one] += 1
    expected = epochs / count
    return float(np.square(seen - expected).sum() / expected / (count - 1) ** 2)


@pytest.mark.parametrize("count", [7, 10, 16, 61])
def test_every_place_holds_every_number_equally_often(count: int):
    permutations = np.stack([permutation(count, 0, e) for e in range(40 * count)])
    # The standard deviation of this ratio is sqrt(2) / (count - 1).
    assert abs(spread(permutations) - 1) < 5 * 2**0.5 / (count - 1)
    lazy = permutations.copy()
    lazy[: len(lazy) // 2] = np.roll(np.arange(count), 1)
    assert spread(lazy) > 2


def test_uniform_draws_are_uniform_and_independent():
    numbers = uniform(stream(7, 2), np.arange(20_000), 3)
    assert numbers.shape == (20_000, 3) and numbers.min() >= 0 and numbers.max() < 1
    for draw in numbers.T:
        counts = np.histogram(draw, bins=20, range=(0, 1))[0]
        assert abs(counts - 1000).max() < 150
    assert abs(np.corrcoef(numbers.T) - np.eye(3)).max() < 0.03
    following = uniform(stream(7, 3), np.arange(20_000), 3)
    assert abs(np.corrcoef(numbers[:, 0], following[:, 0])[0, 1]) < 0.03


def test_a_record_draws_its_own_numbers():
    whole = uniform(stream(1), np.arange(50), 2)
    assert np.array_equal(uniform(stream(1), np.array([31, 4]), 2), whole[[31, 4]])
    assert uniform(stream(1), np.arange(3), 0).shape == (3, 0)
