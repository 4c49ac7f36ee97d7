"""Examples in docstrings run and show what they say."""

import doctest
import importlib

import pytest
from project import ROOT


def modules_with_examples() -> list[str]:
    files = [path for path in (ROOT / "nat_jax").rglob("*.py") if ">>>" in path.read_text("utf-8")]
    parts = (path.relative_to(ROOT).with_suffix("").parts for path in files)
    return sorted(".".join(part).removesuffix(".__init__") for part in parts)


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_a_wrong_example_is_noticed() -> None:
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    result = doctest.DocTestRunner(verbose=False).run(example, out=lambda _: None)
    assert result.failed == 1
