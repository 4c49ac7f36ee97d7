"""Check the solver on one GPU, and time solver, steps, input and a preset there, in 8 minutes.

    python benchmarks/gpu_checks.py --output gpu.json
    python benchmarks/gpu_checks.py --output gpu.json --part lap,alexnet-bf16

The parts, each in a process of its own and within its own limit of time:

    kernel-tests   tests of the auction as a Pallas program, and of that program alone
    loop-tests     the same tests of the auction as XLA loops
    lap            assignment problems: both forms of the auction, and SciPy on the host
    alexnet-bf16   steps of AlexNet at 224 pixels, B = 256, D = 2048, in bfloat16: without
                   re-matching, and re-matching on the device by both forms and on the host
    alexnet-tf32   the same in float32 with products in TF32
    alexnet-f32    the same with products in float32
    input          photographs decoded on the host, alone and feeding the step in bfloat16
    cifar10        a minute of configs/cifar10.py, with the images of --data or random ones
    NETWORK-...    the steps of every other network of the library that takes 224 pixels

The output is written after each part, and the same command goes on with what is not done there. A
part that would not fit into --minutes is skipped. ``input`` and ``cifar10`` import grain and
ml_collections, the others neither these nor tensorflow_datasets or array_record; --wheels is a
folder of wheels to install for this run. The exit status is 1 if a part failed, was stopped at its
limit or found something wrong. --dry runs tiny sizes on a CPU, whose times mean nothing, with ten
times as much time.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure

Options = argparse.Namespace
Save = Callable[..., None]  # adds entries to what a part has found
Part = Callable[[Options, Save], None]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "grain", "ml_collections")
_SEED = 0
_NO_GPU = 3  # exit status of a part
# Dtype of the network, precision of float32 products, key of step.PEAKS.
_ARITHMETIC = {
    "bf16": ("bfloat16", None, "bfloat16"),
    "tf32": ("float32", "tensorfloat32", "float32"),
    "f32": ("float32", "float32", "full float32"),
}
# Those of tests/assign that hold wherever and however the auction runs.
_TESTS = ("test_properties.py", "test_auction.py", "test_kernel.py")
_CHOSEN = "test_kernel or rounds_are_bounded or every_kind_is_solved and auction"
_FEW = "shape0-auction or prices_are_a_start"
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_SHAPES = ("256", "128x256", "208x300", "1024", "8x1024")
_FAMILIES = ("near-collapsed", "half-way")  # as early and in the middle of training


def parts() -> dict[str, tuple[int, Part]]:
    """Return the parts in their order, each with its limit in seconds."""
    from nat_jax.models import MODELS

    def timed(*networks: str) -> dict[str, tuple[int, Part]]:
        every = [(network, arithmetic) for network in networks for arithmetic in _ARITHMETIC]
        return {"-".join(pair): (60, functools.partial(steps, *pair)) for pair in every}

    return {
        "kernel-tests": (50, functools.partial(tests, kernel=True)),
        "loop-tests": (50, functools.partial(tests, kernel=False)),
        "lap": (70, lap),
        **timed("alexnet"),
        "input": (40, feed),
        "cifar10": (80, preset),
        **timed(*(name for name in MODELS if name not in ("alexnet", "convnet"))),
    }


def tests(options: Options, save: Save, *, kernel: bool) -> None:
    """Run the tests; those of the kernel alone only for it."""
    import hypothesis  # noqa: F401  # needed later: before any work
    import pytest

    from nat_jax import assign

    assign.auction.__kwdefaults__["kernel"] = kernel  # type: ignore[index]  # as if it were so
    outcomes, wrong = dict[str, int](), list[str]()

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or not report.passed:
                outcomes[report.outcome] = outcomes.get(report.outcome, 0) + 1
                wrong.extend([report.nodeid] * report.failed)
                save(outcomes=outcomes, wrong=wrong)

    files = [str(measure.ROOT / "tests" / "assign" / name) for name in _TESTS[: 2 + kernel]]
    chosen = ["-k", _FEW if options.dry else _CHOSEN, "-m", "not slow"]
    plain = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    code = pytest.main([*files, *chosen, *plain], plugins=[Watch()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with {code!r}")


def lap(options: Options, save: Save) -> None:
    """Time the solvers in turn, as ``assign.py --accelerator`` does."""
    import assign_turns

    found: dict[str, list[Any]] = {"results": [], "compile_seconds": [], "wrong": []}
    asked = Options(costs=None, seeds=1, families=_FAMILIES, solvers=["auction", "kernel", "scipy"])
    for shape in ("16", "2x16") if options.dry else _SHAPES:
        asked.sizes, asked.batches = ([], [shape]) if "x" in shape else ([shape], [])
        more = assign_turns.run(asked)
        found = {name: rows + more[name] for name, rows in found.items()}
        save(**found)


def problem_of(network: str, arithmetic: str, options: Options) -> Any:
    """Return the problem of ``step_contenders`` that a part times."""
    from step_contenders import PROBLEMS

    dtype, name = _ARITHMETIC[arithmetic][0], f"{network}-{arithmetic}"
    if options.dry:
        return dataclasses.replace(PROBLEMS["tiny"], name=name, dtype=dtype)
    return dataclasses.replace(PROBLEMS["alexnet"], name=name, dtype=dtype, network=network)


def steps(network: str, arithmetic: str, options: Options, save: Save) -> None:
    """Time steps in turn, without and with re-matching."""
    import jax
    import step
    import step_contenders as those

    problem, (_, precision, key) = problem_of(network, arithmetic, options), _ARITHMETIC[arithmetic]
    solvers, rounds, seconds = ["auction", those.KERNEL], 5, 0.5
    if options.dry:  # each takes seconds to compile
        solvers, rounds, seconds = ["auction"] * (arithmetic == "bf16"), 1, 0.0
    with jax.default_matmul_precision(precision):
        batches = those.make_batches(problem, _SEED)
        by_hand = those.by_hand(problem, batches, those.BY_HAND, those.noise_loss, _SEED)
        flops = step.operations(by_hand)
        plain = those.of_library(problem, batches, those.PLAIN, _SEED)
        running = [plain, *those.rematching(problem, batches, solvers, _SEED)]
        each, wrong = step.take_turns(problem, running, rounds, seconds)
    peak = step.PEAKS.get(jax.devices()[0].device_kind, {}).get(key)
    rows = [step.summary(contender, problem, flops, peak) for contender in running]
    for row, contender in zip(rows[1:], running[1:], strict=True):
        row["to_plain"] = step.ratio("step", [contender], [plain])["quartiles"]
        row["share_of_matching"] = measure.short(1 - 1 / row["to_plain"][1])
    save(steps=rows, steps_per_turn=each, flops_of_a_step=flops, wrong=wrong)


def feed(options: Options, save: Save) -> None:
    """Time batches of photographs alone, the step alone, and the step that they feed."""
    import grain  # noqa: F401  # needed later: before any work
    import jax
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from step_contenders import make_batches, of_library

    from nat_jax.input import pipeline, transforms
    from nat_jax.input.sources import open_source
    from nat_jax.runtime import sharding

    problem, threads = problem_of("alexnet", "bf16", options), len(measure.core_numbers())
    mesh, size = sharding.make_mesh(devices=jax.devices()[:1]), problem.image_size
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    step = of_library(problem, make_batches(problem, _SEED), "step", _SEED)
    step.turn(2)
    count = 2 if options.dry else max(8, round(2 / step.turn(8)["seconds"]))
    rates: dict[str, float] = {}

    def rate(name: str, take: Callable[[int], Any]) -> None:
        take(2 if options.dry else 16 + threads)  # batches that were waiting
        _, taken = measure.timed(lambda: take(count))
        rates[name] = measure.short(problem.batch * count / taken["seconds"])
        save(images_per_second=rates, threads=threads)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train").mkdir()
        for k in range(2 * problem.batch):
            left, top = k % 140, k % 52
            photo = photos[k % 2].crop((left, top, left + 500, top + 375))
            photo.save(f"{folder}/train/{k}.jpg")
        stream = pipeline.train_batches(
            open_source(f"folder:{folder}", "train"),
            transforms.train_transform(image_size=size, resize=size * 8 // 7),
            batch_size=problem.batch,
            seed=_SEED,
            start_step=0,
            num_steps=10**6,
            threads=threads,
            convert=lambda batch: sharding.global_batch(
                {name: batch[name] for name in ("image", "index", "weight")}, mesh
            ),
        )
        with contextlib.closing(stream):
            rate("input", lambda n: list(itertools.islice(stream, n))[-1])
            rate("step", step.turn)
            rate("step, fed by the input", dataclasses.replace(step, batches=stream).turn)


def preset(options: Options, save: Save) -> None:
    """Train and judge by a packaged config for a minute."""
    import runpy

    import grain  # noqa: F401  # needed later: before any work
    import numpy as np

    from nat_jax.train import train_and_evaluate
    from nat_jax.training import metrics, workdir

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    config = runpy.run_path(str(measure.ROOT / "configs" / "cifar10.py"))["get_config"]()
    random, finished = np.random.default_rng(_SEED), False
    with tempfile.TemporaryDirectory() as folder:
        counts, run = {"train": 50_000, "test": 10_000}, Path(folder, "run")
        if options.dry:
            counts, config.batch_size, config.epochs = {"train": 100, "test": 100}, 50, 1.0
            config.model.options.widths, config.eval.probes = (4, 4, 4), ("knn",)
        made: dict[str, Any] = {f"y_{name}": np.arange(n) % 10 for name, n in counts.items()}
        for name, n in counts.items():
            made[f"x_{name}"] = random.integers(0, 256, (n, 32, 32, 3), np.uint8)
        np.savez(f"{folder}/random.npz", **made)
        config.data.source = options.data or f"arrays:{folder}/random.npz"
        signal.signal(signal.SIGTERM, stop)  # the loop has its own handler, and saves the state
        clock = threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))
        clock.start()
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            train_and_evaluate(config, run)
            finished = True
        clock.cancel()
        scores = (workdir.read_json(run / "results" / "pretrain.json") or {}).get("table")
        found = dict(finished=finished, metrics=metrics.read_rows(run), scores=scores)
        save(source=options.data or "random images", **found)


def work(part: Part, options: Options, file: Path) -> None:
    """Run a part, in a process of its own; write what it finds, or why it does not."""
    import jax

    found: dict[str, Any] = {}

    def save(**entries: Any) -> None:
        found.update(entries)
        measure.write(file, found)

    try:
        if jax.default_backend() != ("cpu" if options.dry else "gpu"):
            sys.exit(_NO_GPU)
        save(device=jax.devices()[0].device_kind)
        part(options, save)
    except ModuleNotFoundError as error:
        save(needs=error.name)
    except Exception as error:
        traceback.print_exc()
        save(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def finished(part: Part, seconds: float, options: Options) -> dict[str, Any]:
    """Return what a part found within its limit, its status and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        # Forked after imports and before JAX starts, so that no part waits for them.
        fork = multiprocessing.get_context("fork")
        process, begin = fork.Process(target=work, args=(part, options, file)), time.monotonic()
        process.start()
        process.join(seconds)
        late, taken = process.is_alive(), time.monotonic() - begin
        process.kill()
        process.join(10)
        found = json.loads(file.read_text()) if file.exists() else {}
    if process.exitcode == _NO_GPU:
        sys.exit("gpu_checks.py: JAX finds no GPU here; --dry is for CPUs")
    if late:
        status = f"stopped after {seconds:.0f} s"
    elif process.exitcode:
        status = f"failed: {found.pop('error', f'exit status {process.exitcode}')}"
    else:
        status = f"needs {found.pop('needs')}" if "needs" in found else "done"
    return {"status": status, "seconds": round(taken, 1), **found}


