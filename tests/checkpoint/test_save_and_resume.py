import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from resealing import forge

from llm.checkpoint import direct, folder
from llm.checkpoint.manifest import NAME, Manifest, Parameter, read_manifest
from llm.checkpoint.resume import newest, open_checkpoint
from llm.checkpoint.saver import SMALL_FILES_BYTES, SaveFailed, save
from llm.checkpoint.slices import KINDS, CheckpointError, Slice
from llm.cli import MISTAKE, NEEDS_A_PERSON
from llm.dist import World
from llm.log import UserError

NUMEL = 1000


def manifest_of(step: int, world: World, attempt: int = 1, **changes) -> Manifest:
    fields = dict(
        run_id="r", attempt=attempt, step=step, tokens_seen=0, parent=None, world_size=world.size, global_rows=4, config={},
        tokenizer_fingerprint="f", ledger={}, chain="", engine={}, versions={}, metrics={}, epoch_end=False,
        params=[Parameter(name="w", shape=[NUMEL])], files=[], state_hash=0,
    )  # fmt: skip
    return Manifest(**(fields | changes))


def state_of(step: int, world: World) -> list[Slice]:
    """Every value says which step it is from."""
    share = -(-NUMEL // world.size)
    return [Slice("w", kind, share * world.rank, torch.full((share,), float(step))) for kind in KINDS]


def add_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer").mkdir()
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")


def save_step(world: World, run: Path, step: int, attempt: int = 1, **changes) -> Path:
    return save(world, run, manifest_of(step, world, attempt, **changes), state_of(step, world), add_tokenizer)


def names(run: Path) -> set[str]:
    return {p.name for p in run.iterdir()}


def save_two_steps(world: World, run: str) -> list[str]:
    return [save_step(world, Path(run), step).name for step in (1, 2)]


def test_a_saved_checkpoint_opens_on_another_number_of_ranks(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert run_ranks(save_two_steps, 2, tmp_path, str(run)) == [["step-000000001-a1", "step-000000002-a1"]] * 2
    found = newest(World(), run)
    assert found.manifest.step == 2 and found.manifest.world_size == 2
    assert torch.equal(found.reader.read_full("w"), torch.full((NUMEL,), 2.0))
    assert names(run) == {"step-000000001-a1", "step-000000002-a1", "RUN.json"}


def save_where_one_rank_cannot_write(world: World, run: str) -> str:
    save_step(world, Path(run), 1)
    if world.rank == 1:

        def full(*args):
            raise OSError(28, "No space left on device")

        direct.os.pwrite = full
    try:
        save_step(world, Path(run), 2)
    except SaveFailed as error:
        return f"{error}. {error.advice}"
    return "saved"


def test_one_rank_that_cannot_write_aborts_the_save_on_all_and_the_older_checkpoint_stays(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first, second = run_ranks(save_where_one_rank_cannot_write, 2, tmp_path, str(run))
    assert first == second and "rank 1" in first and "No space left" in first and "Make room" in first
    assert names(run) == {"step-000000001-a1", "RUN.json"}
    assert newest(World(), run).manifest.step == 1


def save_with_little_room_on_one_rank(world: World, run: str) -> str:
    save_step(world, Path(run), 1)
    if world.rank == 1:
        real = shutil.disk_usage
        shutil.disk_usage = lambda path: real(path)._replace(free=5_000_000)
    try:
        save_step(world, Path(run), 2)
    except SaveFailed as error:
        return str(error)
    return "saved"


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first, second = run_ranks(save_with_little_room_on_one_rank, 2, tmp_path, str(run))
    assert first == second and "5,000,000 bytes) free" in first and f"({2 * SMALL_FILES_BYTES + 3 * 4 * NUMEL:,} bytes)" in first
    assert names(run) == {"step-000000001-a1", "RUN.json"}


class NoOrdinaryError(BaseException):
    """What torch.distributed.checkpoint's CheckpointException is: not an Exception."""


def save_where_one_rank_raises(world: World, run: str, error: str) -> str:
    kinds = {"base": NoOrdinaryError("from a library"), "memory": MemoryError(), "key": KeyError("lost")}

    def broken(checkpoint: Path) -> None:
        raise kinds[error]

    try:
        save(world, Path(run), manifest_of(2, world), state_of(2, world), broken)
    except SaveFailed as failure:
        return str(failure)
    return "saved"


@pytest.mark.parametrize(("error", "told"), {"base": "NoOrdinaryError: from a library", "memory": "MemoryError", "key": "KeyError"}.items())
def test_whatever_a_library_raises_on_one_rank_is_a_failed_save_on_all(tmp_path, error, told):
    run = tmp_path / "run"
    run.mkdir()
    first, second = run_ranks(save_where_one_rank_raises, 2, tmp_path, str(run), error)
    assert first == second and f"rank 0: {told}" in first
    assert names(run) == set()


KILLED_AT = {
    "while writing": "saver.write_slices = lambda *a: die()",
    "after its files": "saver.File.model_validate = lambda *a: die()",
    "just before the rename": "from pathlib import Path; Path.rename = lambda *a: die()",
}


@pytest.mark.parametrize("point", KILLED_AT)
def test_a_process_killed_while_saving_leaves_the_older_checkpoint_in_charge(tmp_path, point):
    run = tmp_path / "run"
    run.mkdir()
    save_step(World(), run, 1)
    program = f"""
        import os, signal, sys
        from pathlib import Path
        sys.path[:0] = {sys.path!r}
        import test_save_and_resume as t
        from llm.checkpoint import saver
        def die(): os.kill(os.getpid(), signal.SIGKILL)
        {KILLED_AT[point]}
        t.save_step(t.World(), Path({str(run)!r}), 2)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(name.startswith(".tmp-") for name in names(run))
    assert newest(World(), run).manifest.step == 1
    folder.clean(run)
    assert names(run) == {"step-000000001-a1", "RUN.json"}


def flip_one_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << random.Random(offset).randrange(8)
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_refused_by_name(tmp_path):
    good = save_step(World(), tmp_path, 1)
    files = [p for p in good.rglob("*") if p.is_file()]
    rng = random.Random(0)
    for path in files:
        before = path.read_bytes()
        for _ in range(40):
            flip_one_bit(path, rng.randrange(len(before)))
            with pytest.raises(CheckpointError, match=path.name):
                open_checkpoint(good)
            path.write_bytes(before)
    open_checkpoint(good)


@pytest.mark.parametrize("damage", ["cut", "grown", "emptied", "missing"])
def test_a_file_of_the_wrong_size_is_refused_by_name(tmp_path, damage):
    good = save_step(World(), tmp_path, 1)
    for path in [p for p in good.rglob("*") if p.is_file()]:
        before = path.read_bytes()
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes({"cut": before[:-1], "grown": before + b"\0", "emptied": b""}[damage])
        with pytest.raises(CheckpointError, match=path.name if path.name != NAME or damage != "missing" else "no checkpoint"):
            open_checkpoint(good)
        path.write_bytes(before)


def resume_from_two_damaged(world: World, run: str) -> int:
    return newest(world, Path(run)).manifest.step


def test_damaged_checkpoints_go_to_quarantine_and_the_newest_sound_one_is_used(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2, 3):
        save_step(World(), run, step)
    flip_one_bit(next((run / "step-000000003-a1").glob("shard-*")), 5000)
    (run / "step-000000002-a1" / NAME).write_text("{}")
    assert run_ranks(resume_from_two_damaged, 2, tmp_path, str(run)) == [1, 1]
    assert names(run / "quarantine") == {"step-000000002-a1", "step-000000003-a1"}


def test_a_checkpoint_of_another_step_than_the_one_asked_for_is_refused(tmp_path):
    path = save_step(World(), tmp_path, 2)
    assert open_checkpoint(path, 2).manifest.step == 2
    with pytest.raises(CheckpointError, match="is the checkpoint of step 2, not of 1"):
        open_checkpoint(path, 1)


def test_readers_pass_over_a_damaged_checkpoint_without_moving_it(tmp_path, capsys):
    for step in (1, 2):
        save_step(World(), tmp_path, step)
    flip_one_bit(next((tmp_path / "step-000000002-a1").glob("shard-*")), 5000)
    assert open_checkpoint(tmp_path).manifest.step == 1
    assert "step-000000002-a1" in capsys.readouterr().out
    assert names(tmp_path) == {"step-000000001-a1", "step-000000002-a1", "RUN.json"}


def test_with_every_checkpoint_damaged_the_run_refuses_to_start_from_zero(tmp_path):
    assert newest(World(), tmp_path) is None  # a run that never saved may start
    path = save_step(World(), tmp_path, 1)
    flip_one_bit(next(path.glob("shard-*")), 5000)
    for _ in range(2):  # also the second time, when nothing but the quarantine is left
        with pytest.raises(CheckpointError, match="--fresh"):
            newest(World(), tmp_path)


def resume_where_one_rank_cannot_look(world: World, place: str, blind: int) -> list:
    """`blind`: the rank on a host where the shared file system is not mounted, or which was started in another folder."""
    os.chdir("/" if world.rank == blind else place)
    try:
        found = newest(world, Path("run"))
        return [found and found.manifest.step, None]
    except UserError as error:
        return [str(error), error.exit_code]


@pytest.mark.parametrize("blind", [0, 1])
def test_a_host_that_does_not_see_the_folder_stops_all_ranks_and_moves_nothing(tmp_path, blind):
    run = tmp_path / "run"
    run.mkdir()
    for step in (1, 2):
        save_step(World(), run, step)
    before = names(run)
    (first, code), other = run_ranks(resume_where_one_rank_cannot_look, 2, tmp_path, str(tmp_path), blind)
    assert [first, code] == other and code == NEEDS_A_PERSON and "rank 1 s" in first
    assert names(run) == before


def test_a_damaged_checkpoint_that_cannot_be_moved_is_told_to_all_ranks(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    flip_one_bit(next(save_step(World(), run, 1).glob("shard-*")), 5000)
    (run / "quarantine").write_text("in the way")
    (first, code), other = run_ranks(resume_where_one_rank_cannot_look, 2, tmp_path, str(tmp_path), -1)
    assert [first, code] == other and code == MISTAKE and "cannot be moved to quarantine" in first


def test_a_run_killed_before_it_noted_its_first_commit_does_not_start_from_zero_either(tmp_path):
    flip_one_bit(next(save_step(World(), tmp_path, 1).glob("shard-*")), 5000)
    (tmp_path / "RUN.json").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="--fresh"):
            newest(World(), tmp_path)


def test_a_manifest_too_large_to_be_read_back_is_not_committed(tmp_path, monkeypatch):
    save_step(World(), tmp_path, 1)
    monkeypatch.setattr("llm.checkpoint.manifest.MAX_BYTES", 5000)
    with pytest.raises(SaveFailed, match="its manifest would have .* bytes.*join small files"):
        save_step(World(), tmp_path, 2, ledger={"units": ["f" * 64] * 100})
    assert newest(World(), tmp_path).manifest.step == 1 and names(tmp_path) == {"step-000000001-a1", "RUN.json"}


def test_a_return_to_an_older_step_becomes_the_newest_branch(tmp_path):
    for step, attempt in ((1, 1), (9, 1), (2, 2)):
        save_step(World(), tmp_path, step, attempt)
    assert newest(World(), tmp_path).manifest.step == 2
    assert folder.next_attempt(tmp_path) == 3


def test_a_committed_checkpoint_is_never_overwritten(tmp_path):
    path = save_step(World(), tmp_path, 1)
    before = (path / NAME).read_text()
    with pytest.raises(SaveFailed):
        save_step(World(), tmp_path, 1)
    assert (path / NAME).read_text() == before


FORGERIES = {
    "a path that leads out": lambda f: f["files"][0].update(path="../../etc/passwd"),
    "an absolute path": lambda f: f["files"][0].update(path="/etc/passwd"),
    "an unknown format": lambda f: f.update(format="tally-checkpoint/99"),
    "an unknown field": lambda f: f.update(extra=1),
    "text for a number": lambda f: f.update(step="7"),
    "a negative step": lambda f: f.update(step=-1),
    "a missing field": lambda f: f.pop("ledger"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest_is_refused(tmp_path, forgery):
    path = save_step(World(), tmp_path, 1)
    forge(path, FORGERIES[forgery])
    with pytest.raises(CheckpointError, match=NAME):
        read_manifest(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"step": 1, "step": 2}', '{"step": NaN}'])
def test_text_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(CheckpointError, match=NAME):
        read_manifest(tmp_path)


def save_what_one_rank_has_spoilt(world: World, run: str) -> list[str]:
    save_step(world, Path(run), 1)
    told = []
    for kind in range(len(KINDS)):
        slices = state_of(2, world)
        if world.rank == 1:
            slices[kind].values[7] = (float("nan"), float("inf"), -float("inf"))[kind]
        try:
            save(world, Path(run), manifest_of(2, world), slices, add_tokenizer)
        except SaveFailed as failure:
            told.append(f"{failure} {failure.advice}")
    return told


def test_a_state_that_is_not_finite_on_one_rank_is_published_by_none(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first, second = run_ranks(save_what_one_rank_has_spoilt, 2, tmp_path, str(run))
    assert (
        first == second
        and ["rank 1: " in told and f"w/{kind} holds" in told and "Lower train.lr" in told for kind, told in zip(KINDS, first, strict=True)]
        == [True] * 3
    )
    assert names(run) == {"RUN.json", "step-000000001-a1"}
