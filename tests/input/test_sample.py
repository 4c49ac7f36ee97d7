"""What is said of a sample of the records before training."""

import logging
from pathlib import Path

import numpy as np
import pytest
from pictures import encode
from PIL import Image
from sample_files import images, npz, write_tree

from nat_jax.input import sample
from nat_jax.input.sources import folder, open_source


def deep(high: int) -> bytes:
    return encode(np.linspace(3, high, 64).astype(np.uint16).reshape(8, 8), "PNG")


def said(root: Path, caplog: pytest.LogCaptureFixture, white: int = 0) -> list[tuple[str, str]]:
    source = open_source(f"folder:{root}")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        sample.log_sample(source, white)
    return [(r.levelname, r.getMessage().removeprefix(f"folder:{root}: ")) for r in caplog.records]


@pytest.mark.parametrize(
    ("high", "white", "level", "text"),
    [
        (4000, 0, "WARNING", "3..4000, and white is 65535 (data.white = 0), so 16 of 256 grey "),
        (4000, 0, "WARNING", "Set --config.data.white=4095 if"),
        (900, 0, "WARNING", "Set --config.data.white=1023 if"),
        (40_000, 0, "INFO", "3..40000, and white is 65535 (data.white = 0)"),
        (4000, 4095, "INFO", "3..4000, and white is 4095 (data.white = 4095)"),
        (4000, 1000, "WARNING", "white is 1000 (data.white = 1000), which larger values become"),
    ],
)
def test_the_range_of_sixteen_bits(
    high: int, white: int, level: str, text: str, tmp_path: Path, caplog
):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(deep(high))
    ((found, message),) = said(tmp_path, caplog, white)
    assert found == level and text in message
    assert message.startswith("16 of 16 sampled records have more than 8 bits; their values lie in")


def test_pages_that_are_left_out(tmp_path: Path, caplog):
    page = np.zeros((4, 4), np.uint8)
    pages = [Image.fromarray(page)] * 2
    for i in range(8):
        more = {"save_all": True, "append_images": pages} if i % 2 else {}
        (tmp_path / f"{i}.tif").write_bytes(encode(page, "TIFF", **more))
    ((level, message),) = said(tmp_path, caplog)
    rows = len(open_source(f"folder:{tmp_path}"))
    several = sum(int(name[0]) % 2 for name in paths(tmp_path))
    assert level == "WARNING" and "the first of each is used, the others are left out" in message
    assert message.startswith(
        f"{several} of {rows} sampled records have several pages or frames, {3 * several} in all"
    )


def paths(root: Path) -> list[str]:
    source = open_source(f"folder:{root}")
    return [source.record_name(i) for i in range(len(source))]


def test_files_of_eight_bits_are_no_matter(tmp_path: Path, caplog):
    page = np.zeros((4, 4, 3), np.uint8)
    for i, kind in enumerate(("PNG", "TIFF", "GIF", "JPEG", "BMP", "PPM") * 2):
        (tmp_path / f"{i}.{kind.lower()}").write_bytes(encode(page, kind))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and no more")
    assert said(tmp_path, caplog) == []
    ((level, message),) = said(tmp_path, caplog, white=4095)
    assert level == "WARNING" and "no effect, as no sampled record has more than 8 bits" in message


def test_no_jpeg_file_is_read(tmp_path: Path, monkeypatch, caplog):
    write_tree(tmp_path, [f"{i}.{suffix}" for i in range(9) for suffix in ("jpg", "JPEG", "jfif")])
    read = []
    get = folder.FolderSource.__getitem__

    def noted(self: folder.FolderSource, index: int) -> object:
        read.append(index)
        return get(self, index)

    monkeypatch.setattr(folder.FolderSource, "__getitem__", noted)
    assert said(tmp_path, caplog) == [] and read == []
    (tmp_path / "deep.png").write_bytes(deep(4000))
    (tmp_path / "more.png").write_bytes(deep(4000))
    assert len(said(tmp_path, caplog)) == 1 and 1 <= len(read) <= 2  # found among the others


def test_arrays_have_eight_bits(tmp_path: Path, caplog):
    source = open_source(npz(tmp_path / "a.npz", x=images(20, 4, 4)))
    with caplog.at_level(logging.INFO):
        sample.log_sample(source, 0)
    assert caplog.messages == []
