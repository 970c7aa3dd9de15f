"""Being asked to stop: a signal sets a flag, the loop agrees on it at the next step, a second signal leaves at once."""

import os
import signal
import socket
import threading
import time
from contextlib import suppress

from llm.log import terminal
from llm.train.launcher_watch import LAUNCHER_GONE

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Ctrl-C and a closed terminal reach a worker twice: from the terminal and, an instant later, its launcher
SAME_REQUEST_S = 2.0


class StopFlag:
    """True once a stop signal has come. Handlers stay installed until `restore`. Created in the main thread.

    A Python handler runs between two bytecodes of the main thread, so never while that waits in a collective. What
    the interpreter's own handler writes to the wakeup descriptor arrives at once: a thread reads it, and leaves at
    the second signal.
    """

    def __init__(self, rank: int):
        self.signal_name: str | None = None
        self._rank, self._asked_at = rank, None
        self._arrivals, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        numbers = [n for n in (*STOP_SIGNALS, LAUNCHER_GONE) if not _told_to_ignore(n)]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        self._thread = threading.Thread(target=self._read, name="stop signals", daemon=True)
        self._thread.start()

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def restore(self) -> None:
        for number, handler in self._before.items():
            # ranks see the launcher's death one after another; the last must not be killed by it on its way out, with everything saved
            signal.signal(number, signal.SIG_IGN if number == LAUNCHER_GONE else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._wakeup.close()
        self._thread.join()
        self._arrivals.close()

    def _note(self, number: int, frame) -> None:
        if self.signal_name is None:
            is_launcher_gone = number == LAUNCHER_GONE
            self.signal_name = (
                "the launcher is gone" if is_launcher_gone else signal.Signals(number).name
            )

    def _read(self) -> None:
        while arrived := self._arrivals.recv(1):  # b"" once the other end is closed
            if arrived[0] in self._before:
                self._count(arrived[0])

    def _count(self, number: int) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self._note(number, None)
            if self._rank == 0:
                text = f"{self.signal_name}: finishing this step and saving; once more to leave at once.\n"
                with suppress(OSError, ValueError):  # SIGHUP: the terminal itself may be gone
                    os.write(terminal().fileno(), text.encode())
        elif number != LAUNCHER_GONE and time.monotonic() - self._asked_at > SAME_REQUEST_S:
            os._exit(
                128 + number
            )  # no clean-up: whoever asks twice wants out, and committed checkpoints are safe


def _told_to_ignore(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # nohup
