"""Saving in a thread: what is published is what was there when the save began, whatever training does meanwhile."""

from pathlib import Path
from threading import Event

import pytest
import torch
from ranks import run_ranks
from test_save_and_resume import NUMEL, add_tokenizer, manifest_of, names, save_step, state_of

from llm.checkpoint import saver
from llm.checkpoint.host_memory import available_bytes
from llm.checkpoint.manifest import read_manifest
from llm.checkpoint.resume import newest
from llm.checkpoint.saver import Save, SaveFailed
from llm.checkpoint.slices import state_hash, write_slices
from llm.checkpoint.staging import Staging
from llm.dist import World


def begin(world: World, run: Path, step: int, staging: Staging, slices=None) -> Save:
    return Save(world, run, manifest_of(step, world), slices or state_of(step, world), add_tokenizer, staging=staging)


def mutate_while_it_is_written(world: World, run: str) -> list:
    release, slices = Event(), state_of(3, world)
    for s in slices:
        s.values.copy_(torch.randn(s.values.numel()))
    (before,) = world.sum_ints([state_hash(slices)])

    def when_released(*args):
        assert release.wait(30)
        return write_slices(*args)

    saver.write_slices = when_released
    saving = begin(world, Path(run), 3, Staging(), slices)
    saving.start()
    for s in slices:
        s.values.add_(1)
    waited = not saving.written
    release.set()
    return [waited, read_manifest(saving.commit()).state_hash == before]


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_on_during_a_save_does_not_change_what_is_published(tmp_path, ranks):
    run = tmp_path / "run"
    run.mkdir()
    assert run_ranks(mutate_while_it_is_written, ranks, tmp_path, str(run)) == [[True, True]] * ranks
    found = newest(World(), run)
    assert state_hash_of(found) == found.manifest.state_hash  # the files hold what the hash says


def state_hash_of(checkpoint) -> int:
    return state_hash(saver.Slice("w", kind, 0, checkpoint.reader.read("w", kind, 0, NUMEL)) for kind in ("fp32", "exp_avg", "exp_avg_sq"))


def test_a_kept_buffer_is_used_again_and_does_not_leak_the_save_before(tmp_path):
    staging = Staging()
    places = set()
    for step in (1, 2):
        saving = begin(World(), tmp_path, step, staging)
        places.add(saving._slices[0].values.data_ptr())
        saving.start()
        assert torch.equal(newest_after(saving, tmp_path).reader.read_full("w"), torch.full((NUMEL,), float(step)))
    assert len(places) == 1


def newest_after(saving: Save, run: Path):
    saving.commit()
    return newest(World(), run)


def lose_the_writer(world: World, run: str, how: str) -> str:
    save_step(world, Path(run), 1)

    def fail(*args):
        raise {"error": OSError(5, "Input/output error"), "exit": SystemExit()}[how]

    if world.rank == 1:
        saver.write_slices = fail
    saving = begin(world, Path(run), 2, Staging())
    saving.start()
    saving.wait()
    try:
        saving.commit()
    except SaveFailed as error:
        return str(error)
    return "saved"


@pytest.mark.parametrize(("how", "told"), [("error", "rank 1: [Errno 5]"), ("exit", "rank 1: its writer ended without a word")])
def test_a_writer_that_fails_or_dies_on_one_rank_publishes_nothing(tmp_path, how, told):
    run = tmp_path / "run"
    run.mkdir()
    first, second = run_ranks(lose_the_writer, 2, tmp_path, str(run), how)
    assert first == second and told in first
    assert names(run) == {"step-000000001-a1", "RUN.json"}


def save_without_memory(world: World, run: str, how: str) -> list:
    staging = Staging()
    if how == "refused" and world.rank == 1:
        staging.copy = lambda slices: (_ for _ in ()).throw(MemoryError())
    if how == "too little for both":  # each alone would fit
        saver.available_bytes = lambda: 3 * 4 * NUMEL
    if how == "a buffer that is there":
        staging.copy(state_of(1, world))
        saver.available_bytes = lambda: 0
    staged, said = [], []
    saver.log.warning = said.append
    for step in (1, 2):
        saving = begin(world, Path(run), step, staging)
        staged.append(saving.is_staged)
        saving.write()
        saving.commit()
    return [staged, len([words for words in said if "No copy in host memory" in words])]


@pytest.mark.parametrize("how", ["refused", "too little for both", "a buffer that is there"])
def test_without_memory_for_the_copy_on_one_rank_all_save_at_once_and_say_so_once(tmp_path, how):
    run = tmp_path / "run"
    run.mkdir()
    staged = how == "a buffer that is there"
    first, second = run_ranks(save_without_memory, 2, tmp_path, str(run), how)
    assert (first, second) == ([[staged] * 2, 0 if staged else 1], [[staged] * 2, 0])
    assert newest(World(), run).manifest.step == 2


GROUPS = {
    "unlimited": ("max", "5000", "", 8 << 20),
    "limited": ("5000", "1000", "", 4000),
    "full of cache": ("5000", "4900", "anon 1000\nactive_file 1900\ninactive_file 2000", 4000),
    "over its limit": ("5000", "6000", "", 0),
}


@pytest.mark.parametrize(("most", "now", "stat", "left"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("place", ["a", "."])
def test_memory_is_what_the_machine_and_every_control_group_above_leave(tmp_path, most, now, stat, left, place):
    group = tmp_path / "cgroup" / "a" / "b"
    group.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "cgroup").write_text("0::/a/b\n")
    (tmp_path / "meminfo").write_text("MemTotal: 99999 kB\nMemAvailable: 8192 kB\n")
    for name, text in (("memory.max", most), ("memory.current", now), ("memory.stat", stat)):
        (tmp_path / "cgroup" / place / name).write_text(text)
    assert available_bytes(tmp_path, tmp_path / "cgroup") == left


def test_where_nothing_tells_how_much_memory_there_is_a_copy_is_tried(tmp_path):
    assert available_bytes(tmp_path, tmp_path) is None
