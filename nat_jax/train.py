"""Set-up and the training loop.

``train_and_evaluate(config, workdir)`` is what the command line, notebooks and tests call.
"""

import collections
import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Generator
from pathlib import Path

import jax
from ml_collections import ConfigDict

from nat_jax import config as configs
from nat_jax import evaluate, report, schema
from nat_jax.errors import InputError, UserError, some_of
from nat_jax.evaluate.evaluator import Evaluator, write_run_result
from nat_jax.export.loading import untrained_network
from nat_jax.input import pipeline, sample
from nat_jax.input.bad_records import BadRecords
from nat_jax.input.reader import ImageCache
from nat_jax.models.frozen import FrozenModel
from nat_jax.report.rows import Row
from nat_jax.runtime import consistency, preemption, sharding, startup
from nat_jax.runtime.preemption import Preempted, StopOnSignal
from nat_jax.train_step import Metrics, StateWithFeatures, TrainState, batch_shardings
from nat_jax.training import checkpoint, dataset_matching, health, lock, metrics
from nat_jax.training import workdir as workdirs
from nat_jax.training.host_matching import SOLVER_SECONDS, compile_step
from nat_jax.training.setup import (
    Run,
    make_model,
    open_sources,
    place_images,
    restore_or_create,
    set_up,
)

logger = logging.getLogger(__name__)

# Dispatched steps whose results have not been read. Unbounded dispatch deadlocks simulated devices
# on few cores, and two are enough to keep a device busy.
_IN_FLIGHT = 2

_MATCHING = ("assign/", "features/")
_STATUS = "assign/worst_status"


class TrainingDiverged(UserError, RuntimeError):
    """The loss or the gradient is not finite; checkpoints hold the last good state."""


