"""The commands as a person types them: real launchers, exit codes, and messages that say what, where and what to do."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from little_run import add_shard, make_run, make_tokenizer

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SCRIPTS = sorted([*ROOT.glob("launch/*.py"), *ROOT.glob("tools/*.py")])


def command(*words, timeout_s: float = 120, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1"} | environment
    return subprocess.run([str(w) for w in words], cwd=ROOT, env=env, timeout=timeout_s, capture_output=True, text=True)


def train(*words, **kwargs) -> subprocess.CompletedProcess:
    return command(sys.executable, "launch/train.py", *words, **kwargs)


@pytest.fixture
def config(tmp_path) -> Path:
    return make_run(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_help_answers_without_importing_torch(script):
    done = command(sys.executable, "-X", "importtime", script, "--help")
    assert done.returncode == 0 and "usage:" in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "deepspeed", "tokenizers", "numpy", "matplotlib"}


def test_underscores_and_dashes_in_flags_mean_the_same(config):
    done = train("--config", config, "--steps_today", "1", "run_name=a", "--minutes-today", "5", "train.lr=1e-3")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "--steps-today 1 done" in done.stdout


LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [BIN / "torchrun", "--nproc-per-node", "2"],
    "deepspeed": [
        BIN / "deepspeed", "--hostfile", "HOSTFILE", "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", "29641",
    ],
}  # fmt: skip


def test_python_torchrun_and_deepspeed_run_the_same_config_one_after_another(config, tmp_path):
    (tmp_path / "hostfile").write_text("# one host, itself\nlocalhost slots=2\n")
    for sitting, (name, launcher) in enumerate(LAUNCHERS.items(), start=1):
        launcher = [tmp_path / "hostfile" if word == "HOSTFILE" else word for word in launcher]
        done = command(*launcher, "launch/train.py", "--config", config, "--steps-today", "2", "zero_stage=1")
        assert done.returncode == 0, f"{name}: {done.stderr}{done.stdout}"
        assert f"steps  {2 * sitting - 2} to {2 * sitting}," in done.stdout, name
        assert "Warning" not in done.stdout + done.stderr or name == "deepspeed", f"{name}: {done.stderr}{done.stdout}"


MISTAKES = {
    "a missing file": (["--config", "none.yaml"], ["none.yaml", "no such file"]),
    "an unknown key": (["--config", "CONFIG", "learning_rat=1"], ["learning_rat"]),
    "a value of the wrong type": (["--config", "CONFIG", "epochs=many"], ["train.epochs", "many"]),
    "no data": (["--config", "CONFIG", "data_path=nowhere"], ["nowhere", "no such file"]),
    "no tokenizer": (["--config", "CONFIG", "tokenizer_path=nowhere"], ["nowhere", "train_tokenizer"]),
    "another tokenizer": (["--config", "CONFIG", "tokenizer_path=OTHER"], ["tokenizer", "Set tokenizer_path"]),
    "another seq_len": (["--config", "CONFIG", "seq_len=16", "batch_tokens=64"], ["seq_len 8", "16", "--rechunk"]),
    "a batch the ranks cannot share": (["--config", "CONFIG", "batch_size=3"], ["does not divide 4", "can be 1, 2, 4"]),
    "a vocabulary that is too small": (["--config", "CONFIG", "vocab_size=100"], ["100", "2,004"]),
    "a folder that cannot be made": (["--config", "CONFIG", "checkpoint_dir=/dev/null/x"], ["/dev/null", "cannot be written"]),
    "no steps": (["--config", "CONFIG", "--steps-today", "0"], ["--steps-today", "0"]),
    "a dataset that is not configured": (["--config", "CONFIG", "--dataset", "else"], ["else", "data"]),
    "a device that is not there": (["--config", "CONFIG", "--device", "cuda:7"], ["cuda:7"]),
    "a run to start from that is not there": (["--config", "CONFIG", "--init-from", "nowhere"], ["nowhere", "no checkpoint"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_message_exit_code_2_and_leaves_nothing_behind(config, tmp_path, mistake):
    words, parts = MISTAKES[mistake]
    if mistake == "a device that is not there" and "cuda" in subprocess.getoutput("nvidia-smi -L"):
        pytest.skip("there are GPUs here")
    other = make_tokenizer(tmp_path / "other", words=77)
    done = train(*[w.replace("CONFIG", str(config)).replace("OTHER", str(other)) for w in words])
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert output.count("error:") == 1 and "Traceback" not in output
    for part in parts:
        assert part in output
    assert not (tmp_path / "checkpoints").exists()


def test_logs_that_can_go_nowhere_are_told_before_anything_is_written_to_them(config):
    done = train("--config", config, "log.out_dir=/sys")
    assert done.returncode == 2 and "/sys/.tmp-probe: cannot be written" in done.stderr and "log.out_dir" in done.stderr


def test_a_truncated_shard_and_an_id_beyond_the_vocabulary_are_told_with_file_and_remedy(config, tmp_path):
    path = next((tmp_path / "data").glob("train-00000.bin"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    done = train("--config", config)
    assert done.returncode == 2 and str(path) in done.stderr and "299 bytes" in done.stderr and "tokenizing again" in done.stderr
    path.write_bytes(whole[:60] + b"\xff\xff" + whole[62:])
    done = train("--config", config)
    assert done.returncode == 2 and str(path) in done.stdout + done.stderr
    assert not list((tmp_path / "checkpoints").rglob("step-*"))


def test_under_torchrun_a_mistake_is_told_once(config):
    done = command(*LAUNCHERS["torchrun"], "launch/train.py", "--config", config, "data_path=nowhere")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count("error: nowhere") == 1
    assert "terminate called" not in done.stderr


def test_the_second_signal_leaves_at_once_and_the_first_saves(config, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", "--config", str(config), "epochs=100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:  # blocks until it trains
        if line.startswith("step"):
            break
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "SIGTERM" in output and "saved" in output and "go on" in output
    assert len(list((tmp_path / "checkpoints" / "little").glob("step-*"))) >= 1


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_second_job_in_the_same_run_is_refused_with_the_owner_named_and_touches_nothing(config, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", "--config", str(config), "epochs=100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    os.kill(process.pid, signal.SIGSTOP)  # so that only the second could change anything
    try:
        before = contents(tmp_path)
        for words in ((), ("--fresh",), ("--steal-lock",)):
            done = train("--config", config, *words)
            assert done.returncode == 2 and f"process {process.pid} on host {socket.gethostname()}" in done.stderr
        assert contents(tmp_path) == before
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.terminate()
    assert "saved" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_started_once_more_by_its_launcher_a_job_goes_on_and_begins_nothing_anew(config, tmp_path):
    again = {"SLURM_RESTART_COUNT": "1"}
    other = make_run(tmp_path / "base")
    assert train("--config", other, "--steps-today", "1").returncode == 0
    words = ["--config", config, "--init-from", tmp_path / "base" / "checkpoints" / "little", "--steps-today", "2"]
    assert train(*words).returncode == 0
    assert "resumes" in train(*words, **again).stdout
    assert sorted(path.name[:14] for path in (tmp_path / "checkpoints" / "little").glob("step-*")) == ["step-000000002", "step-000000004"]
    assert train("--config", config).returncode == 0
    another_pass = ["--config", config, "--reset-epoch", "--steps-today", "3"]
    assert train(*another_pass).returncode == 0
    done = train(*another_pass, **again)
    assert done.returncode == 0 and "resumes" in done.stdout, done.stderr


def test_asked_to_train_what_is_trained_it_says_so_and_names_the_choices(config, tmp_path):
    assert train("--config", config).returncode == 0
    again = train("--config", config)
    assert again.returncode == 0 and "already trained" in again.stdout and "--only-new" in again.stdout and "--reset-epoch" in again.stdout
    nothing = train("--config", config, "--only-new")
    assert nothing.returncode == 0 and "Nothing new" in nothing.stdout
    add_shard(tmp_path / "data", tmp_path / "tokenizer", 500, 580)
    assert "1 shards are new" in train("--config", config).stdout


def test_a_spent_budget_is_told_with_the_budget_that_the_rest_needs(config, tmp_path):
    assert "budget of 4 steps is spent" in train("--config", config, "total_step_budget=4").stdout
    again = train("--config", config, "total_step_budget=4")
    assert again.returncode == 0 and "train.total_step_budget=10" in again.stdout
    assert "phase finished" in train("--config", config, "total_step_budget=10").stdout
    add_shard(tmp_path / "data", tmp_path / "tokenizer", 500, 580)
    assert "total_step_budget=13" in train("--config", config, "total_step_budget=10", "--only-new").stdout


def test_init_from_starts_a_new_run_with_the_others_weights_and_an_empty_ledger(config, tmp_path):
    assert train("--config", config).returncode == 0
    done = train("--config", config, "run_name=second", "--init-from", tmp_path / "checkpoints" / "little", "--steps-today", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (
        [json.loads(line)["train/loss"] for line in (tmp_path / "checkpoints" / name / "logs" / "metrics.jsonl").read_text().splitlines()
         if "train/loss" in line] for name in ("little", "second")
    )  # fmt: skip
    assert second[0] < first[0] - 0.01 and "0 consumed" in done.stdout
    refused = train("--config", config, "run_name=second", "--init-from", tmp_path / "checkpoints" / "little")
    assert refused.returncode == 2 and "--init-from starts a new run" in refused.stderr


def test_fresh_moves_the_old_run_aside_and_begins_at_step_0(config, tmp_path):
    assert train("--config", config, "--steps-today", "2").returncode == 0
    done = train("--config", config, "--steps-today", "1", "--fresh")
    assert "starts at step 0" in done.stdout and "Run the same command again, without --fresh, to go on." in done.stdout
    assert len(list((tmp_path / "checkpoints").glob("little.before-*/step-000000002-a1"))) == 1


def test_minutes_today_ends_in_time_start_up_included(config):
    started_at = time.monotonic()
    done = train("--config", config, "epochs=100000", "spike_sigma=0", "--minutes-today", "0.4")  # a text known by heart
    assert done.returncode == 0 and "--minutes-today" in done.stdout, done.stdout + done.stderr
    assert time.monotonic() - started_at < 0.4 * 60 + 5


def test_a_list_of_ids_a_line_is_trained_on_as_a_shard(config, tmp_path):
    ids = tmp_path / "ids.jsonl"
    ids.write_text("".join(f"{list(range(start, start + 20))}\n" for start in range(600, 700, 20)))
    done = train("--config", config, f"data_path={ids}", "run_name=lists")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ids.imported").is_dir()
    inside = ("--config", config, f"data_path={ids}", "run_name=inside", "data.save_bin=false")
    for words in ((), ("--fresh",)):
        done = train(*inside, *words)
        assert done.returncode == 0 and "starts at step 0" in done.stdout, done.stdout + done.stderr
    ids.write_text("[1, 2, 99999]\n")
    refused = train("--config", config, f"data_path={ids}", "run_name=bad")
    assert refused.returncode == 2 and "99999" in (refused.stdout + refused.stderr).replace(",", "")
