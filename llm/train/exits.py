"""How a sitting ended, for whoever starts the next one: exit codes, exit.json, and an end to retrying what never gets anywhere.

0   the sitting is over, or the run is       2  the user's mistake: no retry helps
75  a hang or a lost rank: retry             3  training cannot go on by itself (numbers gone bad, no room to save, no progress)
1   a crash: a retry may help                128 + n  ended by signal n
"""

import faulthandler
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from llm import durable
from llm.cli import MISTAKE, NEEDS_A_PERSON, RETRY
from llm.config import RunConfig
from llm.dist import World, cause_elsewhere, exit_code_of, is_lost_rank
from llm.log import UserError, log

FAILED_IN_A_ROW = 3


class NeedsAPerson(UserError):
    """Training cannot go on from here by itself."""

    exit_code = NEEDS_A_PERSON


class LostRank(UserError):
    """Another rank died or stopped answering."""

    exit_code = RETRY


class ExitNote:
    """Writes <logs>/exit.json when a sitting that has begun ends; of several ranks' reasons the first one stays.

    Counts the sittings of the run in a row that failed by themselves from one step: by an exception, a hang, or a
    crash in native code. Not those that ended for a mistake of the user's, or were killed from outside.
    """

    def __init__(self, cfg: RunConfig, world: World):
        self.path, self.world = cfg.log_folder / "exit.json", world
        self.at = None  # the Progress that moves along
        self._count = cfg.run_folder / "failed_sessions.json"
        self._start_step = 0
        self._crash = cfg.log_folder / f"crash-{world.rank}.txt"
        self._crash_file = None

    def begin(self, at, retry_anyway: bool) -> None:
        """From now on the end is noted. Collective.

        Raises NeedsAPerson when the last sittings all failed where this one would start.
        """
        self.at, self._start_step = at, at.step
        self.world.on_rank_0(lambda: self._begin(retry_anyway))
        with suppress(OSError):  # a disk that takes no logs ends no run
            self._crash_file = open(self._crash, "w")  # noqa: SIM115 - a signal handler writes to it
            faulthandler.enable(self._crash_file)

    def _begin(self, retry_anyway: bool) -> None:
        is_counted = self._last_is_counted()
        self.path.unlink(missing_ok=True)
        crashes = [path for path in self.path.parent.glob("crash-*.txt") if _take_crash(path)]
        if crashes:
            stacks = crashes[0].with_suffix(".last.txt")
            log.warning(f"The last sitting crashed in native code: {stacks} has the stacks.")
        if crashes and not is_counted:
            self._count_failure()
        if retry_anyway:
            self._count.unlink(missing_ok=True)
        failed = self._failed_before()
        if failed >= FAILED_IN_A_ROW:
            raise NeedsAPerson(
                f"The last {failed} sittings started at step {self._start_step:,} as this one would, and all failed by themselves before the "
                f"next checkpoint: see {self.path.parent}. Remove the cause, then give --retry-anyway once."
            )

    def _last_is_counted(self) -> bool:
        """Whether another rank of the last sitting has noted a failure that counts."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))["by_itself"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _count_failure(self) -> None:
        count = {"step": self._start_step, "failed": self._failed_before() + 1}
        durable.write_text(self._count, json.dumps(count) + "\n")

    def _failed_before(self) -> int:
        try:
            noted = json.loads(self._count.read_text(encoding="utf-8"))
            return int(noted["failed"]) if noted["step"] == self._start_step else 0
        except (OSError, ValueError, KeyError, TypeError):  # a hint, not a record
            return 0

    def ended(self, why: str) -> None:
        """The sitting ended as it should."""
        if self.world.rank == 0:
            self._count.unlink(missing_ok=True)
            self._write(why, 0, "done")

    def failed(self, error: Exception) -> UserError | None:
        """Note the error that ends this rank, and let the others know. Returns what to raise in its place, if anything."""
        cause = cause_elsewhere(self.world, error)
        if cause is None and is_lost_rank(error):
            cause = LostRank(
                f"rank {self.world.rank} lost another rank ({' '.join(str(error).split())[:200]}). That one's log says more. "
                f"Run the same command again to go on from the newest checkpoint."
            )
        told = cause or error
        code = exit_code_of(told)
        kind = "permanent" if code in (MISTAKE, NEEDS_A_PERSON) else "retryable"
        self._write(f"{type(told).__name__}: {told}", code, kind, by_itself=code == 1)
        return cause

    def hung(self, why: str) -> None:
        """The watchdog ends this rank."""
        self._write(why, RETRY, "retryable", by_itself=True)

    def close(self) -> None:
        """No crash is waited for any more."""
        if self._crash_file:
            faulthandler.disable()
            self._crash_file.close()
            self._crash.unlink(missing_ok=True)
            self._crash_file = None

    def _write(self, why: str, code: int, kind: str, by_itself: bool = False) -> None:
        """`kind`: done, retryable or permanent. Raises nothing: the end must come either way."""
        if self.at is None:
            return
        record = {
            "why": why, "code": code, "kind": kind, "step": self.at.step, "rank": self.world.rank, "host": socket.gethostname(),
            "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "by_itself": by_itself,
        }  # fmt: skip
        mine = self.path.with_name(f".exit-{self.world.rank}.json")
        try:
            durable.write_text(mine, json.dumps(record) + "\n")
            os.link(
                mine, self.path
            )  # fails when another rank was first: what came first is the cause, the rest its echo
            if by_itself:
                self._count_failure()
        except FileExistsError:
            pass
        except OSError as error:
            log.warning(f"{self.path} could not be written ({error}).")
        finally:
            mine.unlink(missing_ok=True)


def _take_crash(path: Path) -> bool:
    """Whether a rank's last sitting left its stacks there; they are kept beside it until the next ones."""
    if path.name.endswith(".last.txt"):
        return False
    has_stacks = path.stat().st_size > 0
    path.replace(path.with_suffix(".last.txt")) if has_stacks else path.unlink()
    return has_stacks