def train_and_evaluate(config: ConfigDict, workdir: str | os.PathLike[str]) -> TrainState:
    """Train, evaluate the features, and write the table and the report.

    The same call resumes an unfinished run, extends one whose length has grown, and only reads the
    results of a finished one. Of several processes all make the same call; only the first one
    evaluates, on its own devices, and writes the files of the run.

    Args:
        config: see ``nat_jax.config.default``; with several ``seeds``, each is an independent run
            in ``workdir/seed-<seed>`` and the table has their mean and deviation.
        workdir: folder of the run.

    Returns:
        The final state; of the last seed if there are several.

    Raises:
        InputError: a mistake in the config or the data, before any device work.
        TrainingDiverged: loss or gradient not finite; the last good checkpoint is kept.
        Preempted: stopped by Ctrl-C or SIGTERM, with the state saved.
        Disagreement: the processes of this run have different configs, data or folders.
        WorkdirInUse: another run uses the workdir.
        WorkdirLost: another run took it over, or the lock in it was removed.
    """
    folder = Path(workdir)
    began = time.perf_counter()
    configs.validate(config, evaluate.PROBES)
    sources = open_sources(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
    configs.check_devices(config, mesh.shape, jax.process_count())
    model = make_model(config, mesh.devices.flat[0].platform)
    workdirs.check(folder, config)
    if jax.process_index() == 0:
        sample.log_sample(sources.train, config.data.white)
    shared = {
        k: v for k, v in configs.flatten(config).items() if schema.kind_of(k) != schema.PER_HOST
    }
    consistency.check_same(
        {"config": shared, "data": sources.train.fingerprint},
        "Start all processes with the same command line, on the same data",
    )
    consistency.check_shared(folder)
    with lock.held(folder) as check_lock:
        results, cache = {}, ImageCache()
        for seed in config.seeds:
            # First, as it finds mistakes in the evaluation's settings.
            evaluator = Evaluator(config, *sources[1:], model, seed=seed, cache=cache)
            if seed == config.seeds[0]:
                _log_probes(evaluator)
            place = workdirs.seed_folder(config, folder, seed)
            run = set_up(config, seed, place, mesh=mesh, sources=sources, cache=cache)
            state = _train(run, evaluator, folder, began, check_lock)
            trained = _network(run, state)
            if jax.process_index() == 0:
                with preemption.nothing_to_save():
                    _log_health(run)
                    results[seed] = _judge_run(run, evaluator, trained)
            began = time.perf_counter()
        with preemption.nothing_to_save():
            check_lock()
            if jax.process_index() == 0:
                _publish(folder, run, evaluator, results)
            consistency.wait_for_all("published")
    return state


def _log_probes(evaluator: Evaluator) -> None:
    """Log what the probes will learn, or why there will be no scores."""
    data = evaluator.inputs.data
    if evaluator.scores_run:
        names = data.train.class_names or ()
        counts = f"{len(data.train):,} images and are scored on {len(data.test):,}"
        logger.info("probes learn %d classes (%s) on %s", len(names), some_of(names, 5), counts)
        return
    source, why = data.unlabelled, "eval.probes is empty"
    if source is not None:
        why = f"no labels in {source.name} ({source.split})"
    logger.info("%s: probes are skipped, nearest neighbours are still drawn", why)


def _train(
    run: Run, evaluator: Evaluator, folder: Path, began: float, check_lock: Callable[[], None]
) -> TrainState:
    """Train a run to its last step, from its newest checkpoint."""
    checkpoints = checkpoint.Checkpoints(
        run.workdir / "checkpoints", keep=run.config.checkpoint.keep
    )
    try:
        consistency.check_same(
            {"newest checkpoint": checkpoints.latest_step()},
            f"All hosts must see the same files in {run.workdir}",
        )
        state = restore_or_create(run, checkpoints)  # raises if it is of another run
        if jax.process_index() == 0:
            workdirs.write_json(folder / "config.json", configs.to_dict(run.config))
        if int(state.step) > run.total_steps:
            raise InputError(
                f"{run.workdir} has done {int(state.step)} steps; this config asks for "
                f"{run.total_steps}. Raise epochs, or choose another folder with --workdir=..."
            )
        if int(state.step) < run.total_steps:
            state = _Loop(run, evaluator, checkpoints, began, check_lock).run(state)
    except BaseException as error:
        if startup.lost_peer(error) is None:  # else a save would wait for the lost process
            with contextlib.suppress(checkpoint.CheckpointError):  # follows from the first error
                checkpoints.close()
        raise
    checkpoints.close()
    return state


def _network(run: Run, state: TrainState) -> FrozenModel:
    """Return the network with its weights on the host; all processes must call this."""
    return FrozenModel(run.step.model, *sharding.to_host((state.params, state.batch_stats)))


def _log_health(run: Run) -> None:
    """Log and write sentences on the health of a run, from the last value of each metric."""
    latest: dict[str, float] = {}
    for row in metrics.read_rows(run.workdir):
        latest |= {name: value for name, value in row.items() if value is not None}
    last_epoch = (run.total_steps - 1) // run.steps_per_epoch
    every = run.config.assign.reassign_every_epochs
    whole = run.step.scope == "dataset"
    last_epoch -= whole  # after the last one nothing is matched
    sentences = health.sentences(
        latest,
        n=len(run.sources.train) if whole else run.step.block or run.config.batch_size,
        dim=run.step.model.dim,
        kind=run.config.targets.kind,
        matched_epoch=last_epoch - last_epoch % every if every else None,
        steps=run.total_steps,
        scope=run.step.scope,
    )
    workdirs.write_json(run.workdir / "results" / "health.json", sentences)
    for sentence in sentences:
        logger.info("seed %d: %s", run.seed, sentence)


def _judge_run(run: Run, evaluator: Evaluator, trained: FrozenModel) -> list[Row]:
    """Score the baselines, the untrained and the trained network, and draw the pictures.

    Nothing here waits for another process.
    """
    untrained = functools.partial(untrained_network, run.config, run.seed)
    return evaluator.score_run(run.workdir, trained, untrained, run.identity())


def _publish(workdir: Path, run: Run, evaluator: Evaluator, results: dict[int, list[Row]]) -> None:
    """Write the table over all seeds and the report, and print where they are."""
    if any(results.values()):
        about = {**run.identity(), "steps": run.total_steps}
        write_run_result(workdir, evaluator, run.config, results, about)
    else:
        old = workdirs.read_json(workdir / "results" / "pretrain.json")
        if old is not None and old["run"]["steps"] != run.total_steps:  # results/judged keeps it
            for suffix in ("json", "md"):
                (workdir / "results" / f"pretrain.{suffix}").unlink(missing_ok=True)
    print(f"report: {report.write_report(workdir)}", flush=True)


class _Loop:
    """The only training loop: batches in, steps dispatched, results read two steps later."""

    def __init__(
        self,
        run: Run,
        evaluator: Evaluator,
        checkpoints: checkpoint.Checkpoints,
        began: float,
        check_lock: Callable[[], None],
    ) -> None:
        self._run, self._evaluator, self._checkpoints = run, evaluator, checkpoints
        self._check_lock = check_lock
        self._began: float | None = began  # until the first step is done
        self._first_step: dict[str, float] = {}  # until it is in a row
        self._save_every = configs.steps_from(run.config, "checkpoint.every_", run.steps_per_epoch)
        self._in_flight: collections.deque[tuple[int, Metrics]] = collections.deque()
        self._timer = metrics.Timer()
        self._bad_records = BadRecords(len(run.sources.train))
        self._images = place_images(run)
        self._matched: dict[str, float] = {}  # the window's last matching, and its worst status

    def run(self, state: TrainState) -> TrainState:
        """Train from ``state`` to the last step."""
        run, start = self._run, int(state.step)
        self._writer = metrics.MetricsWriter(
            run.workdir, resume_step=start, tensorboard=run.config.log.tensorboard
        )
        self._progress = metrics.Progress(start=start, total=run.total_steps)
        batches = self._batches(start)
        try:
            with StopOnSignal() as stop:
                if self._judges_at(start):
                    self._judge(start, state)  # if the run was stopped before it could
                for step in range(start, run.total_steps):
                    if run.matches_all_before(step):
                        state = self._match_all(step, state)
                    with self._timer.waiting():
                        batch = next(batches)
                    state = self._dispatch(step, state, batch)
                    self._read(keep=_IN_FLIGHT)
                    state = self._after(step + 1, state, stop)
                if requested := stop.requested():  # while the last step was saved
                    self._checkpoints.wait()
                    raise Preempted(requested, run.total_steps)
        finally:
            batches.close()
            self._writer.close()
            self._progress.close()
            if self._bad_records.count:
                logger.warning("%s", self._bad_records.summary())
        return state

    def _batches(self, start: int) -> Generator[dict[str, jax.Array], None, None]:
        run, data = self._run, self._run.config.data
        return pipeline.train_batches(
            run.sources.train,
            configs.train_transform(run.config),
            batch_size=run.config.batch_size,
            seed=run.seed,
            start_step=start,
            num_steps=run.total_steps,
            views=data.views,
            pixels=self._images is None,
            on_bad_record=data.on_bad_record,
            bad_records=self._bad_records,
            cache=run.cache,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            **configs.reading(run.config),
            convert=self._to_devices,
        )

    def _to_devices(self, batch: pipeline.Batch) -> dict[str, jax.Array]:
        local = {k: v for k, v in batch.items() if k != "label" or self._run.step.supervised}
        return sharding.global_batch(local, self._run.step.mesh)

    def _dispatch(self, step: int, state: TrainState, batch: dict[str, jax.Array]) -> TrainState:
        compiled = compile_step(self._run.step, reassign=self._run.reassigns(step))
        if self._images is not None:
            batch["image"] = self._images(batch)
        used = {name: batch[name] for name in batch_shardings(self._run.step)}
        state, step_metrics = compiled(state, self._run.targets, used)
        self._in_flight.append((step, step_metrics))
        return state

    def _match_all(self, step: int, state: TrainState) -> TrainState:
        self._read(keep=0)  # nothing that is not finite is ever matched
        assert isinstance(state, StateWithFeatures)
        matched = dataset_matching.match_all(
            self._run.step, state, self._run.targets, len(self._run.sources.train), seed=step
        )
        self._timer.solved(matched.metrics[dataset_matching.SECONDS])
        self._matched = matched.metrics  # in the next row, so that none has two
        return matched.state

    def _read(self, *, keep: int) -> None:
        """Read the results of dispatched steps until only ``keep`` are left in flight."""
        run = self._run
        while len(self._in_flight) > keep:
            step, step_metrics = self._in_flight.popleft()
            row = {name: float(value) for name, value in jax.device_get(step_metrics).items()}
            if not all(map(math.isfinite, (row["train/loss"], row["train/gradient_norm"]))):
                self._diverged(step + 1, row)
            if self._began is not None:
                seconds, self._began = time.perf_counter() - self._began, None
                logger.info("the first step was done %.1f s after the start", seconds)
                self._first_step = {"time/first_step_seconds": seconds}
            if (solving := row.pop(SOLVER_SECONDS, None)) is not None:
                self._timer.solved(solving)
            self._timer.step(run.config.batch_size, matched=run.reassigns(step))
            if run.reassigns(step):
                worst = max(row["assign/worst_status"], self._matched.get(_STATUS, 0.0))
                self._matched = {k: v for k, v in row.items() if k.startswith(_MATCHING)}
                self._matched[_STATUS] = worst
            if (step + 1) % run.config.log.every_steps == 0 or step + 1 == run.total_steps:
                timed = {**self._timer.window(), **self._first_step}
                self._write(step + 1, {**self._matched, **row, **timed})
                self._first_step = {}

    def _write(self, done: int, row: dict[str, float]) -> None:
        row = {"step": done, "epoch": done / self._run.steps_per_epoch, **row}
        self._writer.write(row)
        self._progress.update(row)
        self._matched = {}

    def _diverged(self, number: int, row: dict[str, float]) -> None:
        self._checkpoints.wait()
        kept = self._checkpoints.latest_step()
        raise TrainingDiverged(
            f"step {number}: the loss is {row['train/loss']} and the gradient's norm "
            f"{row['train/gradient_norm']}. "
            + (
                f"The last good state, that of step {kept}, is saved in {self._run.workdir}. "
                "Choose another --workdir and lower optim.learning_rate or set optim.warmup_epochs"
                if kept
                else "Lower optim.learning_rate or set optim.warmup_epochs"
            )
        )

    def _after(self, done: int, state: TrainState, stop: StopOnSignal) -> TrainState:
        """Evaluate and save when due; stop if a signal requests it."""
        run = self._run
        last = done == run.total_steps
        requested = stop.requested()  # the same in all processes
        if self._judges_at(done) and not requested:
            self._read(keep=0)
            with self._timer.paused():
                self._judge(done, state)
        if last or requested or done % self._save_every == 0:
            self._read(keep=0)  # nothing that is not finite is ever saved
            consistency.check_copies(state, f"step {done}")
            self._check_lock()
            meta = {**run.identity(), "config": configs.to_dict(run.config)}
            self._checkpoints.save(done, state, meta)
        if requested:
            self._checkpoints.wait()
            raise Preempted(requested, done)
        return state

    def _judges_at(self, done: int) -> bool:
        every = self._run.config.eval.every_epochs * self._run.steps_per_epoch
        due = every and done % every == 0 and 0 < done < self._run.total_steps
        return bool(due and self._evaluator.scores_run)

    def _is_judged(self, done: int) -> bool:
        return any(
            row["step"] == done and any(name.startswith("eval/") for name in row)
            for row in metrics.read_rows(self._run.workdir)
        )

    def _judge(self, done: int, state: TrainState) -> None:
        network = _network(self._run, state)
        if jax.process_index() != 0 or self._is_judged(done):
            return  # the next step waits for the first process
        extractor = self._evaluator.extractor(self._evaluator.trained, network)
        rows = self._evaluator.score(extractor)[""]
        scores = {f"eval/{r['layer']}/{r['probe']}/{r['labels']}": r["value"] for r in rows}
        self._write(done, scores)
