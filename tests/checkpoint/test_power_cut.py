"""The order of writes, fsyncs and renames: whatever a power cut leaves of it, each committed checkpoint is whole and one is there."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from power_cuts import Recorder, lay_out
from test_save_and_resume import NUMEL, save_step

from llm import durable
from llm.checkpoint import folder
from llm.checkpoint.resume import newest, open_checkpoint
from llm.checkpoint.retention import Retention, apply_retention
from llm.dist import World
from llm.log import UserError


def first_save(run: Path) -> None:
    run.mkdir()
    save_step(World(), run, 1)


def next_save(run: Path) -> None:
    save_step(World(), run, 3)


def tidy(run: Path) -> None:
    durable.write_text(run / "seen_datasets.json", json.dumps({"seen": "new"}))
    apply_retention(run, Retention(last=1, best=1, thin=True), protect=[])


def prepare(run: Path, until: str) -> None:
    """The run as it is before the work named."""
    if until != "first_save":
        first_save(run)
        save_step(World(), run, 2, metrics={"val_loss": 1.0})
        durable.write_text(run / "seen_datasets.json", json.dumps({"seen": "old"}))
    if until == "tidy":
        next_save(run)


WORK = {"first_save": first_save, "next_save": next_save, "tidy": tidy}
BEFORE = {"first_save": None, "next_save": 2, "tidy": 3}
AFTER = {"first_save": 1, "next_save": 3, "tidy": 3}


def fault(run: Path, name: str, done: bool) -> str | None:
    """What is not as promised in a run that a power cut has left, in words. `done`: the work had returned by then."""
    try:
        for entry in folder.entries(run, thinned=True):
            weights = open_checkpoint(entry.path).reader.read_full("w")
            if not torch.equal(weights, torch.full((NUMEL,), float(entry.step))):
                return f"{entry.path.name} has other weights"
        if name == "tidy" and not {2, 3} <= {e.step for e in folder.entries(run, thinned=True)}:
            return "a checkpoint that was to be kept is gone"
        found = newest(World(), run)
        for view in ("RUN.json", "seen_datasets.json"):
            if (run / view).exists():
                json.loads((run / view).read_text())
    except (UserError, ValueError) as error:
        return str(error)
    step = found.manifest.step if found else None
    if name == "tidy" and done and json.loads((run / "seen_datasets.json").read_text())["seen"] != "new":
        return "seen_datasets.json is old"
    if name == "first_save" and done and not (run / "RUN.json").exists():
        return "RUN.json is gone"
    return None if step in ((AFTER[name],) if done else (BEFORE[name], AFTER[name])) else f"resumes from step {step}"


def first_fault(tmp_path: Path, name: str, left_out: int | None, tries: int) -> tuple[str | None, Recorder, int]:
    """The first broken promise, the record, and how many ways the disk may look were tried."""
    root, cut = tmp_path / "disk", tmp_path / "cut"
    root.mkdir()
    prepare(root / "run", name)
    recorder, n, rng = Recorder(root, left_out), 0, random.Random(0)
    recorder.run(lambda: WORK[name](root / "run"))
    for moment in recorder.moments:
        for files in recorder.cuts(moment, rng, tries):
            n += 1
            lay_out(files, cut)
            problem = fault(cut / "run", name, moment is recorder.moments[-1])
            shutil.rmtree(cut)
            if problem:
                return problem, recorder, n
    return None, recorder, n


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", WORK)
def test_a_power_cut_at_any_moment_leaves_the_old_checkpoint_or_the_new_one_and_both_whole(tmp_path, name):
    problem, recorder, n = first_fault(tmp_path, name, None, tries=15)
    assert problem is None, problem
    assert n > 2 * len(recorder.moments) and len(recorder.fsyncs) >= 6, (n, recorder.fsyncs)


@pytest.mark.timeout(120)
def test_without_any_one_of_its_fsyncs_a_power_cut_can_break_a_save(tmp_path):
    _, recorder, _ = first_fault(tmp_path, "next_save", None, tries=0)
    unneeded = []
    for left_out, path in enumerate(recorder.fsyncs):
        (tmp_path / str(left_out)).mkdir()
        if first_fault(tmp_path / str(left_out), "next_save", left_out, tries=16)[0] is None:
            unneeded.append(path.partition("-")[0])
    assert unneeded == ["run/.tmp"]  # each rank's own, before the vote: on one machine the one after the manifest covers it
