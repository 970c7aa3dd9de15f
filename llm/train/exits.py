"""How a sitting ended, for whoever starts the next one: exit codes, exit.json, and an end to retrying what never gets anywhere.

  0   the sitting is over, or the run is       2  the user's mistake: no retry helps
  75  a hang or a lost rank: retry             3  training cannot go on by itself (numbers gone bad, no room to save, no progress)
  1   a crash: a retry may help                128 + n  ended by signal n
"""

import json
import os
import socket
import time
from pathlib import Path

from llm import durable
from llm.cli import MISTAKE, NEEDS_A_PERSON, RETRY
from llm.dist import World, is_lost_rank
from llm.log import UserError, log

FRUITLESS_SITTINGS = 3


class NeedsAPerson(UserError):
    """Training cannot go on from here by itself."""

    exit_code = NEEDS_A_PERSON


class LostRank(UserError):
    """Another rank died or stopped answering."""

    exit_code = RETRY


class ExitNote:
    """Writes <logs>/exit.json when a sitting that has begun ends; of several ranks' reasons the first one stays."""

    def __init__(self, logs: Path, world: World):
        self.path, self.world = logs / "exit.json", world
        self.at = None  # the Progress that moves along
        self._count = logs / "fruitless.json"

    def begin(self, at, retry_anyway: bool) -> None:
        """From now on the end is noted. Collective. Raises NeedsAPerson when the last sittings all failed where this one would start."""
        self.at = at
        self.world.on_rank_0(lambda: self._begin(at.step, retry_anyway))

    def _begin(self, step: int, retry_anyway: bool) -> None:
        self.path.unlink(missing_ok=True)
        failed = self._failed_from(step)
        if failed >= FRUITLESS_SITTINGS and not retry_anyway:
            raise NeedsAPerson(
                f"The last {failed} sittings started at step {step:,} as this one would, and all failed before the next checkpoint: see "
                f"{self.path.parent}. Remove the cause, then give --retry-anyway once."
            )
        # counted as failed beforehand: a sitting that is killed cannot count itself
        durable.write_text(self._count, json.dumps({"step": step, "failed": 1 if retry_anyway else failed + 1}) + "\n")

    def _failed_from(self, step: int) -> int:
        try:
            noted = json.loads(self._count.read_text(encoding="utf-8"))
            return int(noted["failed"]) if noted["step"] == step else 0
        except (OSError, ValueError, KeyError, TypeError):  # a hint, not a record
            return 0

    def ended(self, why: str) -> None:
        """The sitting ended as it should."""
        if self.world.rank == 0:
            self._count.unlink(missing_ok=True)
            self.write(why, 0, "done")

    def failed(self, error: Exception) -> UserError | None:
        """Note the error that ends this rank; returns what to raise in its place, if anything."""
        lost = None
        if is_lost_rank(error):
            lost = LostRank(
                f"rank {self.world.rank} lost another rank ({' '.join(str(error).split())[:200]}). That one's log says more. "
                f"Run the same command again to go on from the newest checkpoint."
            )
        told = lost or error
        code = getattr(told, "exit_code", 1)
        self.write(f"{type(told).__name__}: {told}", code, "permanent" if code in (MISTAKE, NEEDS_A_PERSON) else "retryable")
        return lost

    def write(self, why: str, code: int, kind: str) -> None:
        """`kind`: done, retryable or permanent. Raises nothing: the end must come either way."""
        if self.at is None:
            return
        record = {
            "why": why, "code": code, "kind": kind, "step": self.at.step, "rank": self.world.rank, "host": socket.gethostname(),
            "pid": os.getpid(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }  # fmt: skip
        mine = self.path.with_name(f".exit-{self.world.rank}.json")
        try:
            durable.write_text(mine, json.dumps(record) + "\n")
            os.link(mine, self.path)  # fails when another rank was first: what came first is the cause, the rest its echo
        except FileExistsError:
            pass
        except OSError as error:
            log.warning(f"{self.path} could not be written ({error}).")
        finally:
            mine.unlink(missing_ok=True)
