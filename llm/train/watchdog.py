"""Notices a hang: a rank that reaches no step boundary in time shows where it is and leaves, so that whoever started it can retry."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from llm.cli import RETRY
from llm.log import terminal

Result = TypeVar("Result")
WIDER = 4  # loading, compiling, validating and saving take as long as they take, so long as they end


def collective_timeout_s(limit_s: float | None) -> float | None:
    """How long collectives are to wait where the watchdog has this limit: longer than it does, for it leaves an exit record."""
    return limit_s and 2 * WIDER * limit_s + 60


class Watchdog:
    """Started at once and watched by a thread of its own until `close`. `limit_s` None: never barks."""

    def __init__(self, limit_s: float | None, rank: int, note: Callable[[str], None]):
        self.limit_s, self.rank, self.note = limit_s, rank, note
        self._doing, self._allowed_s, self._waited_s, self._boundaries = "starting", WIDER * (limit_s or 0), 0.0, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(min(1.0, (limit_s or 0) / 10),), name="watchdog", daemon=True)
        if limit_s:
            self._thread.start()

    def step_boundary(self, step: int) -> None:
        """A step is done and the next one begins. The first one of a sitting compiles."""
        self._boundaries += 1
        self._enter(f"step {step + 1:,}", self.limit_s if self._boundaries > 1 else None)

    def during(self, doing: str, work: Callable[..., Result]) -> Callable[..., Result]:
        """`work` with a wider limit."""

        def wider(*args) -> Result:
            before = self._doing, self._allowed_s
            self._enter(doing, None)
            try:
                return work(*args)
            finally:
                self._enter(*before)

        return wider

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()  # a daemon thread that wakes up while the interpreter is taken down aborts the process

    def _enter(self, doing: str, allowed_s: float | None) -> None:
        self._doing, self._allowed_s, self._waited_s = doing, allowed_s or WIDER * (self.limit_s or 0), 0.0

    def _watch(self, look_every_s: float) -> None:
        looked_at = time.monotonic()
        while not self._closed.wait(look_every_s):
            now = time.monotonic()
            self._waited_s += min(now - looked_at, 2 * look_every_s)  # a whole job that was suspended did not hang all that time
            looked_at = now
            if self._waited_s > self._allowed_s:
                self._bark()

    def _bark(self) -> None:
        why = f"rank {self.rank} hangs: {self._doing} has taken more than {self._allowed_s:g} s (train.hang_timeout_s {self.limit_s:g})"
        print(f"{why}. Where each thread is:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self.note(why)
        told = f"error: {why}. Its log has the stacks. It leaves with code {RETRY}: run the same command again.\n"
        with suppress(OSError, ValueError):
            os.write(terminal().fileno(), told.encode())
        os._exit(RETRY)  # the main thread is stuck, most likely where no exception reaches it
