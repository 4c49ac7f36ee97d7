"""The sizes of files in messages."""

import pytest

from nat_jax.runtime import atomic_files


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (14_200, "14.2 kB"),
        (999_900, "1 MB"),
        (1_390_000, "1.39 MB"),
        (2.5e9, "2.5 GB"),
        (1.2345e12, "1,234 GB"),
    ],
)
def test_sizes_have_a_fitting_unit(count: float, text: str) -> None:
    assert atomic_files.size_text(count) == text
