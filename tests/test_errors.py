"""Every exception of nat_jax is one that main prints as a message."""

import ast

from project import ROOT

BUILT_IN = {"Exception", "LookupError", "OSError", "RuntimeError", "TypeError", "ValueError"}


def without_base(text: str) -> list[str]:
    """Return the classes that derive from a built-in exception alone."""
    classes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    bases = {node.name: {ast.unparse(base) for base in node.bases} for node in classes}
    return [name for name, of in bases.items() if of & BUILT_IN and "UserError" not in of]


def test_every_exception_has_the_common_base() -> None:
    found = [
        name
        for path in (ROOT / "nat_jax").rglob("*.py")
        if "assign" not in path.relative_to(ROOT).parts
        for name in without_base(path.read_text("utf-8"))
    ]
    assert found == ["UserError"]


def test_one_without_it_is_found() -> None:
    assert without_base("class A(UserError, ValueError): ...\nclass B(ValueError): ...") == ["B"]
