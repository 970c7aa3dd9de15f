"""Being asked to stop: a signal sets a flag, the loop agrees on it at the next step, a second signal leaves at once."""

import os
import signal

from llm.log import terminal

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """True once a stop signal has come. Handlers stay installed until `restore`."""

    def __init__(self, rank: int):
        self.signal_name: str | None = None
        self._rank = rank
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.signal_name:
            os._exit(128 + number)  # no clean-up: whoever asks twice wants out, and committed checkpoints are safe
        self.signal_name = signal.Signals(number).name
        if self._rank == 0:  # not by the logger: the signal may have come while it was writing
            os.write(terminal().fileno(), f"{self.signal_name}: finishing this step and saving; once more to leave at once.\n".encode())
