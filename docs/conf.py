"""Sphinx configuration of the site of these pages and the API reference: ``make docs``.

The pages are Markdown that is also read in the repository, so they link to its files by relative
paths. ``links_for_site`` rewrites links that leave this folder: to the site's copy of a page, or to
the public address of the repository.
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
html_math_renderer = "mathml"  # rendered by the browser, without a network

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

# Every reference must resolve, except for these.
nitpick_ignore_regex = [
    # types of other projects; resolving them would need the network
    (r"py:class", r"(jax|jaxlib|numpy|ml_collections|optax|flax|PIL|collections|os|pathlib)\..+"),
    (
        r"py:class",
        r"ArrayTree|nat_jax\.(input\.pipeline|training\.metrics)\.T",
    ),  # aliases and type variables
    # fields of a run that users do not construct
    (r"py:class", r"nat_jax\.input\.device_images\.DeviceImages"),
    # exceptions are named without their module
    (r"py:exc", r"UserError|InputError|BadImage|BadRecordError|ConversionError|Disagreement"),
    (r"py:exc", r"CannotWrite|WorkdirInUse|WorkdirLost"),
]


def links_for_site(text: str, file: str) -> str:
    """Return the Markdown of a page with links to files of the repository rewritten for the site.

    Args:
        text: the page.
        file: its path in the repository, to which its links are relative.

    Returns:
        The same lines. Links within ``docs``, links to other sites and code are unchanged, and so
        is a link to a missing file, which Sphinx reports.
    """
    folder = os.path.dirname(file)
    shown = INCLUDED.get(file, file)  # the page of the site, to which its links are relative

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
    """Shorten ``ArrayLike`` in signatures (Sphinx's event ``autodoc-process-signature``)."""
    from jax.typing import ArrayLike
    from sphinx.util.typing import stringify_annotation

    every = stringify_annotation(ArrayLike, "smart")
    return signature and signature.replace(every, "~jax.typing.ArrayLike"), returns


def skip_fields(
    app: Any, what: str, name: str, thing: Any, skip: bool, options: Any
) -> bool | None:
    """Skip the fields of named tuples (``autodoc-skip-member``); the class documents them."""
    return True if (getattr(thing, "__doc__", "") or "").startswith("Alias for field") else None


def read_page(app: Any, docname: str, source: list[str]) -> None:
    """Rewrite the links of a page (Sphinx's event ``source-read``)."""
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        source[0] = links_for_site(source[0], path.relative_to(ROOT).as_posix())


def read_included(app: Any, path: Path, docname: str, source: list[str]) -> None:
    """Rewrite the links of an included file (Sphinx's event ``include-read``)."""
    file = (Path(app.srcdir) / path).resolve().relative_to(ROOT).as_posix()
    source[0] = links_for_site(source[0], file)


def write_math(translator: Any, node: Any) -> None:
    """Write a formula, inline or displayed, as MathML."""
    from docutils.nodes import SkipNode, math_block
    from docutils.utils.math.latex2mathml import tex2mathml

    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, math_block)))
    raise SkipNode


def setup(app: Any) -> None:
    """Register the functions above with Sphinx."""
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
