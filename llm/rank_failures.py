"""What ends one rank ends all, with one exit code and one message.

The rank that fails posts why in the store that all ranks share. A collective cannot tell: it waits for a rank that
will never come, or sees a connection close. So each rank looks into the store twice a second, and leaves with the
posted exit code: by itself where it can, from a thread where it is stuck in native code.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from llm.log import UserError, log, terminal

LOOK_EVERY_S = 0.5
LEAVE_WITHIN_S = (
    5.0  # once a failure is known: a rank that is not stuck has closed its files by then
)
_FIRST = "failure"


class RankFailed(UserError):
    """Another rank failed; with its message and its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def in_words(rank: int, error: BaseException) -> str:
    """A mistake of the user's as it stands; of a crash rank and class too, for its traceback is elsewhere."""
    if isinstance(error, UserError):
        return str(error)
    return f"rank {rank} failed: {type(error).__name__}: {str(error).rstrip('.')}. Its log has the traceback."


class Failures:
    """One rank's view of the failures of all. `store`: a connection of its own, which nothing else may wait on."""

    def __init__(self, store: Any, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        self.before_leaving: Callable[[], None] = lambda: None
        """Called when this rank leaves from the watching thread, past its own clean-up."""
        self._found: dict | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="rank failures", daemon=True)
        self._thread.start()

    def post(self, error: BaseException) -> RankFailed | None:
        """Tell the other ranks of an error that ends this one.

        Returns another rank's failure where that was first, to be raised instead.
        """
        with suppress(Exception):  # the store is rank 0's, which may be gone
            if self._store.add("failures", 1) == 1:
                code = error.exit_code if isinstance(error, UserError) else 1
                record = {"rank": self._rank, "message": in_words(self._rank, error), "code": code}
                self._store.set(_FIRST, json.dumps(record))
        return self.of_others(wait_s=1.0)

    def of_others(self, wait_s: float = 0.0) -> RankFailed | None:
        """The first failure, if it is another rank's. Rank 0 is the one to print it."""
        give_up_at = time.monotonic() + wait_s
        while not (found := self._look()) and time.monotonic() < give_up_at:
            time.sleep(0.02)
        if not found or found["rank"] == self._rank:
            return None
        failed = RankFailed(found["message"], found["code"])
        failed.told = self._rank != 0
        return failed

    def wait_until_known(self) -> bool:
        """Wait until every other rank knows this one's failure, for some seconds at most.

        Returns whether rank 0 does, which then prints it.
        """
        others = [f"known-{rank}" for rank in range(self._size) if rank != self._rank]
        with suppress(Exception):
            give_up_at = time.monotonic() + LEAVE_WITHIN_S
            while not (known := self._store.check(others)) and time.monotonic() < give_up_at:
                time.sleep(0.02)
            return self._rank != 0 and (known or self._store.check(["known-0"]))
        return False

    def close(self) -> None:
        """From now on nobody is watched: the ranks part in order, or all know the failure already."""
        self._done.set()
        if self._thread is not threading.current_thread():
            self._thread.join(LOOK_EVERY_S + 1)

    def _look(self) -> dict | None:
        if self._found is None:
            with suppress(Exception):
                if self._store.check([_FIRST]):
                    self._found = json.loads(self._store.get(_FIRST))
                    self._store.set(f"known-{self._rank}", "")
        return self._found

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            if (found := self._look()) and found["rank"] != self._rank:
                break
        if self._done.wait(LEAVE_WITHIN_S) or not self._found:
            return
        log.debug(f"rank {self._rank} is stuck and leaves: {self._found['message']}")
        if self._rank == 0:
            with suppress(OSError, ValueError):
                os.write(terminal().fileno(), f"error: {self._found['message']}\n".encode())
        with suppress(Exception):
            self.before_leaving()
        os._exit(self._found["code"])
