"""Disks that fill up or fail, memory that is not there, two jobs at once, odd paths, clocks, slow and hanging ranks."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from counts import SEED, TORTURE, done, torture
from lives import LIMIT_S, assert_nothing_lost, committed, exit_note, fault_run, live, start, uninterrupted

from llm.checkpoint import folder
from llm.checkpoint.resume import newest
from llm.cli import MISTAKE, RETRY
from llm.config import load_config
from llm.dist import World

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return uninterrupted(tmp_path_factory.mktemp("whole"), 2, epochs=2, keep_last=99)


# Ten saves: every second one fails, each in another way. A point counts only the saves that come as far.
FAILING = {
    "mid_shard:1:1:ENOSPC": "rank 1: [Errno 28] No space left",
    "on_disk:0:3:bitflip": "rank 0: .*what was read back is not what was written",
    "before_shard:1:5:MemoryError": "rank 1: MemoryError",
    "manifest:0:4:EIO": "rank 0: [Errno 5] Input/output error",
    "before_rename:0:5:EROFS": "rank 0: [Errno 30] Read-only file system",
}
FAILING_TOO = {
    "fsync:1:1:EIO": "rank 1: [Errno 5]",
    "mid_shard:0:3:EDQUOT": "rank 0: [Errno 122] Disk quota exceeded",
    "staging:1:5:MemoryError": "No copy in host memory for an asynchronous save (rank 1: MemoryError)",  # and that save is made at once instead
    "on_disk:1:6:bitflip": "rank 1: .*what was read back",  # the sixth that comes as far as a shard, the seventh save
}


@pytest.mark.parametrize("save", ["async_save=true", "async_save=false"] if TORTURE else ["async_save=true"])
def test_every_second_save_fails_in_another_way_and_training_goes_on_to_the_same_end(tmp_path, whole, save):
    config = fault_run(tmp_path, epochs=2, keep_last=99)
    life = live(config, 2, save, fault=",".join(FAILING))
    assert life.codes == [0, 0], life.output
    assert failed_saves(life.output) == [2, 6, 10, 14, 18]
    done["faults injected"] += len(FAILING) - 1
    assert committed(config) == [4, 8, 12, 16, 19]
    for told in FAILING.values():
        assert all(part in life.output for part in told.split(".*")), (told, life.output)
    assert_nothing_lost(config, whole, 2)


def failed_saves(output: str) -> list[int]:
    return sorted({int(step) for step in re.findall(r"checkpoint of step (\d+) could not be saved", output)})


@torture
def test_more_ways_to_fail(tmp_path, whole):
    config = fault_run(tmp_path, epochs=2, keep_last=99)
    life = live(config, 2, fault=",".join(FAILING_TOO))
    assert life.codes == [0, 0] and failed_saves(life.output) == [2, 6, 14], life.output
    for told in FAILING_TOO.values():
        assert all(part in life.output for part in told.split(".*")), (told, life.output)
    done["faults injected"] += len(FAILING_TOO) - 1
    assert_nothing_lost(config, whole, 2)


@pytest.mark.parametrize("kind", ["EIO", "late"])
def test_a_rank_that_sees_a_checkpoint_late_or_cannot_read_it_agrees_with_the_others(tmp_path, whole, kind):
    if kind == "late" and not TORTURE:
        pytest.skip("in make torture: it takes five seconds")
    config = fault_run(tmp_path, epochs=2, keep_last=99)
    live(config, 2, steps_today=6)
    life = live(config, 2, fault=f"verify:1:1:{kind}")
    assert life.codes == [0, 0], life.output
    assert f"resumes {load_config(config).run_folder}/step-000000006" in life.output  # rank 0 finds it sound, so it is looked at once more
    assert_same_end(config, whole)


def assert_same_end(config: Path, whole) -> None:
    manifest = newest(World(), load_config(config).run_folder).manifest
    assert (manifest.step, manifest.state_hash, manifest.chain) == (whole.step, whole.state, whole.chain)


# ------------------------------------------------------------------ two jobs


def test_of_two_jobs_in_one_run_directory_one_trains_and_the_other_names_it(tmp_path):
    for n in range(20 if TORTURE else 3):
        ranks, root = 1 + n % 2, tmp_path / f"run-{n // 3}"  # each folder is there at first not at all, then with a dead job's lock
        config = root / "little.json" if n % 3 else fault_run(root, epochs=1000)
        jobs = [start(config, ranks, fault="step:all:2:hold", steal_lock=n % 4 == 3) for _ in range(2)]
        winner = first_to_train(jobs, ranks)
        (loser,) = (job for job in jobs if job is not winner)
        life = loser.ended()
        (owner, *_) = winner.reached(*range(ranks))
        assert life.codes == [MISTAKE] * ranks and f"process {owner} on host" in life.output, life.output
        done["pairs of jobs"] += 1
        assert winner.kill()
        winner.ended()


def first_to_train(jobs: list, ranks: int):
    give_up_at = time.monotonic() + LIMIT_S
    while True:
        assert time.monotonic() < give_up_at and not all(job.over() for job in jobs), [job.ended(0).output for job in jobs]
        for job in jobs:
            if job.has_reached(*range(ranks)):
                return job
        time.sleep(0.02)


# ------------------------------------------------------------------ paths and clocks

ODD = {"blanks": "a run with  blanks", "letters": "läuft-走-🙂", "a new line": "new\nline", "quotes": 'it\'s "odd" $HOME;#%s{}'}


@pytest.mark.parametrize("name", ODD if TORTURE else ["a new line"])
def test_a_run_in_a_folder_with_an_odd_name_stops_and_goes_on(tmp_path, name):
    config = fault_run(tmp_path / ODD[name])
    for end in (4, 10):
        life = live(config, 1, **({"steps_today": end} if end == 4 else {}))
        assert life.codes == [0], life.output
        assert committed(config)[-1] == end


@torture
def test_a_run_behind_a_link_goes_on_and_a_name_that_is_too_long_is_a_mistake(tmp_path):
    config = fault_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert live(config, 1, f"checkpoint_dir={tmp_path / 'link'}", steps_today=3).codes == [0]
    assert [e.step for e in folder.entries(tmp_path / "elsewhere" / "little")][-1] == 6
    life = live(config, 1, f"run_name={'x' * 300}")
    assert life.codes == [MISTAKE] and "Traceback" not in life.output, life.output


def test_clocks_and_times_of_files_choose_nothing(tmp_path):
    config = fault_run(tmp_path)
    live(config, 1, steps_today=6)
    run, dice = load_config(config).run_folder, random.Random(SEED)
    for path in run.rglob("*"):
        moment = dice.uniform(0, 4e9)
        os.utime(path, (moment, moment))
    assert newest(World(), run).manifest.step == max(committed(config)) == 6


# ------------------------------------------------------------------ hangs


@pytest.mark.parametrize("where", ["step:1:5", "before_barrier:1:2"] if TORTURE else ["step:1:5"])
def test_a_rank_that_hangs_ends_all_in_time_and_the_next_life_comes_to_the_same_end(tmp_path, whole, where):
    config = fault_run(tmp_path, epochs=2, keep_last=99)
    life = live(config, 2, "hang_timeout_s=3", fault=f"{where}:hang")
    assert set(life.codes) == {RETRY}, life.output
    assert exit_note(config)["kind"] == "retryable" and "hangs" in exit_note(config)["why"]
    assert live(config, 2).codes == [0, 0]
    assert_nothing_lost(config, whole, 2)


@pytest.mark.parametrize("where", ["step:all:4:hold", "save:all:1:hold"] if TORTURE else ["step:all:4:hold"])
def test_when_a_rank_stands_still_the_other_shows_its_stacks_and_leaves_in_time(tmp_path, where):
    config = fault_run(tmp_path)
    group = start(config, 2, "hang_timeout_s=3", fault=where)
    pids = group.reached(0, 1)
    os.kill(pids[1], signal.SIGSTOP)
    group.go()
    group.processes[0].join(40)
    assert group.processes[0].exitcode == RETRY
    group.kill()
    output, note, doing = group.ended().output, exit_note(config), {"step": "step", "save": "saving"}[where.split(":")[0]]
    assert (note["code"], note["kind"], note["rank"]) == (RETRY, "retryable", 0), output
    assert f"rank 0 hangs: {doing}" in note["why"] and f"error: rank 0 hangs: {doing}" in output
    stacks = (load_config(config).log_folder / "rank-0.log").read_text()
    assert "Current thread" in stacks and "train_phase" in stacks and "watchdog.py" in stacks


def test_a_rank_that_dies_makes_the_others_leave_with_the_code_for_a_retry(tmp_path):
    config = fault_run(tmp_path)
    life = live(config, 2, "async_save=false", fault="step:1:4")
    assert life.codes == [RETRY, -signal.SIGKILL], life.output
    note = exit_note(config)
    assert (note["code"], note["kind"], note["rank"], note["step"]) == (RETRY, "retryable", 0, 3) and "lost another rank" in note["why"]
    assert committed(config) == [2]


@torture
def test_a_save_that_outlasts_the_launchers_patience_is_killed_and_nothing_is_lost(tmp_path, whole):
    config = fault_run(tmp_path, epochs=2, keep_last=99)
    group = start(config, 2, fault="mid_shard:1:3:hold")
    (pid,) = group.reached(1)
    for process in group.processes:
        os.kill(process.pid, signal.SIGTERM)
    assert group.kill()  # what torchrun does when its 30 s are over
    group.ended()
    done["kills"] += 1
    assert live(config, 2).codes == [0, 0]
    assert_nothing_lost(config, whole, 2)
