"""Being asked to stop: a signal sets a flag, the loop agrees on it at the next step, a second signal leaves at once."""

import os
import signal
import time
from contextlib import suppress

from llm.log import terminal
from llm.train.launcher_watch import LAUNCHER_GONE

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SAME_REQUEST_S = 2.0  # Ctrl-C and a closed terminal reach a worker twice: from the terminal and, an instant later, from its launcher


class StopFlag:
    """True once a stop signal has come. Handlers stay installed until `restore`."""

    def __init__(self, rank: int):
        self.signal_name: str | None = None
        self._rank, self._asked_at = rank, 0.0
        numbers = [n for n in (*STOP_SIGNALS, LAUNCHER_GONE) if not _told_to_ignore(n)]
        self._before = {number: signal.signal(number, self._note) for number in numbers}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def restore(self) -> None:
        for number, handler in self._before.items():
            # ranks see the launcher's death one after another; the last must not be killed by it on its way out, with everything saved
            signal.signal(number, signal.SIG_IGN if number == LAUNCHER_GONE else handler)

    def _note(self, number: int, frame) -> None:
        if self.signal_name:
            if number != LAUNCHER_GONE and time.monotonic() - self._asked_at > SAME_REQUEST_S:
                os._exit(128 + number)  # no clean-up: whoever asks twice wants out, and committed checkpoints are safe
            return
        self._asked_at = time.monotonic()
        self.signal_name = "the launcher is gone" if number == LAUNCHER_GONE else signal.Signals(number).name
        if self._rank == 0:  # not by the logger: the signal may have come while it was writing
            with suppress(OSError, ValueError):  # SIGHUP: the terminal itself may be gone
                os.write(terminal().fileno(), f"{self.signal_name}: finishing this step and saving; once more to leave at once.\n".encode())


def _told_to_ignore(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # nohup
