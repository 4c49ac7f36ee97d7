"""What ``--help`` prints: how to call the program, its tasks, its configs and the keys that matter.

Nothing here imports JAX or a config file, so that help comes at once and whatever a config does.
"""

import ast
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from absl import flags

from nat_jax.cli import config_files

TASKS = {
    "pretrain": "train, judge and write a report; resumes or extends a run that is there",
    "suite": "run the paper's experiments at a small scale, with a verdict on each claim",
    "report": "write the report of a run again",
    "convert": "turn data.source into array_record shards in convert.to",
    "export": "make a bundle of a run's network, which nat_jax.load opens",
    "features": "write the features of images as NumPy files",
    "knn": "judge by nearest neighbours: several k, weighted and plain votes",
    "linear_probe": "judge by logistic regression on any layers",
    "mlp_probe": "judge by the paper's transfer: an MLP on frozen layers",
    "low_shot": "judge by the probes with few labels",
    "retrieval": "draw test images and their nearest neighbours; needs no labels",
    "filters": "draw the first layer's filters",
}


class Key(NamedTuple):
    """A key of a config, its default and what it means."""

    name: str
    default: Any
    meaning: str


KEYS = (
    Key("data.source", "digits", "folder:PATH | arrays:PATH | tfds:NAME | arrayrecord:GLOB"),
    Key("data.image_size", 8, "side in pixels of what the network sees"),
    Key("epochs", 0.0, "length of the run; raise it to extend one that has ended"),
    Key("batch_size", 256, "over all devices and processes; also the images matched together"),
    Key("seeds", (0,), "one run each; several share one table with mean and deviation"),
    Key("model.name", "convnet", "convnet | alexnet"),
    Key("model.dim", 16, "D, the dimension of features and targets"),
    Key("optim.learning_rate", 5.12, "on the mean over the batch"),
    Key("assign.reassign_every_epochs", 3, "1 re-matches in every epoch, 3 is the paper's"),
    Key("eval.probes", ("knn", "linear_probe", "mlp_probe"), "what judges the features"),
)

_ASKING = ("--help", "-help", "-h", "-?", "--helpshort", "-helpshort")

_TOP = """\
usage: python -m nat_jax.main --config=FILE [--config.KEY=VALUE ...] [--workdir=FOLDER]

Image features without labels, by predicting noise. A minute and a half on 2 CPU cores:
  python -m nat_jax.main --config=configs/digits.py"""


def is_asked_for(arguments: Sequence[str]) -> bool:
    """Say whether a command line asks for help; ``--helpfull`` is left to absl."""
    return any(argument in _ASKING for argument in arguments)


def text(known: Iterable[flags.Flag]) -> str:
    """Return the whole help.

    Args:
        known: the program's own flags.
    """
    keys = [(f"{key.name} = {key.default!r}", key.meaning) for key in KEYS]
    own = [
        (f"--{flag.name}" + (f"={flag.default}" if flag.default is not None else ""), flag.help)
        for flag in known
    ]
    return "\n\n".join(
        [
            _TOP,
            _section("Tasks, --config.task=NAME:", list(TASKS.items())),
            _section("Configs that come with it; a file of your own works alike:", configs()),
            _section(
                "Ten keys that matter, --config.KEY=VALUE, and what they are where a config is "
                "silent:",
                keys,
            ),
            _section(
                "Flags (--helpfull: those of the libraries too; nat_jax/config.py: all keys):", own
            ),
        ]
    )


def configs() -> list[tuple[str, str]]:
    """Return the packaged configs: ("configs/NAME.py", the first line of its docstring)."""
    found = []
    for name, path in config_files.known().items():
        words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stem
        found.append((name, words.partition("\n")[0]))
    return found


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
