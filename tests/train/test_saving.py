"""All or nothing, in a run that trains: damage, full disks, saves beside training, and one writer."""

import json
import os
import signal
import threading

import pytest
from little_run import make_run, message_of, newest_manifest, run_and_kill, sit, sit_alone, sit_with
from ranks import exit_codes, run_ranks

from llm.checkpoint import folder
from llm.checkpoint.manifest import read_manifest
from llm.checkpoint.resume import newest
from llm.config import load_config
from llm.dist import World

STEPS = 10


# ------------------------------------------------------------------ 5 all or nothing


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(tmp_path):
    config = make_run(tmp_path, save_every=4)
    whole = sit_alone(tmp_path, config)
    last = folder.entries(load_config(config).run_folder)[-1].path
    shard = next(last.glob("shard-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    again = sit_alone(tmp_path, config)
    assert again["state"] == whole["state"]  # steps 8 to 10 were taken again
    run = load_config(config).run_folder
    assert [p.name for p in (run / "quarantine").iterdir()] == [last.name]
    assert str(shard) in (run / "logs" / "rank-0.log").read_text()


def let_writers_end() -> None:
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()


BOTH_WAYS = pytest.mark.parametrize("way", ["async_save=true", "async_save=false"])


def fill_rank_1s_disk(world: World, config: str, full_from: int, full_for: int, way: str = "async_save=true") -> str:
    """Rank 1 can write no file above 100 kB while it takes some of its steps."""
    import resource

    from llm.train import loop

    original, calls = loop.step_digest, iter(range(1, 100))

    def limited(batches):
        let_writers_end()
        full = world.rank == 1 and full_from <= next(calls) < full_from + full_for
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return original(batches)

    loop.step_digest = limited
    return message_of(world, config, ["save_every=2", "eval_every=0", way])


@BOTH_WAYS
def test_a_full_disk_on_one_rank_costs_that_checkpoint_alone(tmp_path, way):
    config = make_run(tmp_path)
    assert run_ranks(fill_rank_1s_disk, 2, tmp_path, str(config), 4, 2, way) == ["went on"] * 2
    run = load_config(config).run_folder
    assert [e.step for e in folder.entries(run)] == [2, 6, 8, 10]
    assert not list(run.glob(".tmp-*"))
    told = "ERROR The checkpoint of step 4 could not be saved: rank 1: [Errno 27] File too large"
    assert [told in (run / "logs" / f"rank-{rank}.log").read_text() for rank in (0, 1)] == [True, False], "all know it, one says it"
    assert newest(World(), run).manifest.step == 10


@BOTH_WAYS
def test_three_failed_saves_in_a_row_end_the_run_on_all_ranks(tmp_path, way):
    config = make_run(tmp_path)
    messages = run_ranks(fill_rank_1s_disk, 2, tmp_path, str(config), 4, 99, way)
    assert all(m.startswith("NeedsAPerson") and "3 checkpoints in a row" in m and "rank 1" in m for m in messages)
    run = load_config(config).run_folder
    assert [e.step for e in folder.entries(run)] == [2] and not list(run.glob(".tmp-*"))
    assert newest(World(), run).manifest.step == 2


def test_a_sitting_whose_last_save_failed_does_not_end_well(tmp_path):
    config = make_run(tmp_path)
    messages = run_ranks(fill_rank_1s_disk, 2, tmp_path, str(config), 9, 99)
    assert all(m.startswith("NeedsAPerson") and "9 to 10" in m for m in messages)


# ------------------------------------------------------------------ 5 saving while training goes on


def test_checkpoints_written_in_a_thread_are_bit_for_bit_those_written_at_once(tmp_path):
    saved = {}  # all but the random states, which no one has seeded
    for way in ("true", "false"):
        config = make_run(tmp_path / way, save_every=2)
        run_ranks(sit_with, 2, tmp_path, str(config), [f"async_save={way}"], {})
        manifests = [read_manifest(entry.path) for entry in folder.entries(load_config(config).run_folder)]
        saved[way] = [(m.step, m.state_hash, m.chain, [f for f in m.files if not f.path.startswith("rank-")]) for m in manifests]
    assert [step for step, *_ in saved["true"]] == [2, 4, 6, 8, 10]
    assert saved["true"] == saved["false"]


def hold_rank_1s_writer(world: World, config: str, until_step: int) -> dict:
    """Its files are not written before it has come to a later step, which it never does if the others wait for them."""
    from llm.checkpoint import saver
    from llm.train import loop

    write, digest, released, calls = saver.write_slices, loop.step_digest, threading.Event(), iter(range(1, 100))

    def held(*args):
        assert released.wait(60)
        return write(*args)

    def noting(batches):
        if next(calls) == until_step:
            released.set()
        if world.rank == 0:
            let_writers_end()  # its own files are written at once, so that it alone could commit
        return digest(batches)

    loop.step_digest = noting
    if world.rank == 1:
        saver.write_slices = held
    return sit(world, config, ["save_every=5"])


def test_steps_are_taken_while_a_rank_writes_and_the_commit_waits_for_all(tmp_path):
    config = make_run(tmp_path)
    assert run_ranks(hold_rank_1s_writer, 2, tmp_path, str(config), 8)[0]["step"] == STEPS
    run = load_config(config).run_folder
    assert [e.step for e in folder.entries(run)] == [5, 10]
    log = (run / "logs" / "rank-0.log").read_text()
    assert log.index("step 7/10") < log.index("step-000000005-a1")


def die_while_writing(world: World, config: str) -> None:
    """In the second save."""
    from llm.checkpoint import saver

    write, saves = saver.write_slices, iter(range(1, 100))

    def die(*args):
        result = write(*args)
        if next(saves) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    saver.write_slices = die
    sit(world, config, ["save_every=2", "async_save=true"])


def test_a_kill_during_an_asynchronous_write_leaves_the_older_checkpoint_and_nothing_is_lost(tmp_path):
    whole = sit_alone(tmp_path, make_run(tmp_path / "whole"))
    config = make_run(tmp_path / "killed")
    assert exit_codes(die_while_writing, 1, tmp_path, str(config)) == [-signal.SIGKILL]
    run = load_config(config).run_folder
    assert [e.step for e in folder.entries(run)] == [2] and list(run.glob(".tmp-step-000000004-*"))
    again = sit_alone(tmp_path, config)
    assert (again["state"], again["chain"]) == (whole["state"], whole["chain"]) and not list(run.glob(".tmp-*"))


# ------------------------------------------------------------------ 5 one writer


def lose_the_lock(world: World, config: str, how: str) -> str:
    """In the sixth step the lock is deleted, or is another job's."""
    from llm.train import loop

    original, calls = loop.step_digest, iter(range(1, 100))

    def losing(batches):
        let_writers_end()
        lock = load_config(config).run_folder / "LOCK"
        if next(calls) == 6 and world.rank == 0:
            lock.unlink() if how == "deleted" else lock.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "thief", "attempt": 9}))
        return original(batches)

    loop.step_digest = losing
    return message_of(world, config, ["save_every=4", "eval_every=0"])


