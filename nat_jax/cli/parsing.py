"""Parses the command line; a mistake in it or in a config file is one InputError."""

import ast
import difflib
import itertools
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from nat_jax import config as configs
from nat_jax.cli import config_files
from nat_jax.errors import InputError
from nat_jax.schema import KEYS, RENAMED, renamed

# What a value of each type looks like on the command line.
_FORMS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    tuple: "values such as \"('a', 'b')\" or \"(1,)\"",
}
# What absl raises for a flag that is unknown or malformed, and ml_collections for a key.
_MISTAKES = (flags.Error, AttributeError, KeyError)
# All keys of a config with their types, but for free groups.
_TYPES = {name: key.type for name, key in sorted(KEYS.items()) if key.type is not dict}


class _OrNone(flags.ArgumentParser):
    """None, which leaves a key open, or what another parser takes."""

    def __init__(self, parse: Callable[[str], Any]):
        self._parse = parse

    def parse(self, argument: str) -> Any:
        return None if argument == "None" else self._parse(argument)


def _literal(text: str) -> Any:
    """Return what a text is in Python; the text itself if it is no literal."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


config_flags.register_flag_parser_for_type(int, _OrNone(flags.IntegerParser().parse))
config_flags.register_flag_parser_for_type(float, _OrNone(flags.FloatParser().parse))
config_flags.register_flag_parser_for_type(type(None), _OrNone(_literal))  # an option set to None


def parse(argv: Sequence[str]) -> Sequence[str]:
    """Parse the flags, ``--config`` and the keys that it changes.

    Args:
        argv: the program's name and its arguments.

    Returns:
        The program's name and what is no flag.

    Raises:
        InputError: a mistake of the user.
        Exception: what was raised below a config file's own lines.
    """
    arguments = _joined(argv)
    for key, value in _overrides(arguments):
        if key in RENAMED:
            quoted = value if re.fullmatch(r"[\w.,:/+-]*", value) else f'"{value}"'
            raise InputError(f"{renamed(key)}. Write --config.{RENAMED[key]}={quoted}")
        if value == "None" and _TYPES.get(key) in (int, float) and KEYS[key].default is not None:
            raise InputError(_wrong_form(key, value))
    file = ""
    for at, argument in enumerate(arguments):
        if argument.startswith(("--config=", "-config=")):
            path = config_files.resolve_path(argument.partition("=")[2])
            file = path.partition(":")[0]
            _check_file(file)
            arguments[at] = f"--config={path}"
    try:
        return flags.FLAGS(arguments)
    except SyntaxError as error:
        if error.filename != file:
            raise
        raise InputError(f"--config: {file}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        mistake = _in_file(file, error) if file else ""
        if not mistake and isinstance(error, _MISTAKES):
            mistake = _explained(arguments, error, has_config=bool(file))
        if not mistake:
            raise
        raise InputError(mistake) from error


def read_config(argv: Sequence[str], flag: flags.Flag) -> tuple[ConfigDict, str]:
    """Return the config that ``parse`` has found, and the default workdir.

    Args:
        argv: what ``parse`` has returned.
        flag: the flag ``--config``.

    Raises:
        InputError: there is an argument that is no flag, or no config.
    """
    if len(argv) > 1:
        raise InputError(_stray(argv[1]))
    if not flag.present:
        raise InputError(f"--config is missing. {_known_configs()}")
    config = flag.value
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise InputError(f"--config: get_config() must return a ConfigDict; it returned a {kind}")
    return config, config_files.default_workdir(config_flags.get_config_filename(flag))


def _known_configs() -> str:
    """Return a sentence that names the configs that come with the library."""
    return f"Known: {', '.join(config_files.known())}, or a file of your own"


def _stray(argument: str) -> str:
    """Return the message for an argument that is no flag."""
    if "=" in argument:
        return f"unexpected argument {argument!r}; write --{argument}"
    if argument.endswith(".py"):
        return f"unexpected argument {argument!r}; write --config={argument}"
    return f"unexpected argument {argument!r}; write --name=value"


def _check_file(file: str) -> None:
    if not Path(file).is_file():
        raise InputError(f"--config: there is no file {file}. {_known_configs()}")
    if not file.endswith(".py"):
        raise InputError(f"--config: expected a Python file; got {file}. {_known_configs()}")


def _in_file(file: str, error: BaseException | None) -> str:
    """Return the message for a line of a config file; "" if nothing there raised the error.

    Raises:
        BaseException: what was raised by something that the file calls. ml_collections and
            ``nat_jax.config``, which raise for keys that the file sets, count as the file.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [at for at, frame in enumerate(frames) if frame.filename == file]
        if own:
            break
        error = error.__context__  # absl and ml_collections put their own around it
    if error is None:
        return ""
    for frame in frames[own[-1] + 1 :]:
        if "ml_collections" not in frame.filename and frame.filename != configs.__file__:
            raise error
    place = f"--config: {file}, line {frames[own[-1]].lineno}"
    if "config is locked" not in str(error):
        return f"{place}: {type(error).__name__}: {error}"
    name = str(error).split('"')[1]
    hint = _hint(name, _by_last_part(_TYPES))
    return f"{place}: unknown key {name!r}.{hint} nat_jax/schema.py lists all keys"


