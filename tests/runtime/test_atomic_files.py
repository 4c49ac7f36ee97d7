"""Files are replaced completely or not at all; the sizes of files in messages."""

import errno
import os
from pathlib import Path

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


@pytest.mark.parametrize(("number", "advice"), [(errno.ENOSPC, "Make room"), (errno.EROFS, "")])
def test_what_cannot_be_written_is_named_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    atomic_files.write(tmp_path / "file", b"old")

    def refuse(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(atomic_files.CannotWrite) as caught:
        atomic_files.write(tmp_path / "file", b"new")
    expected = f"cannot write {tmp_path / 'file'}: {os.strerror(number)}"
    assert str(caught.value).startswith(expected) and advice in str(caught.value)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
