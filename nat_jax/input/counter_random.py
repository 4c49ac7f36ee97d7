"""Counter-based random numbers on the host: hashes, shuffles, uniform draws.

They decide which record comes when and how it is augmented, in runs that are stopped and resumed on
other machines, with other versions of NumPy. So they are written out here, have no state, and must
return the same numbers in every version.
"""

import math

import numpy as np

_ROUNDS = 8


def hash64(values: np.ndarray) -> np.ndarray:
    """Hash numbers: one step of SplitMix64 from each as its state (Steele, Lea and Flood, 2014)."""
    return mix64(values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))


def mix64(z: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finaliser of uint64: a bijection that keeps zero.

    Every output bit depends on all input bits.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream(*numbers: int) -> np.ndarray:
    """Fold numbers, such as a seed and an epoch, into one key: uint64[1]."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = hash64(key + np.uint64(number))
    return key


def shuffled(positions: np.ndarray, count: int, key: np.ndarray) -> np.ndarray:
    """Evaluate a random permutation of range(count) at some positions, in constant memory.

    A Feistel network over Z_a x Z_b with a * b just above `count`, applied again while the result
    is outside (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).

    Args:
        positions: integers [b] in [0, count).
        count: length of the permutation.
        key: uint64[1] from `stream`; another key is another permutation.

    Returns:
        int64[b] in [0, count), different for different positions.
    """
    side = math.isqrt(count - 1) + 1
    a, b = np.uint64(side), np.uint64(-(-count // side))
    keys = hash64(key + np.arange(_ROUNDS, dtype=np.uint64))

    def once(x: np.ndarray) -> np.ndarray:
        left, right = np.mod(x, a), np.floor_divide(x, a)
        for i in range(0, _ROUNDS, 2):
            left = np.mod(left + np.mod(hash64(right ^ keys[i]), a), a)
            right = np.mod(right + np.mod(hash64(left ^ keys[i + 1]), b), b)
        return right * a + left

    x = once(positions.astype(np.uint64))
    while (outside := x >= count).any():
        x[outside] = once(x[outside])
    return x.astype(np.int64)


def uniform(key: np.ndarray, indices: np.ndarray, draws: int) -> np.ndarray:
    """Draw uniform numbers for each of some records, independent of the other records.

    Args:
        key: uint64[1] from `stream`.
        indices: integers [b], the records' numbers.
        draws: how many for each.

    Returns:
        float64 [b, draws] in [0, 1), multiples of 2**-53.
    """
    per_record = hash64(key + indices.astype(np.uint64))
    bits = hash64(per_record[:, None] + np.arange(draws, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53
