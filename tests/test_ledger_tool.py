"""tools/ledger.py as a person types it: verify, diff and seen, on real runs and on ledgers that were tampered with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from little_run import add_shard, make_run
from test_commands import ROOT, train

from llm.checkpoint import folder
from llm.checkpoint.manifest import NAME, Manifest, read_manifest


def ask(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / "ledger.py", *words]
    return subprocess.run([str(w) for w in command], cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True, timeout=60)


def answer(*words) -> str:
    done = ask(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with one finished phase of two epochs and one that stands in the middle: 74 draws in 19 steps, 8 of 10 in 2."""
    root = tmp_path_factory.mktemp("trained")
    config = make_run(root, epochs=2)
    for words in ([], ["--only-new", "epochs=1", "--steps-today", "2"]):
        if words:
            add_shard(root / "data", root / "tokenizer", 500, 580)
        done = train("--config", config, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of that run, for a test to spoil."""
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy" / "checkpoints" / "little"


def edit(run: Path, change) -> None:
    """Change the newest manifest's fields and seal it again, as a fault in the program could have written it."""
    path = folder.entries(run)[-1].path
    fields = read_manifest(path).model_dump(mode="json")
    change(fields)
    (path / NAME).write_text(Manifest.model_validate(fields).text())


# ---------------------------------------------------------------- verify


def test_verify_recounts_a_sound_run_and_finds_its_shards(trained):
    told = answer("verify", trained / "checkpoints" / "little")
    assert "shards: 3 of 3 found by content, every byte read" in told
    assert "p0: 74 of 74 draws walked: each of 37 samples drawn 2 times; 0 skipped; 578 tokens; 19 steps" in told
    assert "p1: 8 of 10 draws walked: 8 of 10 samples drawn once, the others not; 0 skipped;" in told
    assert "everything agrees" in told and "note" not in told


def too_many_consumed(m):
    m["ledger"]["phases"][1]["consumed"] = 9


def gap_between_steps(m):
    m["ledger"]["phases"][1]["first_step"] += 1


def another_last_step(m):
    m["step"] += 1


def unit_twice(m):
    shards = m["ledger"]["phases"][0]["shards"]
    shards[0]["unit_ids"] = shards[1]["unit_ids"]


def skipped_behind_consumed(m):
    m["ledger"]["phases"][1]["skipped"] = [{"start": 4, "stop": 12, "step": 20, "reason": "nan"}]


def skipped_in_another_step(m):
    m["ledger"]["phases"][1]["skipped"] = [{"start": 0, "stop": 4, "step": 3, "reason": "nan"}]


def unknown_shard(m):
    m["ledger"]["phases"][1]["shards"][0]["shard_id"] = "f" * 64


FAULTS = {
    too_many_consumed: "the applied samples have",
    gap_between_steps: "begins at step 21, but the one before ends at 19",
    another_last_step: "the phases end at step 21, the checkpoint is of step 22",
    unit_twice: "stand in more than one of its shards",
    skipped_behind_consumed: "skipped samples that were not consumed",
    skipped_in_another_step: "the skipped step 3 is not one of its steps, 20 to 21",
    unknown_shard: "ffffffffffffffff) of 80 tokens is not in",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_verify_names_what_does_not_agree(run, fault):
    edit(run, fault)
    done = ask("verify", run)
    assert done.returncode == 2 and FAULTS[fault] in done.stderr, done.stdout + done.stderr


def test_verify_finds_one_flipped_bit_unless_it_is_told_not_to_read(run):
    path = next(run.parent.parent.glob("data/train-00200.bin"))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    data = ["--data", path.parent]
    done = ask("verify", run, *data)
    assert done.returncode == 2 and str(path) in done.stderr and "checksum" in done.stderr
    assert ask("verify", run, "--quick", *data).returncode == 0


def test_verify_finds_renamed_shards_and_misses_deleted_ones(run):
    data = run.parent.parent / "data"
    for path in list(data.glob("train-00200.*")):
        path.rename(path.with_name(path.name.replace("train-00200", "another-name")))
    assert "3 of 3" in answer("verify", run, "--data", data)
    (data / "another-name.bin").unlink()
    done = ask("verify", run, "--data", data)
    assert done.returncode == 2 and "train-00200" in done.stderr and "another-name.bin: missing" in done.stderr


def test_verify_without_the_data_says_so_and_recounts_the_rest(run, tmp_path):
    told = answer("verify", run, "--data", tmp_path / "gone")
    assert "were not looked for" in told and "everything agrees" in told


# ---------------------------------------------------------------- diff, seen a shard


def test_diff_tells_by_content_what_only_one_run_has_seen(trained, tmp_path):
    other = make_run(tmp_path)
    assert train("--config", other, "--steps-today", "5").returncode == 0
    told = answer("diff", trained / "checkpoints" / "little", tmp_path / "checkpoints" / "little")
    assert "seen by both: 2 units of text, 2 of them not as far" in told
    assert "only A has seen: 1 units of text; further than the other: 2" in told
    assert "train-00500" in told and "only B has seen: 0 units" in told
    same = answer("diff", other.parent / "checkpoints" / "little", other.parent / "checkpoints" / "little")
    assert "0 of them not as far" in same and same.count("has seen: 0 units") == 2


def test_seen_answers_for_shards_renamed_copied_partial_and_unknown(trained, tmp_path):
    run = trained / "checkpoints" / "little"
    for path in (trained / "data").glob("train-00000.*"):
        shutil.copy(path, tmp_path / path.name.replace("train-00000", "copy"))
    assert f"{tmp_path / 'copy.bin'}: fully" in answer("seen", run, tmp_path / "copy.bin")
    told = answer("seen", run, trained / "data" / "train-00500.meta.json")
    assert "partly (80.00 %)" in told and "phase p1 (data), steps 20 to 21" in told
    assert "never" in answer("seen", run, add_shard(tmp_path / "else", trained / "tokenizer", 900, 950))
    assert "never" in answer("seen", run, trained / "data" / "val-00400.bin")
    assert json.loads((trained / "little.json").read_text())["epochs"] == 2


def test_a_damaged_shard_proves_nothing(trained, tmp_path):
    for path in (trained / "data").glob("train-00000.*"):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "train-00000.bin").write_bytes(bytes(300))
    done = ask("seen", trained / "checkpoints" / "little", tmp_path / "train-00000.bin")
    assert done.returncode == 2 and "train-00000.bin" in done.stderr
