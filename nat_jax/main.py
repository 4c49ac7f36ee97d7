"""The command line: ``python -m nat_jax.main --config=configs/digits.py``.

What needs JAX is imported where it is used, so that ``--help`` answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from nat_jax.cli import help_text, parsing, program
from nat_jax.errors import InputError

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
_COORDINATOR = flags.DEFINE_string("coordinator", None, "Address of process 0, HOST:PORT.")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many processes there are.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this process, from 0.", lower_bound=0
)
_DISTRIBUTED_TIMEOUT = flags.DEFINE_float(
    "distributed_timeout",
    300.0,
    "Seconds within which all processes must connect.",
    lower_bound=1.0,
)
_DISTRIBUTED_HEARTBEAT = flags.DEFINE_integer(
    "distributed_heartbeat",
    100,
    "Seconds of silence after which a process counts as dead.",
    lower_bound=1,
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

    _enable_compilation_cache()
    train.train_and_evaluate(config, workdir)


def _suite(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.experiments.suite import run_suite

    _enable_compilation_cache()
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

    _enable_compilation_cache()
    print(f"features: {write_features(config, workdir)}")


def _judge(config: ConfigDict, workdir: Path) -> None:
    from nat_jax.evaluate.tasks import judge_task

    _enable_compilation_cache()
    print(f"result: {judge_task(config, workdir)}")


def _enable_compilation_cache() -> None:
    from nat_jax.runtime import cache_dir

    cache_dir.enable_compilation_cache()


class Task(NamedTuple):
    """A function of the config and the workdir, its line in ``--help``, where it may run."""

    run: Callable[[ConfigDict, Path], None]
    help: str
    in_several_processes: bool = False


TASKS: dict[str, Task] = {
    "pretrain": Task(
        _pretrain,
        "train, evaluate and write a report; resumes or extends an existing run",
        in_several_processes=True,
    ),
    "suite": Task(
        _suite, "run the paper's experiments at a small scale, with a verdict on each claim"
    ),
    "report": Task(_report, "write the report of a run again"),
    "convert": Task(_convert, "turn data.source into array_record shards in convert.to"),
    "export": Task(_export, "make a bundle of a run's network, which nat_jax.load opens"),
    "features": Task(_features, "write the features of images as NumPy files"),
    "knn": Task(_judge, "evaluate by nearest neighbours: several k, weighted and plain votes"),
    "linear_probe": Task(_judge, "evaluate by logistic regression on any layers"),
    "mlp_probe": Task(_judge, "evaluate by the paper's transfer: an MLP on frozen layers"),
    "low_shot": Task(_judge, "evaluate by the probes with few labels"),
    "retrieval": Task(_judge, "draw test images and their nearest neighbours; needs no labels"),
    "filters": Task(_judge, "draw the first layer's filters"),
}


def main(argv: Sequence[str]) -> None:
    """Run the task that the config names."""
    config, default_workdir = parsing.read_config(argv, flags.FLAGS["config"])
    if config.task not in TASKS:
        raise InputError(f"task: unknown {config.task!r}. Known: {', '.join(TASKS)}")
    _connect(config.task)
    TASKS[config.task].run(config, Path(_WORKDIR.value or default_workdir))


def _connect(task: str) -> None:
    """Connect to the other processes, if this is one of several."""
    from nat_jax.runtime import startup

    timeout = _DISTRIBUTED_TIMEOUT.value
    process = startup.find_process(
        _DISTRIBUTED.value,
        coordinator=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        timeout=timeout,
    )
    if process is None:
        return
    if not TASKS[task].in_several_processes:
        raise InputError(
            f"task {task!r} runs in one process; this is number {process.index} of "
            f"{process.count}. Start it once, with --distributed=off"
        )
    startup.connect(process, timeout=timeout, heartbeat=_DISTRIBUTED_HEARTBEAT.value)
    if process.index:
        program.log_warnings_only(startup.message_prefix())


def run() -> None:
    """Parse the flags and run the task; a mistake in the input is one message and exit code 2."""
    if help_text.is_asked_for(sys.argv[1:]):
        tasks = {name: task.help for name, task in TASKS.items()}
        print(help_text.text(tasks, [flags.FLAGS[flag.name] for flag in _FLAGS]))
        return
    program.set_up()
    app.run(program.guarded(main), flags_parser=program.guarded(parsing.parse))


if __name__ == "__main__":
    run()
