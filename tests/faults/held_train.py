"""launch/train.py with a fault in it, for real launchers. FAULT is `phase step rank`; HOLD a folder to meet the test in.

The rank (or all) says that it is in the phase (a file `reached-RANK` with its pid) and waits there until the test makes a file `go`.
Phases: init (engine built, nothing trained), step, eval, save. `crash` raises in that step of the sitting instead.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "launch"))
import train as script

from llm import cli

LIMIT_S = 60


def hold(folder: Path, rank: str) -> None:
    (folder / f".{rank}").write_text(str(os.getpid()))
    (folder / f".{rank}").rename(folder / f"reached-{rank}")  # whole when it is there
    give_up_at = time.monotonic() + LIMIT_S
    while not (folder / "go").exists():
        assert time.monotonic() < give_up_at, "the test never said go"
        time.sleep(0.02)


def crash() -> None:
    raise ValueError("made for the test")


def install(phase: str, step: int, rank: str) -> None:
    from llm.train import loop, run

    mine = os.environ.get("RANK", "0")
    if rank not in (mine, "all"):
        return
    folder, held = Path(os.environ["HOLD"]), []

    def hold_once() -> None:
        if not held:
            held.append(True)
            hold(folder, mine)

    def before(owner, name: str, when=lambda: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if when():
                hold_once()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    steps = iter(range(1, 10**9))
    if phase == "crash":
        before(loop, "step_digest", lambda: next(steps) == step and crash())
    elif phase == "step":
        before(loop, "step_digest", lambda: next(steps) == step)
    elif phase == "init":
        before(run, "_metrics")
    elif phase == "eval":
        before(run, "validate")
    elif phase == "save":
        before(run.Keeper, "save")


def main() -> None:
    if "NOHUP" in os.environ:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does before it becomes the command
    phase, step, rank = os.environ["FAULT"].split()
    install(phase, int(step), rank)
    script.main()


if __name__ == "__main__":
    cli.run(main)
