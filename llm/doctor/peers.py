"""Ranks to talk to where no launcher has started any: this very command once more for each."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm import dist
from llm.dist import World
from llm.log import UserError

START_S = 60
TIMEOUT_MINUTES = 2


@contextmanager
def started(ranks: int) -> Iterator["Peers"]:
    """Start all but rank 0, which is this process; whatever still runs at the end is killed."""
    try:
        folder = tempfile.mkdtemp(prefix="doctor-")
    except OSError as error:
        raise UserError(f"No place for temporary files ({error.strerror or error}): make room, or set TMPDIR to a folder that has some.") from None
    peers = Peers(Path(folder), ranks)
    try:
        yield peers
    finally:
        peers.end()
        shutil.rmtree(folder, ignore_errors=True)


class Peers:
    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        self._processes = [self._start(rank) for rank in range(1, ranks)]

    def _start(self, rank: int) -> subprocess.Popen:
        words = [sys.executable, *sys.argv, "--peer", f"{rank},{self.ranks},{self.folder}"]
        with open(self.folder / f"out-{rank}", "w") as out:
            return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def join(self) -> World:
        """Meet them. Raises UserError when one does not come."""
        give_up_at = time.monotonic() + START_S
        for rank, process in enumerate(self._processes, start=1):
            while not (self.folder / f"here-{rank}").exists():
                if process.poll() is not None or time.monotonic() > give_up_at:
                    said = (self.folder / f"out-{rank}").read_text(errors="replace").strip()[-300:]
                    raise UserError(f"rank {rank} did not come (exit code {process.poll()}): {said or 'it said nothing'}")
                time.sleep(0.02)
        return join(f"0,{self.ranks},{self.folder}")

    def end(self) -> None:
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def join(place: str) -> World:
    """Meet the others as `rank,ranks,folder` says. Collective."""
    rank, ranks, folder = place.split(",", 2)
    (Path(folder) / f"here-{rank}").touch()
    return dist.start(init_method=f"file://{folder}/meeting", place=(int(rank), int(ranks), int(rank)), timeout_minutes=TIMEOUT_MINUTES)
