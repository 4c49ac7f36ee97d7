"""Start-up of several processes, and the end of one whose peers are gone.

JAX finds the cluster, connects the processes and notices when one of them dies. What is added here:
a process that is alone waits for nobody, and what goes wrong is one message within a bounded time,
where JAX's runtime aborts with a C++ stack trace. It was run on loopback, in up to four processes
with simulated CPU devices; what JAX reports on TPU pods and in Kubernetes was imitated in tests.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nat_jax.errors import UserError
from nat_jax.runtime import c_signals, consistency

logger = logging.getLogger(__name__)

MODES = ("auto", "on", "off")

LOST = 75  # exit code of a process that has lost another: EX_TEMPFAIL, "try again", of sysexits.h

_LATER = 60  # seconds by which JAX's own time limit, at which it aborts, lies behind ours
_PROBE = 2.0  # seconds to find out whether a coordinator that did not help can be reached at all

# What the transports say when the other end is gone: Gloo on CPUs, NCCL on GPUs, gRPC everywhere.
_GONE = re.compile(
    r"UNAVAILABLE: |(UNKNOWN|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): .*"
    r"(gloo|nccl|connection|socket|peer|coordination)",
    re.IGNORECASE,
)


class StartUpError(UserError, RuntimeError):
    """The processes of a run cannot be brought together."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, and where the first one waits for the others."""

    coordinator: str
    count: int
    index: int
    by_hand: bool  # all three were given, so that JAX need not look for a cluster


def find_place(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> Place | None:
    """Find out whether this process is one of several.

    Args:
        mode: "auto" looks for a cluster as JAX knows them: a SLURM step, Open MPI, the workers of a
            TPU pod, an indexed Kubernetes job; "on" insists on one; "off" does not look.
        coordinator: HOST:PORT of the first process; found by "auto" and "on" if None.
        num_processes: how many there are; found if None.
        process_id: which this is, from 0; found if None.
        timeout: seconds that JAX may ask a cluster's services for.

    Returns:
        None for a process that is alone, and with mode "auto" for a cluster of one.

    Raises:
        StartUpError: what was given is incomplete, or contradicts itself.
    """
    flags = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if mode not in MODES:
        raise StartUpError(f"--distributed: expected one of {', '.join(MODES)}; got {mode!r}")
    if mode == "off":
        if given:
            raise StartUpError(f"--distributed=off contradicts {' '.join(given)}; leave one out")
        return None
    cluster: Any = None
    if missing:
        with _limited(timeout, lambda: "asking the cluster where this process belongs"):
            cluster = _cluster(insist=mode == "on" or bool(given))
            if cluster is not None:
                num_processes = _ask(cluster, cluster.get_process_count, num_processes)
                if mode == "auto" and num_processes == 1:
                    return None
                process_id = _ask(cluster, cluster.get_process_id, process_id)
                coordinator = _ask(cluster, lambda: _address(cluster, timeout), coordinator)
        if cluster is None and not given and mode == "auto":
            return None
    if coordinator is None or num_processes is None or process_id is None:
        raise StartUpError(
            "no cluster that JAX knows (a SLURM step, Open MPI, a TPU pod, an indexed Kubernetes "
            f"job) says where this process belongs. Give {' '.join(missing)} too"
        )
    if mode == "auto" and num_processes == 1:
        return None
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise StartUpError(f"--coordinator: expected HOST:PORT; got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise StartUpError(
            f"--process_id: expected 0 to {num_processes - 1}, as --num_processes is "
            f"{num_processes}; got {process_id}"
        )
    return Place(coordinator, num_processes, process_id, cluster is None)


def _cluster(*, insist: bool) -> Any:
    """Return JAX's description of the cluster that started this process; None outside of one."""
    # Not public in JAX, but the only way to learn the number of processes before connecting.
    from jax._src.clusters import ClusterEnv, K8sCluster

    if not insist and (_is_one_tpu_host() or os.environ.get("SLURM_STEP_NUM_TASKS") == "1"):
        return None  # SLURM_NTASKS, which JAX reads, is the job's also in a step of one task
    in_job = "JOB_COMPLETION_INDEX" in os.environ
    for cluster in ClusterEnv._cluster_types:
        if cluster is K8sCluster and not (in_job or insist):
            continue  # a pod of its own, in which asking would fail
        if cluster.opt_in_only_method:
            continue
        try:
            if _ask(cluster, cluster.is_env_present):
                return cluster
        except StartUpError as error:  # a TPU VM elsewhere than at Google, for instance
            if insist:
                raise
            logger.warning("%s", error)
    if in_job and "KUBERNETES_SERVICE_HOST" in os.environ and not insist:
        raise StartUpError(
            "this pod is one of an indexed Kubernetes job; how many there are can be seen only "
            "with the package kubernetes. Install it, or give --coordinator, --num_processes and "
            "--process_id (launch/gke_jobset.yaml does), or --distributed=off"
        )
    return None


def _is_one_tpu_host() -> bool:
    """Say whether the environment names one TPU host, as on Kaggle and in Colab.

    JAX would ask Google's metadata service all the same, and fail where there is none.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return hosts != "" and "," not in hosts and "MEGASCALE_NUM_SLICES" not in os.environ


def _address(cluster: Any, timeout: float) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    return cluster.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)


def _ask(cluster: Any, question: Callable[[], Any], known: Any = None) -> Any:
    if known is not None:
        return known
    try:
        return question()
    except Exception as error:
        raise StartUpError(
            f"JAX's {cluster.__name__} cannot tell this process's place: "
            f"{type(error).__name__}: {error}. Give --coordinator, --num_processes and "
            "--process_id, or --distributed=off to run alone"
        ) from error


def connect(place: Place, *, timeout: float = 300.0, heartbeat: int = 100) -> None:
    """Connect to the other processes and see all their devices.

    What JAX cannot survive, a refusal by the coordinator for instance, ends this process with one
    message and exit code 2, as does the time limit.

    Args:
        place: from ``find_place``.
        timeout: seconds in which all must have come.
        heartbeat: seconds without a sign of life after which a process counts as dead, and JAX ends
            all others.

    Raises:
        StartUpError: the port is taken, or JAX refuses.
    """
    if place.index == 0:
        _check_port(place)
    with (
        _survived(place) as stderr,
        _limited(timeout, lambda: _why_nobody_came(place), stderr),
    ):
        try:
            jax.distributed.initialize(
                place.coordinator,
                num_processes=place.count,
                process_id=place.index,
                cluster_detection_method="deactivate" if place.by_hand else None,
                initialization_timeout=int(timeout) + _LATER,
                heartbeat_timeout_seconds=heartbeat,
            )
            seen = jax.process_count()  # starts the devices, which also waits for the others
            if seen == place.count:
                consistency.meet()
        except Exception as error:
            raise StartUpError(f"{_named(place)}: {type(error).__name__}: {error}") from error
    if seen != place.count:
        raise StartUpError(
            f"{_named(place)}: JAX sees {seen}. All need the same --num_processes (and on CPUs, "
            "jax_cpu_collectives_implementation 'gloo' or 'mpi')"
        )


def _named(place: Place) -> str:
    return f"process {place.index} of {place.count}, coordinator {place.coordinator}"


def _check_port(place: Place) -> None:
    """Try to listen, as JAX would crash where it cannot."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(place.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise StartUpError(
            f"{_named(place)}: cannot listen on port {port}: {error}. End what uses it, or choose "
            "another port with --coordinator=HOST:PORT, or JAX_COORDINATOR_PORT where the cluster "
            "is found, in all processes"
        ) from error


