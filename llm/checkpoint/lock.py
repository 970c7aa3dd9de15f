"""run/LOCK: one job at a time writes in a run's folder; the attempt number in it is the token that fences off a job which lost it."""

import fcntl
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llm import durable
from llm.checkpoint import folder
from llm.log import UserError, log

NAME = "LOCK"


class LockError(UserError):
    """Another job owns the run's folder."""


class LockLost(Exception):
    """The lock is not ours any more: whoever has it may write, this job must not."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from every other: a pid is used again after a while, and every machine has the same ones."""

    host: str
    pid: int
    pid_started: str
    """Clock ticks from boot to its start; empty where there is no /proc."""
    boot_id: str
    attempt: int

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"

    def is_here(self, me: "Owner") -> bool:
        """On the kernel that runs this process, though a container may have been given another name since."""
        return self.boot_id == me.boot_id and bool(me.boot_id or self.host == me.host)

    def lives(self) -> bool:
        """Whether a process with this pid and start runs on this machine."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's, but it lives
        return _start_of(self.pid) == self.pid_started


def _me(attempt: int) -> Owner:
    return Owner(socket.gethostname(), os.getpid(), _start_of(os.getpid()), _read("/proc/sys/kernel/random/boot_id"), attempt)


def _start_of(pid: int) -> str:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a program's name may hold blanks and brackets
    return fields[19] if len(fields) > 19 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


class RunLock:
    """The lock of one run's folder, for one sitting. Only rank 0 ever calls `take`; to the others it is a lock that is never held."""

    def __init__(self, run: Path):
        self.path = run / NAME
        self.owner: Owner | None = None
        self._handle: int | None = None

    def take(self, steal: bool = False) -> int:
        """Own the folder, which must exist; returns the number of this attempt. Again: no change. Raises LockError that names the owner.

        A lock is stale, and taken over, when its process is provably gone: dead or its pid used anew on this machine, or this host booted
        since. `steal` also takes that of another host, of which nothing can be known from here, but never one whose process lives here.
        """
        if self.owner:
            return self.owner.attempt
        try:
            self._take(steal)
        except OSError as error:
            raise LockError(f"{self.path}: cannot be written ({error.strerror}). Change checkpoint.checkpoint_dir or the permissions.") from None
        return self.owner.attempt

    def _take(self, steal: bool) -> None:
        handle, held, before = self._look()
        try:
            if held or before:
                self._judge(before, held, steal)
            attempt = max(folder.next_attempt(self.path.parent), before.attempt + 1 if before else 0)
            if held:  # stolen: a file of its own, for the old one's flock cannot be taken away from its holder
                os.close(handle)
                self.path.unlink(missing_ok=True)
                handle = self._open()
                _flock(handle)
            os.ftruncate(handle, 0)
            self.owner = _me(attempt)
            os.pwrite(handle, (json.dumps(asdict(self.owner)) + "\n").encode(), 0)
            os.fsync(handle)
            durable.fsync_folder(self.path.parent)
        except BaseException:
            self.owner = None
            os.close(handle)
            raise
        self._handle = handle

    def _look(self) -> tuple[int, bool, Owner | None]:
        """An open handle of the file, whether somebody else has its flock, and who it says the owner is."""
        for _ in range(40):
            handle = self._open()
            held, before = not _flock(handle), self._written()
            signed = before is not None and not (before.is_here(_me(0)) and not before.lives())
            if signed if held else os.fstat(handle).st_nlink > 0:
                break
            os.close(handle)  # its new owner is just about to sign it, or its old one has just deleted it: look again
            time.sleep(0.05)
        else:
            handle = self._open()
        return handle, held, before

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def _written(self) -> Owner | None:
        """Who the file says owns the folder; None when it is not there, empty or not readable as an owner."""
        try:
            owner = Owner(**json.loads(self.path.read_bytes()[:4096]))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return owner if isinstance(owner.pid, int) and isinstance(owner.attempt, int) and owner.pid > 0 else None

    def _judge(self, before: Owner | None, held: bool, steal: bool) -> None:
        """Return when the lock may be taken over; else raise LockError."""
        run, me = self.path.parent, _me(0)
        who = str(before) if before else "another process"
        here = before is not None and before.is_here(me)
        if here and before.lives():
            ways = f"Wait for it, stop it with 'kill {before.pid}', or choose another checkpoint.run_name."
            raise LockError(f"{run}: {who} is training this run. {ways}")
        gone = here or (before is not None and before.host == me.host)
        if gone and not held:
            log.warning(f"{self.path}: {who} is gone and left its lock behind; this job takes it over.")
            return
        if steal:
            log.warning(f"--steal-lock: taking the lock of {run} from {who}; if that still runs, its next save fails and it stops.")
            return
        raise LockError(
            f"{run}: {who} has the lock, and whether it still runs cannot be told from here. Look there; if it does not, give --steal-lock. "
            f"A job that was wrongly robbed stops at its next save."
        )

    def check(self) -> None:
        """Raise LockLost unless the file still names this process and attempt."""
        if self._written() != self.owner or self.owner is None:
            now = self._written()
            raise LockLost(f"{self.path}: {f'now belongs to {now}' if now else 'is gone'}, so this job may not write in the run's folder any more")

    def leave(self, aside: Path) -> None:
        """The folder has been renamed to `aside`: give that free. The run's own is to be taken again once it exists anew."""
        here, self.path = self.path, aside / NAME
        self.release()
        self.path = here

    def release(self) -> None:
        """Give the folder free, if it is ours."""
        if self.owner is None:
            return
        if self._written() == self.owner:
            self.path.unlink(missing_ok=True)
        os.close(self._handle)
        self.owner = self._handle = None


def _flock(handle: int) -> bool:
    """Whether the flock is ours, or this file system knows none, so that the file's content must do."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
