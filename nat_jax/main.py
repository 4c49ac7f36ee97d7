"""The command line: ``python -m nat_jax.main --config=configs/digits.py``."""

import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from nat_jax import config as configs

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to run, e.g. configs/digits.py; change a key with --config.key=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config name> by default.")

_PACKAGE = Path(__file__).parent


def _pretrain(config: ConfigDict, workdir: Path) -> None:
    from nat_jax import train

    train.train_and_evaluate(config, workdir)


def _report(config: ConfigDict, workdir: Path) -> None:
    from nat_jax import report

    print(f"report: {report.write_report(workdir)}")


TASKS: dict[str, Callable[[ConfigDict, Path], None]] = {"pretrain": _pretrain, "report": _report}


def main(argv: Sequence[str]) -> None:
    """Run the task that the config names."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; write --name=value")
    config = _CONFIG.value
    if config is None:
        raise ValueError(f"--config is missing. {_known_configs()}")
    if config.task not in TASKS:
        raise ValueError(f"task: unknown {config.task!r}. Known: {', '.join(TASKS)}")
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0])
    TASKS[config.task](config, Path(_WORKDIR.value or f"runs/{file.stem}"))


def run() -> None:
    """Parse the flags and run the task; a mistake in the input is one message and exit code 2."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("nat_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    app.run(_guarded(main), flags_parser=_guarded(_parse))


def _parse(argv: Sequence[str]) -> Sequence[str]:
    found = [
        prefix + configs.resolve_path(arg.removeprefix(prefix)) if arg.startswith(prefix) else arg
        for prefix in ("--config=",)
        for arg in argv
    ]
    for arg in found:
        file = arg.removeprefix("--config=").partition(":")[0]
        if arg.startswith("--config=") and not Path(file).is_file():
            raise ValueError(f"--config: there is no file {file}. {_known_configs()}")
    return flags.FLAGS(found)


def _known_configs() -> str:
    names = sorted(path.name for path in configs.packaged().glob("[!_]*.py"))
    return f"Known: {', '.join(f'configs/{name}' for name in names)}, or a file of your own"


def _guarded(function: Callable) -> Callable:
    """Turn a mistake that nat_jax found into its message; anything else keeps its traceback."""

    def call(*args):
        try:
            return function(*args)
        except KeyboardInterrupt:
            print("nat_jax: stopped; the same command line goes on", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except flags.Error as error:
            _fail(error)
        except Exception as error:
            if _is_message(error):
                _fail(error)
            raise

    return call


def _is_message(error: Exception) -> bool:
    """Say whether an error was raised by nat_jax's own code, or by a config key's lookup."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename)
    if isinstance(error, AttributeError | KeyError):
        return "ml_collections" in raised_in.parts
    return _PACKAGE in raised_in.parents and isinstance(error, ValueError | RuntimeError)


def _fail(error: Exception) -> None:
    message = str(error.args[0]) if error.args else str(error)
    print(f"nat_jax: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run()
