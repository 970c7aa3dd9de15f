"""What is known of a checkpoint and what is not: only what a hash proves damaged is moved; all else stops, says why, and stays."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from ranks import run_ranks
from refusing import refusing
from resealing import forge
from test_save_and_resume import NUMEL, names, save_step

import llm
from llm.checkpoint.errors import Gone, Unjudged, Unreadable
from llm.checkpoint.manifest import NAME
from llm.checkpoint.resume import newest, open_checkpoint, read_checkpoint
from llm.checkpoint.retention import Retention, apply_retention
from llm.cli import NEEDS_A_PERSON, RETRY
from llm.dist import World
from llm.log import UserError

CODES = {
    errno.EACCES: NEEDS_A_PERSON, errno.EPERM: NEEDS_A_PERSON, errno.ENAMETOOLONG: NEEDS_A_PERSON, errno.ELOOP: NEEDS_A_PERSON,
    errno.EIO: RETRY, errno.ESTALE: RETRY, errno.EMFILE: RETRY, errno.ENFILE: RETRY, errno.ETIMEDOUT: RETRY, errno.ENOMEM: RETRY,
}  # fmt: skip
BOTH = {"step-000000001-a1", "step-000000002-a1", "RUN.json"}


@pytest.fixture
def run(tmp_path) -> Path:
    """Two checkpoints; the newer one is at stake."""
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_step(World(), run, step)
    return run


def step_or_error(world: World, run: Path) -> list:
    try:
        return [newest(world, run).manifest.step, None]
    except UserError as error:
        return [str(error), error.exit_code]


# ------------------------------------------------------------------ what the system refuses


@pytest.mark.parametrize("call", ["open", "read", "stat", "listdir"])
def test_what_cannot_be_read_stops_with_the_errno_and_nothing_is_moved(run, call):
    inside = run if call == "listdir" else run / "step-000000002-a1"
    for number in CODES:
        with refusing(call, number, inside) as refused:
            told, code = step_or_error(World(), run)
            with pytest.raises(Unreadable, match=errno.errorcode[number]):
                open_checkpoint(run)
        assert refused and code == CODES[number] and errno.errorcode[number] in told and str(inside) in told
        assert names(run) == BOTH and newest(World(), run).manifest.step == 2


def refuse_on_rank_1(world: World, run: str) -> list:
    told, inside = [], Path(run, "step-000000002-a1") if world.rank == 1 else Path("/nowhere")
    for call, number in (
        ("open", errno.EACCES), ("open", errno.EMFILE), ("read", errno.EIO), ("read", errno.ESTALE), ("stat", errno.EACCES),
    ):  # fmt: skip
        with refusing(call, number, inside):
            told.append([call, number, *step_or_error(world, Path(run))])
    return told


def test_what_rank_1_alone_cannot_read_stops_all_ranks_alike_and_nothing_is_moved(run, tmp_path):
    first, second = run_ranks(refuse_on_rank_1, 2, tmp_path, str(run))
    assert first == second
    for _, number, told, code in first:
        assert errno.errorcode[number] in told and "rank 1" in told and code == CODES[number], told
    assert names(run) == BOTH


CLOSED = {
    "the run": "", "the checkpoint": "step-000000002-a1", "the manifest": f"step-000000002-a1/{NAME}",
    "a shard": "step-000000002-a1/shard-00000-of-00001.safetensors", "the tokenizer's folder": "step-000000002-a1/tokenizer",
    "the note of the run's id": "RUN.json",
}  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("closed", CLOSED)
def test_another_user_who_may_not_read_it_is_told_so_and_moves_nothing(closed):
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to all others
        os.chmod(place, 0o755)
        run = Path(place, "run")
        run.mkdir()
        for step in (1, 2):
            save_step(World(), run, step)
        os.chmod(run, 0o777)  # so that moving would be permitted
        os.chmod(run / CLOSED[closed], 0o000)
        told, code = as_nobody(lambda: step_or_error(World(), run))
        reader, reader_code = as_nobody(lambda: opened(run))
        assert code == reader_code == NEEDS_A_PERSON and "EACCES" in told and "EACCES" in reader, (told, reader)
        assert str(run / CLOSED[closed]) in told and names(run) == BOTH


def opened(run: Path) -> list:
    try:
        return [open_checkpoint(run).manifest.step, None]
    except UserError as error:
        return [str(error), error.exit_code]


def as_nobody(work) -> list:
    """What `work` gives in a process without root's rights."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgid(65534)
            os.setuid(65534)
            os.write(here, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(here)
    os.waitpid(child, 0)
    with open(there, "rb") as answer:
        return json.loads(answer.read())


def test_a_checkpoint_behind_a_link_to_a_disk_that_is_not_there_is_not_passed_over(run, tmp_path):
    (run / "step-000000002-a1").rename(tmp_path / "moved")
    (run / "step-000000002-a1").symlink_to(tmp_path / "moved")
    assert newest(World(), run).manifest.step == 2  # a whole folder elsewhere is as good
    (tmp_path / "moved").rename(tmp_path / "unmounted")
    told, code = step_or_error(World(), run)
    assert code == NEEDS_A_PERSON and str(tmp_path / "moved") in told and names(run) == BOTH


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("name", ["shard-00000-of-00001.safetensors", "rank-00000-of-00001.json", "tokenizer/tokenizer.json", NAME])
@pytest.mark.parametrize("target", ["the same file", "nothing"])
def test_a_link_in_the_place_of_a_file_stops_and_the_file_put_back_goes_on(run, tmp_path, name, target):
    path = run / "step-000000002-a1" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / ("elsewhere" if target == "the same file" else "missing"))
    told, code = step_or_error(World(), run)
    assert code == NEEDS_A_PERSON and f"{path}: is a symbolic link" in told and names(run) == BOTH
    shutil.move(tmp_path / "elsewhere", path)
    assert newest(World(), run).manifest.step == 2


