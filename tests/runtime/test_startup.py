"""Finding out which process this is: no cluster means no waiting, mistakes are one message."""

import os
import socket
import sys
import time
import types

import jax
import pytest
from processes import environment

from nat_jax.runtime import startup
from nat_jax.runtime.startup import ProcessInfo, StartUpError, find_process

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-006],other1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
SECOND_OF_TASKS = ProcessInfo("node003:61441", 4, 2, by_hand=False)
ONE_TASK = SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
# What GKE sets in a pod of a TPU slice.
GKE = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_HOSTNAMES": "localhost,127.0.0.2",
    "TPU_WORKER_ID": "1",
}


@pytest.fixture
def cluster(monkeypatch):
    """Return a function that sets a cluster's variables; at first there is no cluster."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)

    def become(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return become


def be_on_a_tpu(monkeypatch, metadata=None):
    """Stand for a TPU VM; ``metadata`` is what Google's service would return, if there is one."""
    from jax._src.clusters import cloud_tpu_cluster

    def get_metadata(key):
        if metadata is None:
            raise OSError("no route to host")
        return metadata.get(key, ""), 200 if key in metadata else 404

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)


def without(variables, name):
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    ("variables", "mode", "expected"),
    [
        ({}, "auto", None),
        (SLURM, "auto", SECOND_OF_TASKS),
        (SLURM, "off", None),
        (without(SLURM, "SLURM_STEP_NODELIST"), "auto", None),  # a job outside of a step
        (without(SLURM, "SLURM_PROCID"), "auto", None),
        (ONE_TASK, "auto", None),
        (ONE_TASK, "on", ProcessInfo("node003:61441", 1, 0, by_hand=False)),
        # an interactive step of one task in a job of four, and of four
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, "auto", None),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "auto", SECOND_OF_TASKS),
        (KUBERNETES, "auto", None),  # a pod that belongs to no job
    ],
)
def test_a_process_of_a_cluster_is_found_and_any_other_is_alone_at_once(
    cluster, variables, mode, expected
):
    cluster(variables)
    start = time.monotonic()
    assert find_process(mode) == expected
    assert time.monotonic() - start < 1


def test_open_mpi_is_found(cluster):
    cluster(OPEN_MPI)
    process = find_process()
    assert (process.count, process.index, process.by_hand) == (3, 1, False)
    assert process.coordinator.startswith("10.96.0.1:")


def test_the_workers_of_a_tpu_pod_are_found(cluster, monkeypatch):
    be_on_a_tpu(
        monkeypatch,
        {"agent-worker-number": "1", "worker-network-endpoints": "localhost,127.0.0.2"},
    )
    assert find_process() == ProcessInfo("localhost:8482", 2, 1, by_hand=False)
    cluster({"JAX_COORDINATOR_PORT": "9000"})
    assert find_process().coordinator == "localhost:9000"


def test_one_tpu_vm_of_google_is_alone(cluster, monkeypatch):
    be_on_a_tpu(
        monkeypatch, {"agent-worker-number": "0", "worker-network-endpoints": "no-host.invalid"}
    )
    start = time.monotonic()
    assert find_process() is None
    assert time.monotonic() - start < 1


def test_the_pods_of_a_tpu_slice_in_kubernetes_are_found(cluster, monkeypatch):
    be_on_a_tpu(monkeypatch, {})
    cluster(GKE | KUBERNETES | {"JOB_COMPLETION_INDEX": "1"})
    assert find_process() == ProcessInfo("localhost:8482", 2, 1, by_hand=False)


def test_one_tpu_host_elsewhere_is_alone(cluster, monkeypatch, caplog):
    be_on_a_tpu(monkeypatch)
    with monkeypatch.context() as named:
        for name, value in (GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}).items():
            named.setenv(name, value)
        assert find_process() is None and not caplog.text
        named.setenv("JOB_COMPLETION_INDEX", "0")
        named.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        assert find_process() is None
    assert find_process() is None
    assert "GceTpuCluster cannot tell this process's place: OSError: no route" in caplog.text
    with pytest.raises(StartUpError, match="no route"):
        find_process("on")


