"""Start-up of several processes, and the end of one that has lost another.

JAX finds the cluster, connects the processes and notices when one of them dies. What is added here:
a process that is alone waits for no other, and every failure is one message within a bounded time,
where JAX's runtime waits or aborts. Tested over loopback in up to four processes with simulated CPU
devices; what JAX reports on TPU pods and in Kubernetes is imitated in tests.
"""

import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from nat_jax.errors import UserError
from nat_jax.runtime import consistency, preemption

logger = logging.getLogger(__name__)

MODES = ("auto", "on", "off")

EXIT_LOST_PEER = (
    75  # exit code of a process that has lost another: EX_TEMPFAIL, "try again", of sysexits.h
)

_LATER = 60  # seconds from our time limit to JAX's own, at which it aborts
_PROBE = 2.0  # seconds for one attempt to reach a coordinator that did not answer

# Errors of the transports when a peer is gone: Gloo on CPUs, NCCL on GPUs, gRPC everywhere.
_PEER_GONE = re.compile(
    r"UNAVAILABLE: |(UNKNOWN|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED): .*"
    r"(gloo|nccl|connection|socket|peer|coordination)",
    re.IGNORECASE,
)


class StartUpError(UserError, RuntimeError):
    """The processes of a run cannot be connected."""


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """The index of this process, the number of processes, and how they connect.

    Attributes:
        coordinator: HOST:PORT at which process 0 waits for the others.
        count: number of processes.
        index: of this one, from 0.
        by_hand: all three were given, so that JAX need not look for a cluster.
    """

    coordinator: str
    count: int
    index: int
    by_hand: bool

    def __str__(self) -> str:
        return f"process {self.index} of {self.count}, coordinator {self.coordinator}"


def find_process(
    mode: str = "auto",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
) -> ProcessInfo | None:
    """Return this process's number among several, from the flags or from the cluster.

    Args:
        mode: "auto" looks for a cluster as JAX knows them: a SLURM step, Open MPI, the workers of a
            TPU pod, an indexed Kubernetes job; "on" insists on one; "off" does not look.
        coordinator: HOST:PORT of the first process; if None the cluster's.
        num_processes: number of processes; if None the cluster's.
        process_id: number of this one, from 0; if None the cluster's.
        timeout: seconds for JAX to query a cluster's services.

    Returns:
        None for a process that is alone, and with mode "auto" for a cluster of one.

    Raises:
        StartUpError: the arguments are incomplete or contradictory.
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
        with _limited(timeout, lambda: "querying the cluster for this process's number"):
            cluster = _cluster(insist=mode == "on" or bool(given))
            if cluster is not None:
                num_processes = _query(cluster, cluster.get_process_count, num_processes)
                if mode == "auto" and num_processes == 1:
                    return None
                process_id = _query(cluster, cluster.get_process_id, process_id)
                coordinator = _query(cluster, lambda: _address(cluster, timeout), coordinator)
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
    return ProcessInfo(coordinator, num_processes, process_id, cluster is None)


def _cluster(*, insist: bool) -> Any:
    """Return JAX's description of the cluster that started this process; None outside of one."""
    # Private, but JAX has no public way to learn the number of processes before connecting.
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
            if _query(cluster, cluster.is_env_present):
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
    """Return whether the environment names one TPU host, as on Kaggle and in Colab.

    JAX would query Google's metadata service all the same, and fail where there is none.
    """
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return hosts != "" and "," not in hosts and "MEGASCALE_NUM_SLICES" not in os.environ


def _address(cluster: Any, timeout: float) -> str:
    port = os.environ.get("JAX_COORDINATOR_PORT")
    return cluster.get_coordinator_address(timeout_secs=timeout, override_coordinator_port=port)


def _query(cluster: Any, question: Callable[[], Any], known: Any = None) -> Any:
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


