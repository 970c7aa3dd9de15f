"""launch/train.py with a fault in it (see points.py), for real launchers. HOLD: a folder shared with the test; FED: one for what was fed."""

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2] / "launch"), str(Path(__file__).parents[1])]

import points  # noqa: E402
import train as script  # noqa: E402

from llm import cli  # noqa: E402


def listen(fed: str) -> None:
    """Note which targets each step was fed."""
    import little_run

    from llm.train import run

    train = run.train

    def noting(cfg, world, *rest):
        little_run.listen(world, Path(fed), cfg.run_folder)
        train(cfg, world, *rest)

    run.train = noting


def main() -> None:
    if "NOHUP" in os.environ:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does before it becomes the command
    if "FAULT" in os.environ:
        points.install(int(os.environ.get("RANK", "0")), Path(os.environ["HOLD"]))
    if "FED" in os.environ:
        listen(os.environ["FED"])
    script.main()


if __name__ == "__main__":
    cli.run(main)
