"""--from-step: back to an older checkpoint on purpose, on a branch of its own that leaves the newer ones alone."""

import hashlib
from pathlib import Path

import pytest
from little_run import make_run, newest_manifest, sit_alone, sit_with
from ranks import run_ranks
from test_commands import train

from llm.checkpoint import folder
from llm.config import load_config


def names(config: Path) -> list[str]:
    return [entry.path.name for entry in folder.entries(load_config(config).run_folder)]


def contents(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def config(tmp_path) -> Path:
    """A run of 10 steps with a checkpoint at every other one."""
    config = make_run(tmp_path, save_every=2)
    sit_alone(tmp_path, config)
    return config


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_older_step_goes_on_as_a_branch_and_newer_checkpoints_stay_whatever_is_kept(tmp_path, config, ranks):
    run = load_config(config).run_folder
    newer = {step: contents(run / f"step-{step:09d}-a1") for step in (6, 8, 10)}
    last = newest_manifest(config)
    result = run_ranks(sit_with, ranks, tmp_path, str(config), ["keep_last=1", "keep_best=0"], None, {"from_step": 4, "steps_today": 2})[0]
    assert result["step"] == 6 and newest_manifest(config).parent.name == "step-000000004-a1"
    assert names(config) == [f"step-{s:09d}-a1" for s in (4, 6, 8, 10)] + ["step-000000006-a2"]  # 2 is an ancestor: it may go
    result = run_ranks(sit_with, ranks, tmp_path, str(config), ["keep_last=1", "keep_best=0", "keep_epochs=false"], None, {})[0]
    assert names(config) == [f"step-{s:09d}-a1" for s in (6, 8, 10)] + ["step-000000006-a2", "step-000000010-a3"]
    assert {step: contents(run / f"step-{step:09d}-a1") for step in newer} == newer
    assert result["chain"] == last.chain and result["ledger"] == last.ledger
    if ranks == 1:
        assert result["state"] == last.state_hash


def test_the_newest_attempt_that_has_the_step_is_taken(tmp_path, config):
    sit_alone(tmp_path, config, [], None, from_step=4, steps_today=3)
    assert names(config)[-2:] == ["step-000000006-a2", "step-000000007-a2"]
    sit_alone(tmp_path, config, [], None, from_step=6, steps_today=1)
    assert newest_manifest(config).parent.name == "step-000000006-a2"
    assert newest_manifest(config).lineage == ["step-000000004-a1", "step-000000006-a2"]


def test_a_step_without_a_checkpoint_is_refused_with_those_that_there_are(config):
    for step in ("5", "0", "-2"):
        done = train("--config", config, f"--from-step={step}")
        assert done.returncode == 2 and f"no checkpoint of step {step}" in done.stderr and "steps 2, 4, 6, 8, 10" in done.stderr
    assert len(names(config)) == 5
    done = train("--config", config, "--from-step", "2", "run_name=new")
    assert done.returncode == 2 and "no checkpoint at all" in done.stderr
    done = train("--config", config, "--from-step", "2", "--fresh")
    assert done.returncode == 2 and "leave out --fresh" in done.stderr and len(names(config)) == 5


@pytest.mark.parametrize("words", [("--dataset", "else"), ("--init-from", "RUN"), ("--init-from", "nowhere")])
def test_a_fresh_start_that_is_refused_leaves_the_old_run_where_it_was(config, words):
    run = load_config(config).run_folder
    before = contents(run)
    done = train("--config", config, "--fresh", *(str(run) if word == "RUN" else word for word in words))
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert contents(run) == before and [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize(("variable", "words"), [("TORCHELASTIC_RESTART_COUNT", ("--fresh",)), ("SLURM_RESTART_COUNT", ("--from-step", "4"))])
def test_a_restart_by_a_launcher_never_begins_again_what_the_first_start_has_begun(config, variable, words):
    run = load_config(config).run_folder
    before = names(config)
    done = train("--config", config, *words, **{variable: "1"})
    assert done.returncode == 3 and f"Start again without {words[0]} to go on" in done.stderr
    assert names(config) == before and [path.name for path in run.parent.iterdir()] == [run.name]


def test_a_damaged_one_is_named_and_no_other_step_is_taken_in_its_place(config):
    run = load_config(config).run_folder
    shard = next((run / "step-000000004-a1").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = train("--config", config, "--from-step", "4")
    assert done.returncode == 2 and str(shard) in done.stdout + done.stderr and "there are steps 2, 6, 8, 10" in done.stderr
    assert train("--config", config, "--from-step", "6", "--steps-today", "1").returncode == 0
