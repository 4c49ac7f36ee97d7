"""Start-up: who is alone waits for nobody; what goes wrong is one message within a bound."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import pytest
from processes import CONFIG, Run, environment, free_port

from nat_jax.runtime import startup
from nat_jax.runtime.startup import Place, StartUpError, find_place

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-006],other1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


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
    """Stand for a TPU VM; ``metadata`` is what Google's service would say, if there is one."""
    from jax._src.clusters import cloud_tpu_cluster

    def get_metadata(key):
        if metadata is None:
            raise OSError("no route to host")
        return metadata.get(key, ""), 200 if key in metadata else 404

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", get_metadata)


def test_a_laptop_is_alone_at_once(cluster):
    start = time.monotonic()
    assert find_place() is None
    assert time.monotonic() - start < 1


def test_a_slurm_step_of_several_tasks_is_found(cluster):
    cluster(SLURM)
    assert find_place() == Place("node003:61441", 4, 2, by_hand=False)
    assert find_place("off") is None


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_PROCID"])
def test_a_slurm_job_outside_of_a_step_is_alone(cluster, missing):
    cluster({name: value for name, value in SLURM.items() if name != missing})
    assert find_place() is None


def test_one_slurm_task_is_alone_unless_it_insists(cluster):
    cluster(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    assert find_place() is None
    assert find_place("on") == Place("node003:61441", 1, 0, by_hand=False)


def test_an_interactive_slurm_step_of_a_larger_job_is_alone(cluster):
    cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert find_place() is None
    cluster(SLURM | {"SLURM_STEP_NUM_TASKS": "4"})
    assert find_place() is not None


def test_open_mpi_is_found(cluster):
    cluster(OPEN_MPI)
    place = find_place()
    assert (place.count, place.index, place.by_hand) == (3, 1, False)
    assert place.coordinator.startswith("10.96.0.1:")


def test_the_workers_of_a_tpu_pod_are_found(cluster, monkeypatch):
    be_on_a_tpu(
        monkeypatch,
        {"agent-worker-number": "1", "worker-network-endpoints": "localhost,127.0.0.2"},
    )
    assert find_place() == Place("localhost:8482", 2, 1, by_hand=False)
    cluster({"JAX_COORDINATOR_PORT": "9000"})
    assert find_place().coordinator == "localhost:9000"


def test_one_tpu_vm_of_google_is_alone(cluster, monkeypatch):
    be_on_a_tpu(
        monkeypatch, {"agent-worker-number": "0", "worker-network-endpoints": "no-host.invalid"}
    )
    start = time.monotonic()
    assert find_place() is None
    assert time.monotonic() - start < 1


# What GKE sets in a pod of a TPU slice.
GKE = {
    "TPU_SKIP_MDS_QUERY": "true",
    "TPU_WORKER_HOSTNAMES": "localhost,127.0.0.2",
    "TPU_WORKER_ID": "1",
}


def test_the_pods_of_a_tpu_slice_in_kubernetes_are_found(cluster, monkeypatch):
    be_on_a_tpu(monkeypatch, {})
    cluster(GKE | KUBERNETES | {"JOB_COMPLETION_INDEX": "1"})
    assert find_place() == Place("localhost:8482", 2, 1, by_hand=False)


def test_one_tpu_host_elsewhere_is_alone(cluster, monkeypatch, caplog):
    be_on_a_tpu(monkeypatch)
    with monkeypatch.context() as named:
        for name, value in (GKE | {"TPU_WORKER_HOSTNAMES": "localhost"}).items():
            named.setenv(name, value)
        assert find_place() is None and not caplog.text
        named.setenv("JOB_COMPLETION_INDEX", "0")
        named.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
        assert find_place() is None
    assert find_place() is None
    assert "GceTpuCluster cannot tell this process's place: OSError: no route" in caplog.text
    with pytest.raises(StartUpError, match="no route"):
        find_place("on")


def test_a_kubernetes_pod_that_belongs_to_no_job_is_alone(cluster):
    cluster(KUBERNETES)
    assert find_place() is None


def test_an_indexed_kubernetes_job_needs_its_package_or_the_flags(cluster, monkeypatch):
    cluster(KUBERNETES | {"JOB_COMPLETION_INDEX": "1"})
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.warns(UserWarning, match="kubernetes"), pytest.raises(StartUpError) as caught:
        find_place()
    assert "the package kubernetes. Install it, or give --coordinator" in str(caught.value)
    assert find_place("off") is None
    by_hand = find_place(coordinator="run-0.run:1234", num_processes=2, process_id=1)
    assert by_hand == Place("run-0.run:1234", 2, 1, by_hand=True)


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
    assert find_place() == Place("run-workers-0-0.run:1", 2, 1, by_hand=False)


def test_a_cluster_that_cannot_be_asked_says_so(cluster):
    cluster(SLURM | {"SLURM_NTASKS": "four"})
    with pytest.raises(StartUpError, match="SlurmCluster cannot tell.*'four'.*--distributed=off"):
        find_place()


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
        find_place(mode, **flags)
    assert message in str(caught.value)


def test_one_process_by_hand_is_alone_unless_it_insists(cluster):
    flags = {"coordinator": "here:1", "num_processes": 1, "process_id": 0}
    assert find_place(**flags) is None
    assert find_place("on", **flags) == Place("here:1", 1, 0, by_hand=True)


def test_a_cluster_that_does_not_answer_is_given_up(tmp_path):
    program = (
        "import time; from nat_jax.runtime import startup\n"
        "with startup._limited(0.5, lambda: 'asking'): time.sleep(60)"
    )
    run = Run(tmp_path, [[sys.executable, "-c", program]], [environment()])
    assert run.wait(60) == [2]
    assert run.output(0) == "nat_jax: after 0.5 s still asking\n"


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
    monkeypatch.setattr(startup.jax.distributed, "is_initialized", lambda: True)
    outer = RuntimeError("cannot be saved")
    outer.__cause__ = error
    for raised in (error, outer):
        assert startup.lost_peer(raised) == (str(error) if lost else None)


def test_alone_nothing_is_lost():
    error = jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")
    assert startup.lost_peer(error) is None and startup.who() == ""


def connect(folder, *places):
    """Start processes that only connect, each told (process_id, num_processes, timeout)."""
    port = free_port()
    command = [sys.executable, "-m", "nat_jax.main", CONFIG, "--workdir=run"]
    commands = [
        [
            *command,
            f"--coordinator=127.0.0.1:{port}",
            f"--process_id={process_id}",
            f"--num_processes={count}",
            f"--distributed_timeout={timeout}",
        ]
        for process_id, count, timeout in places
    ]
    return Run(folder, commands, [environment()] * len(commands))


def assert_one_message(run, folder, limit):
    codes = run.wait(limit)
    outputs = [run.said(index) for index in range(len(codes))]
    assert codes == [2] * len(codes), outputs
    for lines in outputs:
        assert len(lines) == 1 and lines[0].startswith("nat_jax: "), lines
    assert not (folder / "run").exists()


def test_processes_that_cannot_meet_say_so_in_one_message_each(tmp_path):
    """Three starts at the same time, as each waits for its time limit."""
    lonely = connect(tmp_path / "lonely", (0, 2, 4))
    lost = connect(tmp_path / "lost", (1, 2, 4))
    incomplete = connect(tmp_path / "incomplete", (0, 3, 9), (1, 3, 4))
    for name, run in (("lonely", lonely), ("lost", lost), ("incomplete", incomplete)):
        assert_one_message(run, tmp_path / name, 60)
    assert "after 4 s still waiting, as process 0 of 2, coordinator" in lonely.output(0)
    assert "not all came" in lonely.output(0)
    assert "which cannot be reached: [Errno 111] Connection refused" in lost.output(0)
    assert "not all came" in incomplete.output(0)
    assert "which answers; not all processes have come to it" in incomplete.output(1)


@pytest.mark.slow
def test_different_counts_and_equal_numbers_are_refused(tmp_path):
    for name, places, said in (
        ("higher", [(0, 2, 9), (2, 3, 9)], "Unexpected task registered with task=2"),
        ("between", [(0, 2, 9), (1, 3, 9)], "JAX sees 2. All need the same --num_processes"),
        ("equal", [(0, 3, 9), (1, 3, 9), (1, 3, 9)], "newer incarnation"),
    ):
        run = connect(tmp_path / name, *places)
        assert_one_message(run, tmp_path / name, 90)
        assert said in "".join(run.output(index) for index in range(len(places)))


def test_a_port_in_use_is_named(cluster):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartUpError, match=f"cannot listen on port {port}: .*in use"):
            startup.connect(Place(f"127.0.0.1:{port}", 2, 0, by_hand=True), timeout=5)


def test_ctrl_c_ends_a_process_that_waits(tmp_path):
    run = connect(tmp_path, (0, 2, 60))
    port = re.search(r"127.0.0.1:(\d+)", " ".join(run.processes[0].args))[1]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", int(port))):
                break
        time.sleep(0.05)
    run.processes[0].send_signal(signal.SIGINT)
    assert run.wait(10) == [-signal.SIGINT]


def test_a_task_for_one_process_refuses_several(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "nat_jax.main", CONFIG, "--config.task=report"),
            *("--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=1"),
        ],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("nat_jax: task 'report' runs in one process; this is number 1")
