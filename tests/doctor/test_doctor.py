"""tools/doctor.py names what is wrong, with real processes: no compiler, full disks, read-only folders, wrong answers, little /dev/shm."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import faulty_doctor
import pytest
from little_run import make_run
from ranks import run_ranks

from llm.dist import World

ROOT = Path(__file__).parents[2]
torture = pytest.mark.skipif(not os.environ.get("TORTURE"), reason="in make torture")
pytestmark = pytest.mark.timeout(120)


def doctor(*words, prefix=(), script: str = "tools/doctor.py", code: int = 1, limit=None, **env) -> dict[str, dict]:
    """Its lines by name, after it has left with this code."""
    command = [*prefix, sys.executable, ROOT / script, "--json", *words]
    done = subprocess.run(
        [str(w) for w in command], env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | env, timeout=100, capture_output=True,
        text=True, preexec_fn=limit, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return {line["name"]: line for line in json.loads(done.stdout)}


def in_mounts(*commands: str) -> list[str]:
    """Words before a command that is to run with mounts of its own, made by these; skips where they are not permitted."""
    prefix = ["unshare", "--mount", "sh", "-c", " && ".join([*commands, 'exec "$@"']), "sh"]
    if not all(shutil.which(tool) for tool in ("unshare", "mount")):
        pytest.skip("there is no unshare or mount here")
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounts are not permitted here: {tried.stderr.strip()}")
    return prefix


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("how", ["CXX", "PATH"])
def test_without_a_compiler_it_fails_and_says_what_to_install(tmp_path, how):
    env = {"CXX": "missing"} if how == "CXX" else {"PATH": str(tmp_path)}
    line = doctor("--only", "compiler", **env)["compiler"]
    assert line["status"] == "fail" and ("missing" if how == "CXX" else "g++") in line["found"] and "Install" in line["advice"]


@torture
def test_a_compiler_that_fails_is_found_out_by_compiling(tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\necho 'cannot execute cc1plus' >&2; exit 1\n")
    (tmp_path / "g++").chmod(0o755)
    line = doctor("--only", "compiler", PATH=f"{tmp_path}:{os.environ['PATH']}")["compiler"]
    assert line["status"] == "fail" and str(tmp_path / "g++") in line["found"] and "Install" in line["advice"]


def test_a_full_disk_fails(folder):
    prefix = in_mounts(f"mount -t tmpfs -o size=4M none {folder}")
    line = doctor("--only", "run-folder", "--folder", folder, prefix=prefix)["run-folder"]
    assert line["status"] == "fail" and "the disk is full" in line["found"] and str(folder) in line["found"] and "Make room" in line["advice"]


def test_a_limit_on_the_size_of_files_fails_and_leaves_nothing_behind(folder):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    line = doctor("--only", "run-folder", "--folder", folder, limit=limit)["run-folder"]
    assert line["status"] == "fail" and "ulimit -f" in line["found"] and list(folder.iterdir()) == []


def test_a_read_only_run_folder_fails(folder):
    prefix = in_mounts(f"mount --bind {folder} {folder}", f"mount -o remount,ro,bind {folder}")
    lines = doctor("--only", "run-folder,free-space", "--folder", folder / "not-there-yet", prefix=prefix)
    assert lines["run-folder"]["status"] == "fail" and "read-only" in lines["run-folder"]["found"]
    assert "checkpoint.checkpoint_dir" in lines["run-folder"]["advice"]


def test_a_run_folder_below_a_file_fails(tmp_path):
    (tmp_path / "file").touch()
    line = doctor("--only", "run-folder", "--folder", tmp_path / "file" / "run")["run-folder"]
    assert line["status"] == "fail" and "is a file" in line["found"]


def test_a_small_shared_memory_fails():
    line = doctor("--only", "shared-memory", prefix=in_mounts("mount -t tmpfs -o size=64M none /dev/shm"))["shared-memory"]
    assert line["status"] == "fail" and "67 MB" in line["found"] and "--shm-size" in line["advice"]


def test_a_rank_that_answers_wrongly_is_named_and_the_verdict_is_fail():
    lines = doctor("--only", "ranks,matmul", script="tests/doctor/faulty_doctor.py", FAULT="matmul:1")
    assert lines["ranks"]["status"] == "ok" and lines["matmul"]["status"] == "fail" and "on rank 1 (" in lines["matmul"]["found"]
    assert "Do not train there" in lines["matmul"]["advice"]


@torture
def test_a_rank_that_goes_away_fails_and_ends_the_examination():
    lines = doctor("--only", "ranks,matmul,all-reduce", script="tests/doctor/faulty_doctor.py", FAULT="leave:1")
    assert list(lines) == ["ranks", "matmul"] and "a rank is gone" in lines["matmul"]["found"]


def answers(world: World, faults: list[str]) -> list[list[str]]:
    """What the two examinations of numbers find with one fault after another in rank 2."""
    from llm.doctor import ranks

    found, sound = [], (ranks.products, World.sum_tensor)
    ranks.VALUES = {"cpu": 1 << 12}
    for fault in faults:
        ranks.products, World.sum_tensor = sound
        if world.rank == 2 and fault != "none":
            faulty_doctor.spoil(fault)
        lines = ranks.matmul(world), ranks.all_reduce(world)
        found.append(["well" if line.status != "fail" else line.found for line in lines])  # speeds differ from rank to rank
    return found


def test_of_three_ranks_the_one_with_a_wrong_product_a_wrong_bit_or_a_wrong_sum_is_named_on_all(tmp_path):
    results = run_ranks(answers, 3, tmp_path, ["none", "matmul", "matmul-bits", "sum"])
    assert results[0] == results[1] == results[2]
    sound, product, bit, total = results[0]
    assert sound == ["well", "well"]
    assert product[0].startswith("wrong products on rank 2 (") and product[1] == "well"
    assert bit[0].startswith("other bits than the rest on rank 2 (") and bit[1] == "well"
    assert total[0] == "well" and total[1].startswith("wrong sums on rank 2 (")


def test_little_open_files_and_little_room_for_checkpoints_are_told(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))

    config = make_run(tmp_path)
    words = ["--config", config, "n_layers=90", "d_ff=1000000000"]  # 8.6e12 parameters
    lines = doctor("--only", "open-files,free-space", *words, limit=limit)
    assert lines["open-files"]["status"] == "fail" and "ulimit -n" in lines["open-files"]["advice"]
    assert lines["free-space"]["status"] == "fail" and "keep_last" in lines["free-space"]["advice"]


def test_attention_is_compared_without_holding_all_scores_of_a_long_row(tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))

    words = ["--config", make_run(tmp_path), "seq_len=131072", "batch_tokens=131072"]  # 4 heads, 137 GB of scores
    line = doctor("--only", "attention", *words, code=0, limit=limit)["attention"]
    assert line["status"] == "ok" and "at 131,072 tokens a row" in line["found"] and "over 2,048" in line["found"]


@pytest.mark.parametrize("last", [["shared-folder"], pytest.param(["zero"], marks=torture)])
def test_with_a_config_it_looks_at_the_loader_the_room_and_two_ranks_and_leaves_nothing_behind(tmp_path, last):
    config = make_run(tmp_path)
    names = [
        "python", "torch", "gpu", "precision", "attention", "deepspeed", "shared-memory", "open-files", "run-folder", "free-space", "loader",
        "ranks", *last,
    ]  # fmt: skip
    slow_model = "d_ff=9600"  # that no loader keeps waiting
    lines = doctor("--config", config, slow_model, "zero_stage=2", "--only", ",".join(names), code=0)
    assert list(lines) == names and {line["status"] for line in lines.values()} <= {"ok", "warn"}
    assert "2 on 1 host" in lines["ranks"]["found"] and "from 2 shards" in lines["loader"]["found"]
    assert "at 8 tokens a row" in lines["attention"]["found"] and not (tmp_path / "checkpoints").exists()
    assert "zero" not in lines or "ZeRO-2" in lines["zero"]["found"]


def test_a_name_that_is_not_there_and_a_config_that_is_not_there_are_mistakes():
    for words, told in ((["--only", "disk"], "run-folder"), (["--config", "none.yaml"], "no such file"), (["a.b=1"], "--config")):
        done = subprocess.run([sys.executable, "tools/doctor.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