def connect(process: ProcessInfo, *, timeout: float = 300.0, heartbeat: int = 100) -> None:
    """Connect to the other processes and see all their devices.

    At the time limit, and where JAX's runtime aborts, as on a refusal by the coordinator, this
    process ends with one message and exit code 2. Ctrl-C ends it at once: Python would not see it
    before the runtime stops waiting.

    Args:
        process: from ``find_process``.
        timeout: seconds in which all must have connected.
        heartbeat: seconds of silence after which a process counts as dead, and JAX ends all others.

    Raises:
        StartUpError: the port is taken, or JAX refuses.
    """
    if process.index == 0:
        _check_port(process)
    main = threading.current_thread() is threading.main_thread()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL) if main else None
    try:
        with (
            preemption.c_handler(signal.SIGABRT, lambda _: _exit(_aborted(process))),
            _limited(timeout, lambda: _missing(process)),
        ):
            jax.distributed.initialize(
                process.coordinator,
                num_processes=process.count,
                process_id=process.index,
                cluster_detection_method="deactivate" if process.by_hand else None,
                initialization_timeout=int(timeout) + _LATER,
                heartbeat_timeout_seconds=heartbeat,
            )
            seen = jax.process_count()  # starts the devices, which also waits for the others
            if seen == process.count:
                consistency.warm_up_collectives()
    except Exception as error:
        raise StartUpError(f"{process}: {type(error).__name__}: {error}") from error
    finally:
        if main:
            signal.signal(signal.SIGINT, interrupt)
    if seen != process.count:
        raise StartUpError(
            f"{process}: JAX sees {seen}. All need the same --num_processes (and on CPUs, "
            "jax_cpu_collectives_implementation 'gloo' or 'mpi')"
        )


def _check_port(process: ProcessInfo) -> None:
    """Check that the coordinator can listen; JAX would crash."""
    if "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return
    port = int(process.coordinator.rpartition(":")[2])
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise StartUpError(
            f"{process}: cannot listen on port {port}: {error}. End what uses it, or choose "
            "another port with --coordinator=HOST:PORT, or JAX_COORDINATOR_PORT where the cluster "
            "is found, in all processes"
        ) from error


def _missing(process: ProcessInfo) -> str:
    """Return what a process that nobody has joined is waiting for."""
    reason = "for the others: not all came"
    if process.index:
        host, _, port = process.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE).close()
            reason = "which answers; not all processes have come to it"
        except OSError as error:
            reason = f"which cannot be reached: {error}"
    return (
        f"waiting, as {process}, {reason}. "
        f"Every process needs the same --coordinator and --num_processes={process.count}, and its "
        f"own --process_id from 0 to {process.count - 1}; look at the others' output, or raise "
        "--distributed_timeout. --distributed=off runs alone"
    )


def _aborted(process: ProcessInfo) -> str:
    return (
        f"{process}: JAX's runtime gave up, for the reason above. It does so when two processes "
        "have the same --process_id, not all the same --num_processes, or when one has ended: look "
        "at the others' output"
    )


def _exit(message: str) -> None:
    os.write(2, f"nat_jax: {message}\n".encode())
    os._exit(2)


@contextlib.contextmanager
def _limited(timeout: float, waiting_for: Callable[[], str]) -> Iterator[None]:
    """End this process with one message if the time inside exceeds a limit."""
    timer = threading.Timer(timeout, lambda: _exit(f"after {timeout:g} s still {waiting_for()}"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def message_prefix() -> str:
    """Return "process 3: " in one of several processes, and "" in one that is alone."""
    return f"process {jax.process_index()}: " if jax.distributed.is_initialized() else ""


def lost_peer(error: BaseException) -> str | None:
    """Return the transport's message if an error means that another process is gone, else None."""
    seen: BaseException | None = error
    while jax.distributed.is_initialized() and seen is not None:
        # JAX raises ValueError for some of them.
        if isinstance(seen, jax.errors.JaxRuntimeError | ValueError) and _PEER_GONE.match(
            str(seen)
        ):
            return str(seen).split("\n")[0]
        seen = seen.__cause__ or seen.__context__
    return None


def no_devices(error: BaseException) -> str | None:
    """Return a message if an error is JAX's where it finds no device to compute on, else None."""
    if not isinstance(error, RuntimeError | AssertionError):  # bare, for JAX_PLATFORMS=cuda
        return None
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as reason:
        wanted = jax.config.jax_platforms  # type: ignore[attr-defined]
        words = str(reason).split("\n")[0].partition(" (set JAX_PLATFORMS")[0] or "there is none"
        return (
            f"JAX finds no device to compute on with JAX_PLATFORMS={wanted or ''}: {words}. "
            "Unset JAX_PLATFORMS to use the devices there are, or install JAX for those you want"
        )
    return None


def exit_process(code: int, *, at_once: bool = False) -> None:
    """End this process after an error.

    One of several ends at once: a proper shutdown would wait for the others, which wait for this
    one; its closed connections tell them.
    """
    if at_once or jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
