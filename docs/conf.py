"""How Sphinx makes the site of these pages and of the library's docstrings: ``make docs``.

The pages are Markdown that reads as well where the repository is shown, so they link to files of
the repository by relative paths. ``links_for_site`` turns those that leave this folder into links
to the site's own copy of a page, or to the repository's public address.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any

import nat_jax

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

# Pages of the site that include a file from elsewhere in the repository.
INCLUDED = {
    "CONTRIBUTING.md": "docs/contributing.md",
    "CHANGELOG.md": "docs/changelog.md",
    "launch/README.md": "docs/launch.md",
}

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
project_copyright = author
version = release = nat_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
html_theme = "furo"
html_title = f"{project} {version}"
html_math_renderer = "mathml"  # which browsers draw themselves, also without a network

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page that includes another begins one level lower

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # docstrings give dtypes and shapes, which say more
default_role = "code"  # single backticks, as in Markdown
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

# Every reference must lead somewhere, but for these.
nitpick_ignore_regex = [
    # other projects' types; looking them up would make the build depend on the network
    (r"py:class", r"(jax|jaxlib|numpy|ml_collections|optax|flax|PIL|collections|os|pathlib)\..+"),
    (r"py:class", r"ArrayTree|nat_jax\.input_pipeline\.T"),  # aliases and variables of types
    # fields of a run that nobody needs to make
    (r"py:class", r"nat_jax\.(device_images\.DeviceImages|evaluate\.judge\.Judge)"),
    # what a function raises is named without its module
    (r"py:exc", r"BadImage|BadRecordError|ConversionError|Disagreement"),
]


def links_for_site(text: str, file: str) -> str:
    """Return a page's Markdown with its links to other files of the repository as the site's.

    Args:
        text: the page.
        file: its path in the repository, which its links start from.

    Returns:
        The same lines. Links within ``docs`` and to other sites are as they were, and so is
        whatever stands in code; a link to a file that is not there stays, for Sphinx to report.
    """
    folder = os.path.dirname(file)
    shown = INCLUDED.get(file, file)  # where the text is read, which the site's links start from

    def one(link: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(folder, link["path"]))
        if not (ROOT / path).exists():
            return link[0]
        page = INCLUDED.get(path, path)
        if page.startswith("docs/") and page != shown and (ROOT / page).is_file():
            return f"]({os.path.relpath(page, os.path.dirname(shown))}{link['anchor']})"
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path}{link['anchor']})"

    links = re.compile(r"\]\((?!\w+:)(?P<path>[^)\s#]+)(?P<anchor>(?:#[^)\s]*)?)\)")
    code = re.compile(r"(^[ \t]*```.*?^[ \t]*```[ \t]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
    parts = code.split(text)  # every second one is code
    return "".join(part if at % 2 else links.sub(one, part) for at, part in enumerate(parts))


def shorten(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str
) -> tuple[str | None, str]:
    """Write ``ArrayLike`` as such (Sphinx's event ``autodoc-process-signature``), not all it is."""
    from jax.typing import ArrayLike
    from sphinx.util.typing import stringify_annotation

    every = stringify_annotation(ArrayLike, "smart")
    return signature and signature.replace(every, "~jax.typing.ArrayLike"), returns


def skip_fields(
    app: Any, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out a named tuple's fields (``autodoc-skip-member``); the class tells what they are."""
    return True if (getattr(thing, "__doc__", "") or "").startswith("Alias for field") else None


def read_page(app: Any, docname: str, source: list[str]) -> None:
    """Prepare a page that Sphinx has read (its event ``source-read``)."""
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        source[0] = links_for_site(source[0], path.relative_to(ROOT).as_posix())


def read_included(app: Any, path: Path, docname: str, source: list[str]) -> None:
    """Prepare a file that a page includes (Sphinx's event ``include-read``)."""
    file = (Path(app.srcdir) / path).resolve().relative_to(ROOT).as_posix()
    source[0] = links_for_site(source[0], file)


def write_math(translator: Any, node: Any) -> None:
    """Write a formula, in a line or on one of its own, as MathML."""
    from docutils.nodes import SkipNode, math_block
    from docutils.utils.math.latex2mathml import tex2mathml

    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, math_block)))
    raise SkipNode


def setup(app: Any) -> None:
    """Connect the above to Sphinx."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
