"""The text of ``--help``, and the tables of keys in docs/configuration.md.

Nothing here imports JAX or runs a config file, so that ``--help`` is quick.
"""

import ast
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from absl import flags

from nat_jax.cli import config_files
from nat_jax.schema import KEYS, Key

# The keys that ``--help`` shows.
_SHOWN = (
    "data.source",
    "data.image_size",
    "epochs",
    "batch_size",
    "seeds",
    "model.name",
    "model.dim",
    "optim.learning_rate",
    "assign.reassign_every_epochs",
    "eval.probes",
)

_ASKING = ("--help", "-help", "-h", "-?", "--helpshort", "-helpshort")

_TOP = """\
usage: python -m nat_jax.main --config=FILE [--config.KEY=VALUE ...] [--workdir=FOLDER]

Image features without labels, by predicting noise. A minute on 2 CPU cores:
  python -m nat_jax.main --config=configs/digits.py"""


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Return whether a command line asks for help; ``--helpfull`` is left to absl."""
    return any(argument in _ASKING for argument in arguments)


def text(tasks: Mapping[str, str], known: Iterable[flags.Flag]) -> str:
    """Return the text of ``--help``.

    Args:
        tasks: what each task does, by its name.
        known: the program's own flags.
    """
    keys = [(f"{name} = {KEYS[name].default!r}", KEYS[name].help) for name in _SHOWN]
    own = [
        (f"--{flag.name}" + (f"={flag.default}" if flag.default is not None else ""), flag.help)
        for flag in known
    ]
    return "\n\n".join(
        [
            _TOP,
            _section("Tasks, --config.task=NAME:", list(tasks.items())),
            _section("Configs that come with it; a file of your own works too:", configs()),
            _section(
                "Ten keys that matter, --config.KEY=VALUE, with their defaults (nat_jax/schema.py "
                "lists all keys):",
                keys,
            ),
            _section("Flags (--helpfull: those of the libraries too):", own),
        ]
    )


def configs() -> list[tuple[str, str]]:
    """Return the packaged configs: ("configs/NAME.py", the first line of its docstring)."""
    found = []
    for name, path in config_files.known().items():
        words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
        found.append((name, words.partition("\n")[0]))
    return found


def markdown_table_of_keys() -> str:
    """Return one table of keys for each group; imports JAX for the names of models and solvers."""
    groups: dict[str, list[Key]] = {}
    for name, key in KEYS.items():
        groups.setdefault(name.rpartition(".")[0], []).append(key)
    lines: list[str] = []
    for group, keys in groups.items():
        lines += [f"## {group}" if group else "## The run", ""]
        lines += ["| key | default | kind | meaning |", "|---|---|---|---|"]
        for key in keys:
            words, known = key.help.replace("|", "\\|"), key.known()
            if not all(name in words for name in known):
                words += f" ({', '.join(known)})"
            lines.append(f"| `{key.name}` | `{key.default!r}` | {key.kind} | {words} |")
        lines.append("")
    return "\n".join(lines)


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title and rows of two columns, 100 characters wide; a wide name has its own line."""
    column = min(30, max(len(name) for name, _ in rows)) + 4
    lines = [title]
    for name, words in rows:
        first = f"  {name}"
        if len(first) > column - 2:
            lines.append(first)
            first = ""
        lines += textwrap.wrap(
            words,
            100,
            initial_indent=first.ljust(column),
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
    return "\n".join(lines)