def test_an_indexed_kubernetes_job_needs_its_package_or_the_flags(cluster, monkeypatch):
    cluster(KUBERNETES | {"JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.warns(UserWarning, match="kubernetes"), pytest.raises(StartUpError) as caught:
        find_process()
    assert "the package kubernetes. Install it, or give --coordinator" in str(caught.value)
    assert find_process("off") is None
    by_hand = find_process(coordinator="run-0.run:1234", num_processes=2, process_id=1)
    assert by_hand == ProcessInfo("run-0.run:1234", 2, 1, by_hand=True)


def test_an_indexed_kubernetes_job_is_found(cluster, monkeypatch):
    """With the package as JAX uses it, for a JobSet's job of two pods."""
    from jax._src.clusters import K8sCluster

    cluster(KUBERNETES | {"JOB_COMPLETION_INDEX": "1", "HOSTNAME": "localhost"})
    jobset = {"jobset.sigs.k8s.io/coordinator": "run-workers-0-0.run"}
    owner = types.SimpleNamespace(controller=True, kind="Job", name="run-workers-0")
    metadata = types.SimpleNamespace(labels=jobset, annotations=jobset, owner_references=[owner])
    pod = types.SimpleNamespace(metadata=metadata, spec=types.SimpleNamespace(subdomain="run"))
    job = types.SimpleNamespace(metadata=metadata, spec=types.SimpleNamespace(parallelism=2))
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(K8sCluster, "_pod", lambda: pod)
    monkeypatch.setattr(K8sCluster, "_job", lambda: job)
    monkeypatch.setattr(K8sCluster, "get_coordinator_address", lambda **_: "run-workers-0-0.run:1")
    assert find_process() == ProcessInfo("run-workers-0-0.run:1", 2, 1, by_hand=False)


def test_a_cluster_whose_variables_are_wrong_is_one_message(cluster):
    cluster(SLURM | {"SLURM_NTASKS": "four"})
    with pytest.raises(StartUpError, match="SlurmCluster cannot tell.*'four'.*--distributed=off"):
        find_process()


@pytest.mark.parametrize(
    ("mode", "flags", "message"),
    [
        ("on", {}, "Give --coordinator --num_processes --process_id too"),
        ("auto", {"num_processes": 2}, "Give --coordinator --process_id too"),
        ("off", {"process_id": 1}, "--distributed=off contradicts --process_id=1"),
        ("maybe", {}, "expected one of auto, on, off; got 'maybe'"),
        ("auto", {"coordinator": "here"}, "expected HOST:PORT; got 'here'"),
        ("auto", {"process_id": 2}, "expected 0 to 1, as --num_processes is 2; got 2"),
    ],
)
def test_flags_that_do_not_fit_are_refused(cluster, mode, flags, message):
    if mode == "auto" and "num_processes" not in flags:
        flags = {"coordinator": "here:1", "num_processes": 2, "process_id": 1} | flags
    with pytest.raises(StartUpError) as caught:
        find_process(mode, **flags)
    assert message in str(caught.value)


def test_one_process_by_hand_is_alone_unless_it_insists(cluster):
    flags = {"coordinator": "here:1", "num_processes": 1, "process_id": 0}
    assert find_process(**flags) is None
    assert find_process("on", **flags) == ProcessInfo("here:1", 1, 0, by_hand=True)


def test_a_port_in_use_is_named(cluster):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartUpError, match=f"cannot listen on port {port}: .*in use"):
            startup.connect(ProcessInfo(f"127.0.0.1:{port}", 2, 0, by_hand=True), timeout=5)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset"), True),
        (ValueError("UNKNOWN: Gloo AllGather failed: Timed out waiting 1800000ms"), True),
        (
            jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed: remote process exited"),
            True,
        ),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("--workdir: cannot use nccl/peer"), False),
    ],
)
def test_a_lost_process_is_told_from_other_errors(monkeypatch, error, lost):
    outer = RuntimeError("cannot be saved")
    outer.__cause__ = error
    assert startup.lost_peer(outer) is None  # a process that is alone has no other to lose
    monkeypatch.setattr(startup.jax.distributed, "is_initialized", lambda: True)
    for raised in (error, outer):
        assert startup.lost_peer(raised) == (str(error) if lost else None)


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (AssertionError(), "JAX_PLATFORMS=cpu: there is none. "),
        (
            RuntimeError("Unknown backend cuda (set JAX_PLATFORMS='')"),
            "JAX_PLATFORMS=cpu: Unknown backend cuda. ",
        ),
    ],
)
def test_devices_that_cannot_be_had_are_one_message(monkeypatch, raised, words):
    assert startup.no_devices(raised) is None  # there are devices, so it is another mistake

    def devices():
        raise raised

    monkeypatch.setattr(startup.jax, "devices", devices)
    message = startup.no_devices(raised)
    assert message is not None and words in message and "Unset JAX_PLATFORMS" in message
    assert startup.no_devices(ValueError("Unknown backend")) is None