def _explained(arguments: Sequence[str], error: Exception, *, has_config: bool) -> str:
    """Return the message for what absl or ml_collections found wrong in the command line."""
    if isinstance(error, flags.UnrecognizedFlagError):
        if not has_config and error.flagname.startswith("config."):
            return f"--config is missing. {_known_configs()}"
        return _unknown_flag(error.flagname)
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return "--config: the file has no function get_config()"
    for key, value in _overrides(arguments):
        if key.startswith(("model.options.", "assign.options.")):
            if isinstance(error, AttributeError | KeyError):
                return (
                    f"{key} is not in this config file, and options can be changed on the command "
                    "line only where the file sets them. Set it in a config file of your own"
                )
        elif key not in _TYPES:
            return _unknown_key(key, list(_TYPES))
        elif f"--config.{key}={value}:" in str(error) and _TYPES[key] in _FORMS:
            return _wrong_form(key, value)
    return str(error)


def _wrong_form(key: str, value: str) -> str:
    return f"{key}: expected {_FORMS[_TYPES[key]]}; got {value!r}"


def _joined(argv: Sequence[str]) -> list[str]:
    """Return a command line with ``--config FILE`` and ``--config.key value`` joined by "=".

    Raises:
        InputError: ``--config`` without a file.
    """
    joined: list[str] = []
    rest = iter(argv)
    for argument in rest:
        flag = argument.lstrip("-") if argument.startswith("-") else ""
        key = flag.removeprefix("config.")
        if flag == "config":
            value = next(rest, "-")
            if value.startswith("-"):
                raise InputError(f"--config: expected a file. {_known_configs()}")
            argument = f"{argument}={value}"
        elif key != flag and "=" not in key and _TYPES.get(RENAMED.get(key, key)) is not bool:
            argument = "=".join([argument, *itertools.islice(rest, 1)])
        joined.append(argument)
    return joined


def _overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, value) of the keys that a command line changes."""
    for argument in arguments:
        if argument.startswith(("--config.", "-config.")):
            key, _, value = argument.partition("config.")[2].partition("=")
            yield key, value


def _unknown_flag(name: str) -> str:
    known = {last: f"--config.{key}" for last, key in _by_last_part(_TYPES).items()}
    known |= {key: f"--config.{key}" for key in _TYPES}
    known |= {flag: f"--{flag}" for flag in flags.FLAGS}
    hint = _hint(name.removeprefix("config."), known)
    return f"unknown flag --{name}.{hint} --help lists the flags and the keys that matter"


def _unknown_key(key: str, known: Sequence[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"config: {key!r} is a group. Set one of its keys: {', '.join(inside)}"
    group, _, last = key.rpartition(".")
    there = [name for name in known if name.rpartition(".")[0] == group]
    by_last = _by_last_part(known)
    hint = _hint(last, by_last if last in by_last else _by_last_part(there or known))
    listed = f" Known there: {', '.join(there)}." if there else ""
    elsewhere = "" if hint or group else " --help lists the keys that matter, with their groups"
    return f"config: unknown key {key!r}.{hint}{listed}{elsewhere}"


def _hint(name: str, known: Mapping[str, str]) -> str:
    """Return " Did you mean ...?" with what a similar name stands for; "" if none is similar."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {known[close[0]]}?" if close else ""


def _by_last_part(keys: Iterable[str]) -> dict[str, str]:
    """Return keys by the part after the last dot; of several the outermost, then the first."""
    ordered = sorted(keys, key=lambda key: (key.count("."), key), reverse=True)
    return {key.rpartition(".")[2]: key for key in ordered}