def tables(results: dict[str, Any]) -> str:
    """Return the main figures as Markdown."""
    summary, calls, rows = [], dict[tuple[str, str], str](), []
    for name, each in results["parts"].items():
        counts = each.get("outcomes") or each.get("images_per_second") or {}
        counted = ", ".join(f"{what}: {measure.number(value)}" for what, value in counts.items())
        summary.append([name, str(each.get("seconds", "")), each["status"], counted])
        for row in each.get("results", ()):
            shape = f"{row['shape']} {row['family']}"
            calls[shape, row["solver"]] = measure.number(row["wall_ms"])
        for row in each.get("steps", ()):
            shares = (row.get(key) for key in ("share_of_peak", "share_of_matching"))
            percent = ["" if share is None else f"{100 * share:.3g} %" for share in shares]
            speed = [measure.number(row[key]) for key in ("ms", "images_per_second")]
            rows.append([f"{name}: {row['name']}", *speed, *percent])
    parts = [f"# Checks on a GPU\n\n{measure.described(results, *_PACKAGES)}\n"]
    parts += [measure.table(["part", "seconds", "status", "tests or images/s"], summary)]
    parts += [measure.pivot("milliseconds of", calls)] * bool(calls)
    head = ["step", "ms", "images/s", "share of peak", "of matching"]
    return "\n".join(parts + [measure.table(head, rows)] * bool(rows))