def _why_nobody_came(place: Place) -> str:
    cure = (
        f"Every process needs the same --coordinator and --num_processes={place.count}, and its "
        f"own --process_id from 0 to {place.count - 1}; look at the others' output, or raise "
        "--distributed_timeout. --distributed=off runs alone"
    )
    if place.index == 0:
        return f"waiting, as {_named(place)}, for the others: not all came. {cure}"
    host, _, port = place.coordinator.rpartition(":")
    found = ["no answer"]

    def probe() -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE).close()
            found[0] = ""
        except OSError as error:
            found[0] = str(error)

    thread = threading.Thread(target=probe, daemon=True)  # a name server may take longer
    thread.start()
    thread.join(_PROBE)
    if found[0]:
        what = f"which cannot be reached: {found[0]}"
    else:
        what = "which answers; not all processes have come to it"
    return f"waiting, as {_named(place)}, {what}. {cure}"


def _end(message: str, stderr: int = 2) -> None:
    os.write(stderr, f"nat_jax: {message}\n".encode())
    os._exit(2)


@contextlib.contextmanager
def _limited(timeout: float, waiting_for: Callable[[], str], stderr: int = 2) -> Iterator[None]:
    """End this process with one message if what is inside takes too long."""
    timer = threading.Timer(
        timeout, lambda: _end(f"after {timeout:g} s still {waiting_for()}", stderr)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _survived(place: Place) -> Iterator[int]:
    """Make one message of an abort: JAX's runtime prints a stack trace and aborts where it fails.

    Standard error is held back meanwhile; what is given is where messages can still be written.
    Ctrl-C ends the process at once: Python would not see it before the runtime's wait is over.
    """
    sys.stderr.flush()
    main = threading.current_thread() is threading.main_thread()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)

        def aborted(_: int) -> None:
            held.seek(0)
            said = held.read().decode(errors="replace")
            status = re.search(r"absl::Status: (.*)", said)
            _end(
                f"{_named(place)}: JAX's runtime gave up: "
                f"{status[1] if status else said.strip()[-500:]}. It does so when two processes "
                "have the same --process_id, not all the same --num_processes, or when one has "
                "ended: look at the others' output",
                stderr,
            )

        try:
            with c_signals.handled(signal.SIGABRT, aborted):
                yield stderr
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            if interrupt is not None:
                signal.signal(signal.SIGINT, interrupt)
            held.seek(0)
            os.write(2, held.read())


def who() -> str:
    """Return "process 3: " in one of several processes, and nothing in one that is alone."""
    return f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""


def lost_peer(error: BaseException) -> str | None:
    """Return the transport's words if an error says that another process is gone, else None."""
    seen: BaseException | None = error
    while jax.distributed.is_initialized() and seen is not None:
        # JAX raises ValueError for some of them.
        if isinstance(seen, jax.errors.JaxRuntimeError | ValueError) and _GONE.match(str(seen)):
            return str(seen).split("\n")[0]
        seen = seen.__cause__ or seen.__context__
    return None


def leave(code: int, *, at_once: bool = False) -> None:
    """End this process after an error.

    One of several ends at once: a proper shutdown would wait for the others, which wait for this
    one; its closed connections tell them.
    """
    if at_once or jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