# ------------------------------------------------------------------ other versions


def seal_otherwise(path: Path, change) -> None:
    """As a later version with another rule for its seal would write it."""
    fields = json.loads((path / NAME).read_text())
    change(fields)
    (path / NAME).write_text(json.dumps(fields | {"self_sha256": hashlib.blake2b(b"theirs").hexdigest()}))


OF_A_NEWER_ONE = {
    "a new field": lambda f: f.update(experts=8),
    "a new field of each file": lambda f: f["files"][0].update(codec="zstd"),
    "a new field of each parameter": lambda f: f["params"][0].update(dtype="bf16"),
    "a new field of each chunk": lambda f: f["files"][0]["chunks"][0].update(crc=7),
    "a higher format number": lambda f: f.update(format="tally-checkpoint/2"),
    "a higher number of the format without moments": lambda f: f.update(format="tally-weights/12"),
    "a higher number and a new field": lambda f: f.update(format="tally-checkpoint/3", experts=8),
    "a setting of the model": lambda f: f.update(config={"model": MODEL | {"mixture_of_experts": 8}}),
    "a value of a setting of the model": lambda f: f.update(config={"model": MODEL | {"norm": "dynamic_tanh"}}),
}
MODEL = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_ff": 8, "seq_len": 8}


@pytest.mark.parametrize("difference", OF_A_NEWER_ONE)
def test_what_a_newer_version_wrote_is_told_with_both_versions_and_stays(run, difference):
    checkpoint = run / "step-000000002-a1"
    forge(checkpoint, lambda f: (f.update(versions={"tally": "9.8.7"}), OF_A_NEWER_ONE[difference](f)))
    before = (checkpoint / NAME).read_bytes()
    for told, code in (step_or_error(World(), run), opened(run), opened(checkpoint)):
        assert code == NEEDS_A_PERSON and "9.8.7" in told and llm.__version__ in told and str(checkpoint) in told
    assert names(run) == BOTH and (checkpoint / NAME).read_bytes() == before


def test_a_newer_format_that_is_sealed_by_a_rule_of_its_own_is_not_taken_for_damage(run):
    seal_otherwise(run / "step-000000002-a1", lambda f: f.update(format="tally-checkpoint/2", versions={"tally": "9.8.7"}))
    told, code = step_or_error(World(), run)
    assert code == NEEDS_A_PERSON and "9.8.7" in told and "tally-checkpoint/2" in told and names(run) == BOTH


# ------------------------------------------------------------------ what is proven


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "the manifest is missing": lambda c: (c / NAME).unlink(),
    "the manifest is empty": lambda c: (c / NAME).write_bytes(b""),
    "the manifest is cut": lambda c: cut(c / NAME),
    "the manifest is changed and not sealed": lambda c: seal_otherwise(c, lambda f: f.update(step=7)),
    "a shard is missing": lambda c: next(c.glob("shard-*")).unlink(),
    "a shard is cut": lambda c: cut(next(c.glob("shard-*"))),
    "the tokenizer is missing": lambda c: shutil.rmtree(c / "tokenizer"),
    "a small file has another content": lambda c: (c / "tokenizer" / "tokenizer.json").write_text("[]"),
}


@pytest.mark.parametrize("harm", DAMAGE)
def test_what_is_proven_damaged_is_set_aside_and_the_older_one_used(run, harm):
    DAMAGE[harm](run / "step-000000002-a1")
    assert newest(World(), run).manifest.step == 1
    assert names(run / "quarantine") == {"step-000000002-a1"} and names(run) == BOTH - {"step-000000002-a1"} | {"quarantine"}


