"""What the tests in several processes share."""

import functools

import processes
import pytest


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Return ``processes.start`` with images to train on."""
    images = processes.write_images(tmp_path_factory.mktemp("images") / "images.npz")
    return functools.partial(processes.start, images)
