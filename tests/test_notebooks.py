"""The notebooks run from top to bottom, store no outputs, and link to the project's address."""

import glob
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from project import ROOT, python
from run_notebook import code_cells

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
OURS = re.compile(
    r"https://(?P<colab>colab\.research\.google\.com/github/|github\.com/)"
    r"(?P<project>[\w.-]+/nat_jax)(?:/blob/main/(?P<path>[\w./-]+))?"
)
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = SETTINGS["project"]["urls"]["Repository"].removeprefix("https://github.com/")


def opened(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def wrong_addresses(text: str) -> list[str]:
    """Return the links to this project that lead to another address, or to no file of it."""
    return [
        link[0]
        for link in OURS.finditer(text)
        if link["project"] != PROJECT or not (ROOT / (link["path"] or "")).exists()
    ]


def faults(notebook: dict[str, Any]) -> list[str]:
    """Return what a notebook stores besides its cells, and where it breaks the format."""
    found = []
    if (notebook["nbformat"], notebook["nbformat_minor"]) != (4, 5):
        found.append("the format is not 4.5")
    if notebook["metadata"] != METADATA:
        found.append("the metadata hold more than the language")
    names = [cell.get("id", "") for cell in notebook["cells"]]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-]{1,64}", n) for n in names):
        found.append("cells lack an id of their own")
    for cell in notebook["cells"]:
        if cell["metadata"]:
            found.append(f"{cell['id']}: metadata")
        if cell["cell_type"] == "code" and (cell["outputs"] or cell["execution_count"]):
            found.append(f"{cell['id']}: an output is stored")
    return found


