"""What stays of a run's checkpoints, and that deleting and thinning may be cut off anywhere."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from test_save_and_resume import NUMEL, flip_one_bit, names, save_step

from llm.checkpoint import folder
from llm.checkpoint.errors import Unjudged
from llm.checkpoint.manifest import NAME
from llm.checkpoint.resume import newest, open_checkpoint
from llm.checkpoint.retention import Retention, apply_retention
from llm.checkpoint.slices import CheckpointError
from llm.dist import World

LOSSES = {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 3.5, 6: 3.6}


@pytest.fixture
def run(tmp_path) -> Path:
    """Six checkpoints: the second is the best, the third ends an epoch."""
    run = tmp_path / "run"
    run.mkdir()
    for step, loss in LOSSES.items():
        save_step(World(), run, step, metrics={"val_loss": loss}, epoch_end=step == 3)
    return run


def saved(run: Path) -> list[str]:
    return [("" if e.is_whole else "w") + str(e.step) for e in folder.entries(run, thinned=True)]


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        (Retention(last=2), "5 6"),
        (Retention(last=1, best=2), "2 4 6"),
        (Retention(last=1, epochs=True), "3 6"),
        (Retention(last=1, every=2), "2 4 6"),
        (Retention(last=1, every=4), "4 6"),
        (Retention(last=2, best=1, epochs=True, thin=True), "w2 w3 5 6"),
    ],
)
def test_the_rules_say_what_stays_and_twice_is_as_once(run, rules, stay):
    for _ in range(2):
        apply_retention(run, rules, protect=[])
        assert " ".join(saved(run)) == stay
        assert all(open_checkpoint(e.path).manifest.step == e.step for e in folder.entries(run, thinned=True))


def test_one_that_is_kept_every_so_often_stays_while_the_run_goes_on(run):
    for step in (7, 8, 9, 10, 11):
        save_step(World(), run, step)
        apply_retention(run, Retention(last=1, every=3), protect=[])
    assert saved(run) == ["3", "6", "9", "11"]


def test_what_was_resumed_from_and_other_branches_stay_whole_and_are_not_counted(run):
    def place(step: int) -> Path:
        return run / folder.step_name(step, 1)

    apply_retention(run, Retention(last=1, best=1, thin=True), protect=[place(1)], apart=[place(2), place(6)])
    assert saved(run) == ["1", "2", "w4", "5", "6"]


def test_a_thinned_checkpoint_has_its_weights_and_is_never_resumed_from(run):
    apply_retention(run, Retention(last=1, best=1, thin=True), protect=[])
    assert names(run) == {"weights-000000002-a1", "step-000000006-a1", "RUN.json"}
    thinned = open_checkpoint(run, step=2)
    assert torch.equal(thinned.reader.read_full("w"), torch.full((NUMEL,), 2.0)) and (thinned.folder / "tokenizer" / "tokenizer.json").exists()
    assert thinned.manifest.parent.name == "step-000000002-a1"
    with pytest.raises(CheckpointError, match="no exp_avg.*thinned"):
        thinned.reader.read("w", "exp_avg", 0, NUMEL)
    with pytest.raises(CheckpointError, match=r"only its weights were kept.*--init-from .*weights-000000002-a1.*there are steps 6"):
        newest(World(), run, step=2)
    flip_one_bit(next((run / "step-000000006-a1").glob("shard-*")), 5000)
    with pytest.raises(CheckpointError, match="no sound checkpoint is left .*weights-000000002-a1 has weights alone"):
        newest(World(), run)
    assert names(run) == {"weights-000000002-a1", "quarantine", "RUN.json"}
    assert folder.next_attempt(run) == 2
    (run / "weights-000000002-a1").rename(run / "step-000000002-a1")  # by a person who hopes that this helps
    with pytest.raises(Unjudged, match="called step-000000002-a1, but its manifest is that of weights-000000002-a1"):
        newest(World(), run)
    assert names(run) == {"step-000000002-a1", "quarantine", "RUN.json"}


def test_a_damaged_checkpoint_is_not_thinned_and_an_unreadable_one_not_deleted(run, capsys):
    flip_one_bit(next((run / "step-000000002-a1").glob("shard-*")), 5000)
    (run / "step-000000001-a1" / NAME).write_text("{}")
    apply_retention(run, Retention(last=1, best=1, thin=True), protect=[])
    assert saved(run) == ["1", "2", "6"] and "could not be thinned" in capsys.readouterr().out
    assert names(run) == {f"step-00000000{step}-a1" for step in (1, 2, 6)} | {"RUN.json"}


def test_a_checkpoint_whose_manifest_cannot_be_read_takes_no_sound_ones_place(run, capsys):
    (run / "step-000000006-a1" / NAME).write_text("{}")
    apply_retention(run, Retention(last=2), protect=[])
    assert saved(run) == ["4", "5", "6"]


def test_big_models_are_thinned_in_several_files_with_parameters_cut_where_needed(run, monkeypatch):
    monkeypatch.setattr("llm.checkpoint.weights.FILE_ELEMENTS", 300)
    apply_retention(run, Retention(last=1, best=1, thin=True), protect=[])
    thinned = open_checkpoint(run, step=2)
    assert len(list(thinned.folder.glob("shard-*"))) == 4
    assert torch.equal(thinned.reader.read_full("w"), torch.full((NUMEL,), 2.0))


CHANGES = ("mkdir", "open", "pwrite", "fsync", "rename", "replace", "unlink", "rmdir")


def killed_after(changes: int, run: Path, rules: Retention) -> bool:
    """Apply retention in a process that is gone, without any clean-up, just before so many file operations are done; whether it was."""
    child = os.fork()
    if child == 0:
        left = [changes]

        def counting(real):
            def call(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in CHANGES:
            setattr(os, name, counting(getattr(os, name)))
        try:
            apply_retention(run, rules, protect=[])
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.timeout(120)
def test_a_kill_at_any_point_of_it_loses_nothing_and_the_next_call_ends_it(tmp_path):
    rules, run = Retention(last=1, best=1, thin=True), tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        save_step(World(), run, step, metrics={"val_loss": {1: 2.0, 2: 1.0, 3: 3.0}[step]})
    pristine, kills = tmp_path / "pristine", 0
    shutil.copytree(run, pristine)
    while killed_after(kills, run, rules):
        kills += 1
        found = folder.entries(run, thinned=True)
        assert all(open_checkpoint(e.path).manifest.step == e.step for e in found)
        assert {2, 3} <= {e.step for e in found} and newest(World(), run).manifest.step == 3
        if kills % 2:  # the next attempt cleans first, the same one does not
            folder.clean(run)
        apply_retention(run, rules, protect=[])
        folder.clean(run)
        assert names(run) == {"weights-000000002-a1", "step-000000003-a1", "RUN.json"}
        shutil.rmtree(run)
        shutil.copytree(pristine, run)
    assert kills > 20, kills
