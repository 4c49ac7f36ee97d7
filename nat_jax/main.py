"""The command line: ``python -m nat_jax.main --config=configs/digits.py``.

What needs JAX is imported where it is used, so that ``--help`` answers at once.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from nat_jax.cli import config_files, help_text, parsing
from nat_jax.errors import InputError, UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to run, e.g. configs/digits.py; change a key with --config.key=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; runs/<config name> by default.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ("auto", "on", "off"),
    "Run in several processes: auto: where a cluster names more than one; on: always; off: never.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT where process 0 waits.")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which of them this is, from 0.", lower_bound=0
)
_DISTRIBUTED_TIMEOUT = flags.DEFINE_float(
    "distributed_timeout", 300.0, "Seconds in which all processes must have come.", lower_bound=1.0
)
_DISTRIBUTED_HEARTBEAT = flags.DEFINE_integer(
    "distributed_heartbeat", 100, "Seconds of silence after which a process is dead.", lower_bound=1
)
_FLAGS = (
    _CONFIG,
    _WORKDIR,
    _DISTRIBUTED,
    _COORDINATOR,
    _NUM_PROCESSES,
    _PROCESS_ID,
    _DISTRIBUTED_TIMEOUT,
    _DISTRIBUTED_HEARTBEAT,
)


def _pretrain(config: ConfigDict, workdir: Path) -> None:
    from nat_jax import train
    from nat_jax.runtime import cache_dir

    cache_dir.keep_programs()
    train.train_and_evaluate(config, workdir)


def _suite(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.experiments.suite import run_suite
    from nat_jax.runtime import cache_dir

    cache_dir.keep_programs()
    print(f"result: {run_suite(config, workdir)}")


def _report(config: ConfigDict, workdir: Path) -> None:
    from nat_jax import report
    from nat_jax.experiments import pages
    from nat_jax.training import workdir as workdirs

    of_suite = workdirs.read_json(pages.result_file(workdir))
    page = pages.write(of_suite, workdir) if of_suite else report.write_report(workdir)
    print(f"report: {page}")


def _convert(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.input.convert import convert

    convert(config.data.source, config.convert.to, shard_mb=config.convert.shard_mb)


def _export(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.export.task import export

    print(f"bundle: {export(config, workdir)}")


def _features(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.evaluate.write_features import write_features
    from nat_jax.runtime import cache_dir

    cache_dir.keep_programs()
    print(f"features: {write_features(config, workdir)}")


def _judge(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.evaluate.tasks import judge_task
    from nat_jax.runtime import cache_dir

    cache_dir.keep_programs()
    print(f"result: {judge_task(config, workdir)}")


_JUDGING = ("knn", "linear_probe", "mlp_probe", "low_shot", "retrieval", "filters")

TASKS: dict[str, Callable[[ConfigDict, Path], None]] = {
    "pretrain": _pretrain,
    "suite": _suite,
    "report": _report,
    "convert": _convert,
    "export": _export,
    "features": _features,
    **dict.fromkeys(_JUDGING, _judge),
}


# Tasks that run in several processes; the others run in one.
_TOGETHER = {"pretrain"}


def main(argv: Sequence[str]) -> None:
    """Run the task that the config names."""
    if len(argv) > 1:
        raise InputError(parsing.stray(argv[1]))
    config = _CONFIG.value
    if not flags.FLAGS["config"].present:
        raise InputError(f"--config is missing. {parsing.known_configs()}")
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise InputError(f"--config: get_config() must return a ConfigDict; it returned a {kind}")
    if config.task not in TASKS:
        raise InputError(f"task: unknown {config.task!r}. Known: {', '.join(TASKS)}")
    _start_up(config.task)
    named = config_flags.get_config_filename(flags.FLAGS["config"])
    TASKS[config.task](config, Path(_WORKDIR.value or config_files.default_workdir(named)))


def _start_up(task: str) -> None:
    """Connect to the other processes, if this is one of several; only the first one is chatty."""
    from nat_jax.runtime import startup

    place = startup.find_place(
        _DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        timeout=_DISTRIBUTED_TIMEOUT.value,
    )
    if place is None:
        return
    if task not in _TOGETHER:
        raise InputError(
            f"task {task!r} runs in one process; this is number {place.index} of {place.count}. "
            "Start it once, with --distributed=off"
        )
    startup.connect(
        place, timeout=_DISTRIBUTED_TIMEOUT.value, heartbeat=_DISTRIBUTED_HEARTBEAT.value
    )
    if place.index:
        package = logging.getLogger("nat_jax")
        package.setLevel(logging.WARNING)
        package.handlers[0].setFormatter(logging.Formatter(f"{startup.who()}%(message)s"))


def run() -> None:
    """Parse the flags and run the task; a mistake in the input is one message and exit code 2."""
    if help_text.is_asked_for(sys.argv[1:]):
        print(help_text.text([flags.FLAGS[flag.name] for flag in _FLAGS]))
        return
    absl_logging.set_verbosity(absl_logging.WARNING)
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) == 1:
        os.environ.setdefault(
            "NPROC", "2"
        )  # the solver 'scipy' would wait for itself on one thread
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("nat_jax")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    app.run(_guarded(main), flags_parser=_guarded(parsing.parse))


def _guarded(function: Callable) -> Callable:
    """Print the message of an error that the user can fix; any other keeps its traceback."""

    def call(*args):
        try:
            return function(*args)
        except KeyboardInterrupt:
            print("nat_jax: stopped; run the same command line again", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGINT)  # JAX's compiler threads may not survive a tear-down
        except flags.Error as error:
            _fail(error)
        except Exception as error:
            from nat_jax.assign import AssignmentError
            from nat_jax.runtime import startup

            if words := startup.lost_peer(error):
                _lost(words)
            if isinstance(error, UserError | AssignmentError):
                _fail(error)
            if startup.who():  # Python's own end would wait for the other processes
                traceback.print_exc()
                startup.leave(1)
            raise

    return call


def _lost(words: str) -> None:
    from nat_jax.runtime import startup

    print(
        f"nat_jax: {startup.who()}another process of this run has ended or cannot be reached "
        f"({words}); its own output says why. The same command line, started for all processes, "
        "goes on from the last checkpoint",
        file=sys.stderr,
    )
    startup.leave(startup.LOST)


def _fail(error: Exception) -> None:
    from nat_jax.input.prefetch import Stalled
    from nat_jax.runtime import startup

    print(f"nat_jax: {startup.who()}{error}", file=sys.stderr)
    # Python would wait for the thread that hangs
    startup.leave(2, at_once=isinstance(error, Stalled))


if __name__ == "__main__":
    run()