def run(path: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a notebook as a program in a folder; its pictures go to ``folder/pictures``."""
    (folder / "pictures").mkdir()
    program = ROOT / "tests" / "run_notebook.py"
    return python(program, path, "pictures", cwd=folder, code=None, **environment)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_stores_its_cells_alone(path: Path) -> None:
    assert faults(opened(path)) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"metadata": {**METADATA, "colab": {}}}, "metadata"),
        ({"outputs": [{"output_type": "stream", "name": "stdout", "text": "1"}]}, "output"),
        ({"id": "cell-0"}, "id"),
    ],
)
def test_what_else_is_stored_is_found(change: dict[str, Any], fault: str) -> None:
    notebook = opened(NOTEBOOKS[0])
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for key, value in change.items():
        (notebook if key in notebook else code)[key] = value
    (found,) = faults(notebook)
    assert fault in found


def test_the_first_code_cell_is_the_same_in_all() -> None:
    first = {code_cells(opened(path))[0] for path in NOTEBOOKS}
    assert len(first) == 1
    assert f'ADDRESS = "https://github.com/{PROJECT}"\n' in first.pop()


def start(
    monkeypatch: pytest.MonkeyPatch, machine: str, jax_finds: str, preinstalled: str = ""
) -> list[list[str]]:
    """Run the first cell where nat_jax is not installed; return the arguments of each call of pip.

    Args:
        monkeypatch: replaces what the cell looks at.
        machine: the machine; one that is "cut off" cannot install anything.
        jax_finds: the backend of JAX once everything is installed.
        preinstalled: version and backend of a JAX that is there before; pip can keep no 0.4.
    """
    calls: list[list[str]] = []

    def call(words: str | list[str], **_: Any) -> int:
        if words == "nvidia-smi":
            return int(machine == "broken gpu")
        calls.append(words[words.index("--quiet") + 1 :])
        return int(machine == "cut off" or any(word.startswith("jax==0.4") for word in words))

    def run(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(stdout=preinstalled)

    jax = SimpleNamespace(__version__="0", default_backend=lambda: jax_finds, devices=list)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda tool: tool if "gpu" in machine else None)
    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(glob, "glob", lambda _: ["accel0"] if machine == "tpu" else [])
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if machine == "gpu, not wanted":
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    exec(code_cells(opened(NOTEBOOKS[0]))[0], {})
    return [[word.partition(" @ ")[0] for word in words] for words in calls]


@pytest.mark.parametrize(
    ("machine", "backend", "preinstalled", "calls"),
    [
        ("cpu", "cpu", "", [["nat_jax"]]),
        ("gpu", "gpu", "", [["nat_jax[cuda12]"]]),
        ("tpu", "tpu", "", [["nat_jax[tpu]"]]),
        ("broken gpu", "cpu", "", [["nat_jax"]]),
        ("gpu, not wanted", "cpu", "", [["nat_jax"]]),
        ("gpu", "gpu", "0.7.2 gpu\n", [["nat_jax", "jax==0.7.2"]]),
        ("gpu", "gpu", "0.4.38 gpu\n", [["nat_jax", "jax==0.4.38"], ["nat_jax[cuda12]"]]),
        ("gpu", "gpu", "0.7.2 cpu\n", [["nat_jax[cuda12]"]]),
    ],
)
def test_the_first_cell_installs_what_the_machine_needs(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    backend: str,
    preinstalled: str,
    calls: list[list[str]],
) -> None:
    assert start(monkeypatch, machine, backend, preinstalled) == calls


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ("cut off", "pip cannot install nat_jax from .* a clone"),
        ("gpu", "has a gpu, and JAX found cpu"),
        ("tpu", "has a tpu, and JAX found cpu"),
    ],
)
def test_the_first_cell_stops_with_a_message(
    monkeypatch: pytest.MonkeyPatch, machine: str, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        start(monkeypatch, machine, "cpu")


def test_every_notebook_has_its_badge() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    for path in NOTEBOOKS:
        title = "".join(opened(path)["cells"][0]["source"])
        for text in (readme, title):
            badges = [link["path"] for link in OURS.finditer(text) if "colab" in link["colab"]]
            assert f"notebooks/{path.name}" in badges


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS],
    ids=lambda path: path.name,
)
def test_addresses_agree(path: Path) -> None:
    assert wrong_addresses(path.read_text("utf-8")) == []


def test_a_wrong_address_is_found() -> None:
    other = "https://github.com/somebody/nat_jax"
    gone = f"https://colab.research.google.com/github/{PROJECT}/blob/main/notebooks/4.ipynb"
    right = f"https://github.com/{PROJECT}/blob/main/README.md"
    assert wrong_addresses(f"see [this]({other}), [this]({gone}), [this]({right})") == [other, gone]


def test_a_notebook_shows_its_pictures_and_stops_at_an_error(tmp_path: Path) -> None:
    cells = [
        "from matplotlib import pyplot as plt\n\nplt.plot([1, 2])\nplt.show()",
        "from PIL import Image\n\nImage.new('RGB', (3, 2))",
        "2 + 2",
        "1 / 0",
        "print('not reached')",
    ]
    notebook = {"cells": [{"cell_type": "code", "source": text} for text in cells]}
    path = tmp_path / "five.ipynb"
    path.write_text(json.dumps(notebook), "utf-8")
    done = run(path, tmp_path)
    assert done.returncode != 0 and "five.ipynb, code cell 4" in done.stderr
    assert done.stdout == "4\n"
    drawn = sorted(picture.name for picture in (tmp_path / "pictures").iterdir())
    assert drawn == ["01_1.png", "02.png"]


# What takes long in a notebook, and what the test does instead.
SHORTER = {
    "1_predicting_noise": {
        "c.batch_size = 30.0,": "c.batch_size = 4.0,",
        "c.epochs = 0.2 if": "c.epochs = 0.02 if",
        "c.eval.max_train = 5_000": "c.eval.max_train = 500",
    },
    "2_assignment": {"SIZES = (32, 64, 128, 256, 512)": "SIZES = (32, 64)"},
    "3_your_images": {"c.batch_size = 25.0,": "c.batch_size = 1.0,"},
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """On embedded data; on CIFAR-10 too where it is next to the checkout."""
    text = path.read_text("utf-8")
    for shown, shorter in SHORTER[path.stem].items():
        assert text.count(shown) == 1
        text = text.replace(shown, shorter)
    path = tmp_path / path.name
    path.write_text(text, "utf-8")
    cifar = ROOT.parent / "shared" / "data" / "cifar10.zip"
    has_photos = cifar.exists() and path.stem == "1_predicting_noise"
    done = run(path, tmp_path, NAT_JAX_CIFAR10=str(cifar) if has_photos else "", NAT_JAX_IMAGES="")
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = list((tmp_path / "pictures").iterdir())
    assert len(pictures) >= 2
    for picture in pictures:
        assert np.asarray(Image.open(picture)).std() > 1, f"{picture.name} shows nothing"
