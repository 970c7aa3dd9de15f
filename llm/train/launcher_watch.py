"""No worker outlives its launcher: torchrun and deepspeed leave theirs behind when they are killed."""

import atexit
import os
import signal
import sys
import threading
from pathlib import Path

LAUNCHER_GONE = signal.SIGUSR2  # not one that people send: what it asks for is never mistaken for their second request
LOOK_EVERY_S = 0.5
_PR_SET_PDEATHSIG = 1


def watch_launcher() -> None:
    """From now on this process gets LAUNCHER_GONE when its launcher dies: before training that ends it, later it saves first.

    Only for workers of a launcher. A lone `python launch/train.py` may well outlive the shell that started it.
    """
    parent = os.getppid()
    runner = _deepspeed_runner(parent)
    _ask_the_kernel()
    if os.getppid() != parent or runner == 1:  # too late to be told
        os.kill(os.getpid(), LAUNCHER_GONE)
        return
    leaving = threading.Event()
    thread = threading.Thread(target=_look, args=(parent, runner, leaving), name="launcher-watch", daemon=True)
    thread.start()

    def end_it() -> None:  # a daemon thread that wakes up while the interpreter is taken down aborts the process
        leaving.set()
        thread.join()

    atexit.register(end_it)


def _ask_the_kernel() -> None:
    """Linux sends the signal itself, at once. What it watches is the thread that started us: torchrun's and deepspeed's main thread."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(LAUNCHER_GONE), 0, 0, 0)  # refused: the thread looks, too


def _look(parent: int, runner: int | None, leaving: threading.Event) -> None:
    while not leaving.wait(LOOK_EVERY_S):
        if os.getppid() != parent or (runner is not None and _parent_of(parent) != runner):
            os.kill(os.getpid(), LAUNCHER_GONE)
            return


def _deepspeed_runner(parent: int) -> int | None:
    """The `deepspeed` command above the process that started us, which does not pass on its own death; 1 when it is gone; else None.

    On several machines that process hangs on an ssh session instead, and there is nobody above it to look at.
    """
    above = _parent_of(parent)
    if above is None or "deepspeed.launcher.launch" not in _command(parent):
        return None
    return above if above == 1 or "deepspeed" in _command(above) else None


def _parent_of(pid: int) -> int | None:
    """Linux only; None elsewhere, or when there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])  # the name before it may hold spaces
    except (OSError, ValueError, IndexError):
        return None


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
