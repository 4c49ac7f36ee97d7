"""The config files that come with the library."""

import functools
import importlib.util
from pathlib import Path
from types import ModuleType


def packaged() -> Path:
    """Return the folder of the configs that come with the library.

    Next to the package in a checkout, inside it if it was installed from a wheel.
    """
    inside = Path(__file__).parents[1] / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "configs"


def known() -> dict[str, Path]:
    """Return the packaged configs by name: "configs/digits.py", "configs/paper/suite.py"."""
    top = packaged()
    paths = (*sorted(top.glob("[!_]*.py")), *sorted(top.glob("*/[!_]*.py")))
    return {f"configs/{path.relative_to(top).as_posix()}": path for path in paths}


@functools.cache
def load(name: str) -> ModuleType:
    """Return the module of a packaged config: of "alexnet.py" or "paper/fig2_period.py".

    Raises:
        FileNotFoundError: there is none of that name.
    """
    file = packaged() / name
    spec = importlib.util.spec_from_file_location(f"nat_jax_config_{file.stem}", file)
    assert spec is not None and spec.loader is not None  # as for every name that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_workdir(path: str) -> str:
    """Return the folder of a config's runs: "configs/paper/a.py:b,3" has runs/paper-a-b-3.

    Of files outside a folder "configs" the name alone counts.
    """
    file, _, argument = path.partition(":")
    *folders, name = Path(file).with_suffix("").parts
    first = len(folders) - folders[::-1].index("configs") if "configs" in folders else len(folders)
    words = [*folders[first:], name, *filter(None, argument.split(","))]
    return f"runs/{'-'.join(words)}"


def resolve_path(path: str) -> str:
    """Return the config file to load: ``path`` if it exists, else the packaged one.

    ``configs/digits.py`` names the same file in a checkout and in an installed wheel. A
    ``:argument`` after the file name is kept.
    """
    file, colon, argument = path.partition(":")
    if not Path(file).exists() and Path(file).parts[:1] == ("configs",):
        ours = packaged().joinpath(*Path(file).parts[1:])
        file = str(ours) if ours.is_file() else file
    return f"{file}{colon}{argument}"
