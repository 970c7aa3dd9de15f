"""launch/train.py on ranks whose hosts have files of their own: each rank works in a folder of its own, and the paths are relative."""

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ranks import fork

LIMIT_S = 60


@dataclass(frozen=True)
class Ended:
    """How the ranks ended; None: one that still ran when the time was over, and was killed."""

    codes: list[int | None]
    outputs: list[str]

    @property
    def output(self) -> str:
        return "".join(self.outputs)


def host(root: Path, rank: int) -> Path:
    return root / f"host-{rank}"


class Ranks:
    """`python launch/train.py` as `words[rank]` says, in the folder of each rank, started by hand with a port of their own."""

    def __init__(self, root: Path, words: list[list], before=None, env: dict | None = None):
        """`before(rank, root)`, a module-level function, prepares the process: it may put a fault into the program."""
        self.root, self.meeting = (
            root,
            env or {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
        )
        self.outputs = [root / f"out-{rank}-{time.monotonic_ns()}" for rank in range(len(words))]
        arguments = [
            (
                r,
                len(words),
                str(root),
                [str(w) for w in words[r]],
                str(self.outputs[r]),
                self.meeting,
                before,
            )
            for r in range(len(words))
        ]
        self.processes = [fork(_script, *each) for each in arguments]

    def ended(self, limit_s: float = LIMIT_S) -> Ended:
        give_up_at = time.monotonic() + limit_s
        for process in self.processes:
            process.join(max(0.0, give_up_at - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return Ended(
            codes,
            [path.read_text(errors="replace") if path.exists() else "" for path in self.outputs],
        )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def _script(
    rank: int, size: int, root: str, words: list[str], output: str, meeting: dict, before
) -> None:
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    if size > 1:
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0"} | meeting)
    os.chdir(host(Path(root), rank))
    sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
    sys.argv = ["train.py", *words]
    import train as script

    from llm import cli

    if before:
        before(rank, Path(root))
    try:
        cli.run(script.main)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.excepthook(*sys.exc_info())
        os._exit(error.code if isinstance(error, SystemExit) else 1)