@pytest.mark.parametrize(("how", "told"), [("deleted", "LOCK: is gone"), ("stolen", "on host thief")])
def test_a_job_that_lost_its_lock_stops_on_all_ranks_without_publishing(tmp_path, how, told):
    config = make_run(tmp_path)
    messages = run_ranks(lose_the_lock, 2, tmp_path, str(config), how)
    assert all(m.startswith("NeedsAPerson") and told in m for m in messages), messages
    run = load_config(config).run_folder
    assert [e.step for e in folder.entries(run)] == [4] and not list(run.glob(".tmp-*"))
    assert (run / "LOCK").exists() == (how == "stolen")


def test_a_sitting_holds_the_lock_and_gives_it_free(tmp_path):
    config = make_run(tmp_path)
    sit_alone(tmp_path, config, [], steps_today=1)
    assert not (load_config(config).run_folder / "LOCK").exists()
    assert run_and_kill(tmp_path, config, tmp_path / "fed", after=3) == -signal.SIGKILL
    assert (load_config(config).run_folder / "LOCK").exists()
    assert sit_alone(tmp_path, config)["step"] == STEPS
    log = (load_config(config).run_folder / "logs" / "rank-0.log").read_text()
    assert "left its lock behind" in log and newest_manifest(config).attempt == 3
