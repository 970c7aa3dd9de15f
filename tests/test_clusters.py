"""Slurm's script under stand-ins for srun and scontrol, and mpirun; clusters/torchrun.sh runs in tests/faults/test_two_hosts.py."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from little_run import make_run

from llm.checkpoint import folder

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TASKS = 2

# As srun does: one process a task, signals passed on, the highest exit code.
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[sys.argv.index("python"):]
count = os.environ["SLURM_NTASKS"]
places = [{"SLURM_STEP_NUM_TASKS": count, "SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(int(count))]
tasks = [subprocess.Popen(words, env=os.environ | place) for place in places]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1:] == ["show", "hostnames", "here[1-2]"]:
    print("127.0.0.1\\nanother")
else:
    early = " while it trains" * os.path.exists(os.environ["LOCK"])
    open(os.environ["NOTED"], "a").write(" ".join(sys.argv[1:]) + early + "\\n")
"""
PRETENDED = """
import os, sys
open(os.environ["NOTED"], "a").write(" ".join(sys.argv[1:]) + "\\n")
sys.exit(int(os.environ["CODE"]))
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """The environment of a batch script, with Slurm's commands in front of others."""
    for name, source in (("srun", SRUN), ("scontrol", SCONTROL)):
        install(tmp_path / "bin" / name, source)
    return os.environ | {
        "PATH": os.pathsep.join([str(tmp_path / "bin"), str(BIN), os.environ["PATH"]]), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "NOTED": str(tmp_path / "noted"), "LOCK": str(tmp_path / "checkpoints/little/LOCK"),
        "SLURM_JOB_NODELIST": "here[1-2]", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": str(TASKS),
    }  # fmt: skip


def install(path: Path, source: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}{source}")
    path.chmod(0o755)


def noted(slurm: dict) -> list[str]:
    path = Path(slurm["NOTED"])
    return path.read_text().splitlines() if path.exists() else []


def submit(slurm: dict, *words) -> subprocess.Popen:
    command = ["bash", "clusters/slurm.sbatch", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.timeout(120)
def test_before_the_time_limit_a_slurm_job_saves_and_queues_again_and_the_next_one_ends_the_run(slurm, tmp_path):
    config = make_run(tmp_path, epochs=200)
    job = submit(slurm, "--config", config)
    lines = []
    for line in job.stdout:  # blocks until it trains
        lines.append(line)
        if line.startswith("step"):
            job.send_signal(signal.SIGUSR1)
            break
    output = "".join(lines) + job.communicate(timeout=60)[0]
    run = tmp_path / "checkpoints" / "little"
    (saved,) = folder.entries(run)
    assert job.returncode == 0 and "SIGUSR1" in output and "go on" in output, output
    assert noted(slurm) == [f"requeue {os.getpid()}"]

    rest = [f"total_step_budget={saved.step + 2}", "--accept-change", "train.total_step_budget"]
    job = submit(slurm | {"SLURM_RESTART_COUNT": "1", "SLURM_NTASKS": "1"}, "--config", config, *rest)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and f"resumes {saved.path} (saved on {TASKS} ranks)" in output, output
    assert folder.entries(run)[-1].step == saved.step + 2 and len(noted(slurm)) == 1, output


@pytest.mark.parametrize(
    ("code", "after_s", "queued"),
    [(0, 0, False), (2, 0, False), (3, 0, False), (75, 0, True), (1, 0, True), (137, 0, True), (75, 120, False), (1, 120, False)],
)
def test_a_slurm_job_queues_again_only_where_that_may_help(slurm, tmp_path, code, after_s, queued):
    install(tmp_path / "bin" / "python", PRETENDED)
    job = submit(slurm | {"CODE": str(code), "RETRY_AFTER_S": str(after_s), "SLURM_NTASKS": "1"}, "--config", "a b.yaml")
    output = job.communicate(timeout=20)[0]
    assert job.returncode == (0 if queued else code), output
    assert noted(slurm) == ["launch/train.py --config a b.yaml"] + queued * [f"requeue {os.getpid()}"]


def test_a_requeued_slurm_job_takes_the_lock_of_its_former_life(slurm, tmp_path):
    install(tmp_path / "bin" / "python", PRETENDED)
    submit(slurm | {"CODE": "0", "SLURM_RESTART_COUNT": "2"}, "--config", "x").communicate(timeout=20)
    assert noted(slurm) == ["launch/train.py --config x --steal-lock"] * TASKS


def test_a_head_that_is_not_known_is_told_before_anything_starts():
    for head, told in (("no.such.host.invalid", "HEAD=no.such.host.invalid is no address"), ("", "HEAD: the address of the host where all meet")):
        env = os.environ | {"HEAD": head, "HOSTS": "1"}
        done = subprocess.run(["bash", "clusters/torchrun.sh", "launch/train.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode and done.stderr.count("HEAD") == done.stderr.count("\n") == 1 and told in done.stderr, done.stderr


def test_the_page_marks_what_needs_a_cluster_and_names_files_that_are_there():
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    unmarked = [line for line in lines if "# needs a cluster" not in line]
    assert len(lines) > 6 and unmarked == ["mpirun -n 2 python launch/train.py --config configs/toy.yaml"]  # as the test below
    assert set(re.findall(r"clusters/([\w.]+\w)", page)) == {p.name for p in (ROOT / "clusters").iterdir()}


MPIRUN = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(not MPIRUN, reason="there is no mpirun: pip install 'tally-llm[mpi]'")
def test_mpirun_on_one_host_needs_no_address(tmp_path):
    config = make_run(tmp_path)
    command = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "launch/train.py", "--config", config]
    env = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command), "--steps-today", "2"], cwd=ROOT, env=env, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0 and "x 2 ranks" in done.stdout and "--steps-today 2 done" in done.stdout, done.stdout + done.stderr
    assert [e.step for e in folder.entries(tmp_path / "checkpoints" / "little")] == [2]
