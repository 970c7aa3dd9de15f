"""Ranks to talk to where no launcher has started any: this very command once more for each."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llm import dist
from llm.dist import World
from llm.log import UserError

START_S = 120
TIMEOUT_MINUTES = 2


@contextmanager
def joined(ranks: int) -> Iterator[World]:
    """This process as rank 0 of so many. The others end with it, or are killed. Raises UserError when one does not come."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="doctor-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(f"No place for temporary files ({error.strerror or error}): make room, or set TMPDIR to a folder that has some.") from None
    with folder, ExitStack() as ends:
        others = []
        for rank in range(1, ranks):
            others.append(_started(rank, ranks, Path(folder.name)))
            ends.callback(_end, others[-1])
        _wait_for(others, Path(folder.name))
        world = join(f"0,{ranks},{folder.name}")
        yield world
        dist.stop(world)


def join(place: str) -> World:
    """Meet the others as `rank,ranks,folder` says. Collective."""
    rank, ranks, folder = place.split(",", 2)
    (Path(folder) / f"here-{rank}").touch()
    return dist.start(init_method=f"file://{folder}/meeting", place=(int(rank), int(ranks), int(rank)), timeout_minutes=TIMEOUT_MINUTES)


def _started(rank: int, ranks: int, folder: Path) -> subprocess.Popen:
    with open(folder / f"out-{rank}", "w") as out:
        words = [sys.executable, *sys.argv, "--peer", f"{rank},{ranks},{folder}"]
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def _wait_for(others: list[subprocess.Popen], folder: Path) -> None:
    give_up_at = time.monotonic() + START_S
    for rank, process in enumerate(others, start=1):
        while not (folder / f"here-{rank}").exists():
            if process.poll() is not None or time.monotonic() > give_up_at:
                said = (folder / f"out-{rank}").read_text(errors="replace").strip()[-300:]
                raise UserError(f"rank {rank} did not come (exit code {process.poll()}): {said or 'it said nothing'}")
            time.sleep(0.02)


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
