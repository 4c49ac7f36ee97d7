"""More records than int32 numbers them are refused before anything of that size is made."""

from pathlib import Path

import pytest
from faulty_records import Faulty

from nat_jax.cli import config_files
from nat_jax.errors import UserError
from nat_jax.input import sources
from nat_jax.train import train_and_evaluate


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (2**31, "expected at most 2147483647, as their numbers are int32"),
        (2**31 - 1, "expected at most 2,147,389,440 records for a permutation that is sharded"),
    ],
)
def test_more_records_than_int32_numbers_are_refused(
    records: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_many(argument: str, split: str) -> Faulty:
        return Faulty(records if split == "train" else 100)

    monkeypatch.setitem(sources.SOURCES, "arrays", open_many)
    config = config_files.load("smoke.py").get_config()
    config.data.source, config.data.image_size = "arrays:many", 8
    with pytest.raises(UserError, match=message):
        train_and_evaluate(config, tmp_path / "run")
