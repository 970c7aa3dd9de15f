import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llm.checkpoint import folder
from llm.checkpoint.lock import NAME, LockError, LockLost, Owner, RunLock, _me

HOLDER = """
import sys
from pathlib import Path
from llm.checkpoint.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def leave_lock(run: Path, **changes) -> Owner:
    """A lock as a job that was killed leaves it behind."""
    owner = replace(_me(5), **changes)
    (run / NAME).write_text(json.dumps(asdict(owner)))
    return owner


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_lock_is_refused_to_others_with_the_owner_named_also_when_told_to_steal(tmp_path, holder):
    before = (tmp_path / NAME).read_bytes()
    for steal in (False, True):
        with pytest.raises(LockError, match=rf"process {holder.pid} on host {_me(0).host}.*kill {holder.pid}"):
            RunLock(tmp_path).take(steal)
    assert (tmp_path / NAME).read_bytes() == before


def test_the_lock_of_a_killed_process_is_taken_over_with_a_line_and_a_higher_token(tmp_path, holder, capsys):
    holder.kill()
    holder.wait()
    assert RunLock(tmp_path).take() == 2
    assert f"process {holder.pid}" in capsys.readouterr().out


STALE = {
    "a dead process": lambda: {"pid": dead_pid()},
    "a pid that is used anew": lambda: {"pid_started": "1"},
    "this host before its last boot": lambda: {"boot_id": "another"},
    "this kernel under another name": lambda: {"host": "container-17", "pid": dead_pid()},
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_lock_is_taken_over(tmp_path, capsys, case):
    owner = leave_lock(tmp_path, **STALE[case]())
    lock = RunLock(tmp_path)
    assert lock.take() == owner.attempt + 1
    lock.check()
    assert str(owner) in capsys.readouterr().out


def test_a_process_that_lives_is_believed_even_where_flock_does_not_work(tmp_path):
    leave_lock(tmp_path, pid=os.getppid(), pid_started=Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19])
    with pytest.raises(LockError, match=f"process {os.getppid()}"):
        RunLock(tmp_path).take(steal=True)


def test_another_hosts_lock_is_taken_only_when_told_so(tmp_path, capsys):
    owner = leave_lock(tmp_path, host="elsewhere", boot_id="another")
    with pytest.raises(LockError, match=rf"process {owner.pid} on host elsewhere.*--steal-lock"):
        RunLock(tmp_path).take()
    assert json.loads((tmp_path / NAME).read_text()) == asdict(owner)
    assert RunLock(tmp_path).take(steal=True) == owner.attempt + 1
    assert "--steal-lock" in capsys.readouterr().out


def test_a_lock_that_is_held_but_says_another_host_can_be_stolen_and_its_holder_notices(tmp_path):
    """As over a network file system, where another host's flock is seen here."""
    robbed = RunLock(tmp_path)
    robbed.take()
    robbed.owner = leave_lock(tmp_path, host="elsewhere", boot_id="another")
    robbed.check()
    with pytest.raises(LockError, match="elsewhere"):
        RunLock(tmp_path).take()
    thief = RunLock(tmp_path)
    thief.take(steal=True)
    with pytest.raises(LockLost, match=f"process {os.getpid()}"):
        robbed.check()
    robbed.release()
    thief.check()  # who lost a lock does not delete it from under its new owner


@pytest.mark.parametrize("end", ["deleted", "emptied"])
def test_a_lock_that_is_deleted_or_emptied_is_lost(tmp_path, end):
    lock = RunLock(tmp_path)
    lock.take()
    (tmp_path / NAME).unlink() if end == "deleted" else (tmp_path / NAME).write_text("")
    with pytest.raises(LockLost, match="is gone"):
        lock.check()


def test_a_released_lock_leaves_nothing_and_an_unreadable_one_is_no_owner(tmp_path):
    lock = RunLock(tmp_path)
    assert lock.take() == lock.take() == 1
    lock.release()
    assert not list(tmp_path.iterdir())
    (tmp_path / NAME).write_text("[" * 9999)
    (tmp_path / folder.step_name(3, 7)).mkdir()
    assert lock.take() == 8


RACER = """
import sys
from pathlib import Path
from llm.checkpoint.lock import LockError, RunLock
lock = RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.take(); print("answer: mine", flush=True)
except LockError as error:
    print("answer:", error, flush=True)
sys.stdin.readline()
"""


def test_of_jobs_that_start_at_once_exactly_one_gets_the_lock_and_the_others_name_it(tmp_path):
    for attempt in range(3):
        racers = [
            subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            for _ in range(4)
        ]
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
        answers = [next(line.strip() for line in racer.stdout if line.startswith("answer: ")) for racer in racers]
        (winner,) = [racer for racer, answer in zip(racers, answers, strict=True) if answer == "answer: mine"]
        assert sum(f"process {winner.pid} on" in answer for answer in answers) == 3, (attempt, answers)
        for racer in racers:
            racer.kill()
            racer.wait()