def parse() -> Options:
    """Return the options, with the results so far."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON; tables in a .md beside it"
    )
    parser.add_argument("--part", type=measure.words, help="comma-separated; all by default")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--data", help="of cifar10: arrays:PATH or folder:PATH")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    if options.output.suffix != ".json":
        parser.error(f"--output: {options.output} has to end in .json")
    try:
        options.before = json.loads(options.output.read_text()) if options.output.exists() else {}
    except (OSError, ValueError) as error:
        parser.error(f"--output: {options.output} is no JSON file ({error}); choose another")
    if options.before and "parts" not in options.before:
        parser.error(f"--output: {options.output} is of another program; choose another")
    if options.before.get("dry", options.dry) != options.dry:
        parser.error(f"--output: {options.output} is of a run with another --dry; choose another")
    if options.wheels and not [*options.wheels.glob("*.whl")]:
        parser.error(f"--wheels: no .whl files in {options.wheels}")
    return options


def main() -> None:
    """Run the parts that are not done, and show the tables and what was wrong."""
    options, begin = parse(), time.monotonic()
    sys.path.insert(0, str(measure.ROOT))
    if options.dry:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ.setdefault("XLA_FLAGS", _QUICK)
    with tempfile.TemporaryDirectory() as folder:
        if options.wheels:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
            wheels = map(str, options.wheels.glob("*.whl"))
            subprocess.run([*pip, "--target", folder, *wheels], check=True)
            sys.path.insert(0, folder)
        import step  # noqa: F401  # here, so that the parts find it imported

        known = parts()
        if unknown := sorted({*(options.part or ())} - {*known}):
            sys.exit(f"gpu_checks.py: --part: no {', '.join(unknown)}; known: {', '.join(known)}")
        found = options.before.get("parts", {})
        results: dict[str, Any] = {
            "benchmark": "gpu_checks",
            "command": " ".join(["python", "benchmarks/gpu_checks.py", *sys.argv[1:]]),
            "dry": options.dry,
            "seed": _SEED,
            **measure.environment(*_PACKAGES),
            "parts": found,
        }
        for name in options.part or known:
            seconds, part = known[name]
            left = 60 * options.minutes - (time.monotonic() - begin)
            if options.dry:  # on a machine as slow as there are
                seconds, left = 10 * seconds, 10 * left
            if found.get(name, {}).get("status") == "done":
                continue
            if left < seconds:
                why = f"skipped: takes up to {seconds} s, {max(0, left):.0f} s are left"
                found.setdefault(name, {"status": why})  # what an earlier run found stays
            else:
                found[name] = finished(part, seconds, options)
            measure.log(f"{name}: {found[name]['status']}")
            measure.write(options.output, results, tables(results))
    print(tables(results))
    faults = []
    for name, each in found.items():
        faults += [f"{name}: {each['status']}"] * each["status"].startswith(("failed", "stopped"))
        faults += [f"{name}: {line}" for line in each.get("wrong", ())]
    measure.finish(faults)


if __name__ == "__main__":
    main()