def test_a_sealed_number_that_is_no_json_is_no_damage(run):
    forge(run / "step-000000002-a1", lambda f: f.update(engine={"lr": float("nan")}))
    assert step_or_error(World(), run)[1] == NEEDS_A_PERSON and names(run) == BOTH


# ------------------------------------------------------------------ deleted while it is read


def delete_newest(run: Path) -> None:
    shutil.rmtree(max(run.glob("step-*")))


def test_a_reader_whose_checkpoint_is_deleted_takes_the_next_newest(run, monkeypatch):
    """Before its manifest is read, before a shard is, and after the check."""
    real = os.open
    for name in (NAME, "shard-00000-of-00001.safetensors"):
        save_step(World(), run, 3)

        def deleted_first(path, *args, name=name, **kwargs):
            if str(path).endswith(f"step-000000003-a1/{name}"):
                delete_newest(run)
            return real(path, *args, **kwargs)

        monkeypatch.setattr(os, "open", deleted_first)
        assert open_checkpoint(run).manifest.step == 2
        monkeypatch.undo()
    save_step(World(), run, 3)

    def read(checkpoint) -> float:
        if checkpoint.manifest.step == 3:
            delete_newest(run)
        return checkpoint.reader.read_full("w")[0].item()

    assert read_checkpoint(run, None, read) == 2.0
    checkpoint = open_checkpoint(run)
    delete_newest(run)
    with pytest.raises(Gone, match="deleted while it was read") as gone:
        checkpoint.reader.read("w", "fp32", 0, NUMEL)
    assert gone.value.exit_code == RETRY
    assert names(run) == {"step-000000001-a1", "RUN.json"}


# ------------------------------------------------------------------ names and runs


@pytest.fixture
def other(tmp_path) -> Path:
    """Another run, with a checkpoint of step 3."""
    run = tmp_path / "other"
    run.mkdir()
    save_step(World(), run, 3, run_id="theirs")
    return run


def test_a_renamed_copy_is_refused_with_both_names_whoever_asks(run):
    copy = Path(shutil.copytree(run / "step-000000001-a1", run / "step-000000099-a99"))
    for ask in (
        lambda: newest(World(), run), lambda: newest(World(), run, 99), lambda: open_checkpoint(run), lambda: open_checkpoint(run, 99),
        lambda: open_checkpoint(copy), lambda: open_checkpoint(copy, 1),
    ):  # fmt: skip
        with pytest.raises(Unjudged, match="called step-000000099-a99, but its manifest is that of step-000000001-a1"):
            ask()
    assert open_checkpoint(run, 2).manifest.step == newest(World(), run, 2).manifest.step == 2  # those asked for by name are not touched by it
    assert names(run) == BOTH | {copy.name}
    assert open_checkpoint(copy.rename(run.parent / "best")).manifest.step == 1  # a name that says nothing


@pytest.mark.parametrize("name", ["step-000000002-a2", "step-000000003-a1", "weights-000000002-a1"])
def test_another_attempt_step_or_kind_in_the_name_is_refused(run, name):
    shutil.copytree(run / "step-000000002-a1", run / name)
    with pytest.raises(Unjudged, match=name):
        open_checkpoint(run / name)
    if name.startswith("step"):
        with pytest.raises(Unjudged, match=name):
            newest(World(), run)
    assert names(run) == BOTH | {name}


@pytest.mark.parametrize("marked", [True, False])
def test_another_runs_checkpoint_in_the_folder_is_refused_with_both_ids(run, other, marked):
    foreign = Path(shutil.copytree(other / "step-000000003-a1", run / "step-000000003-a1"))
    if not marked:
        (run / "RUN.json").unlink()
    before = names(run)
    for ask in (lambda: newest(World(), run), lambda: open_checkpoint(run), lambda: open_checkpoint(foreign)):
        with pytest.raises(Unjudged, match="is of the run theirs, but .* is of the run r") as refused:
            ask()
        assert refused.value.exit_code == NEEDS_A_PERSON
    assert names(run) == before
    shutil.rmtree(foreign)
    assert newest(World(), run).manifest.step == 2


def test_retention_neither_counts_nor_deletes_what_is_renamed_or_anothers(run, other):
    shutil.copytree(run / "step-000000001-a1", run / "step-000000099-a99")
    shutil.copytree(other / "step-000000003-a1", run / "step-000000003-a1")
    save_step(World(), run, 4)
    apply_retention(run, Retention(last=2), protect=[])
    assert names(run) == {"RUN.json", *(f"step-{s:09d}-a{a}" for s, a in ((2, 1), (3, 1), (4, 1), (99, 99)))}


def test_a_run_whose_note_is_torn_is_known_by_its_checkpoints(run):
    (run / "RUN.json").write_text("{")
    assert newest(World(), run).manifest.step == 2
