"""A run under a real launcher, of which nothing stays behind; waits on lines and files, never on the clock."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
LIMIT_S = 90


def launcher(name: str) -> list:
    port = str(20_000 + os.getpid() % 9_000)
    return {
        "python": [sys.executable],
        "torchrun": [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", port],
        "torchrun that passes SIGUSR1 on": [
            BIN / "torchrun", "--nproc-per-node", "2", "--master-port", port, "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
        ],
        "deepspeed": [BIN / "deepspeed", "--num_gpus", "2", "--master_port", port],
    }[name]  # fmt: skip


class Launched:
    """`with Launched(...) as run:` starts it; leaving the block kills whatever still runs."""

    def __init__(self, name: str | list, config: Path, *words: str, fault: str | None = None, **env: str):
        """`name` of a launcher, or its words."""
        script = "tests/faults/faulty_train.py" if fault or "FED" in env else "launch/train.py"
        self.hold = config.parent / "hold"
        self.hold.mkdir(exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1",
            "HOLD": str(self.hold),
        } | ({"FAULT": fault} if fault else {}) | env  # fmt: skip
        self.command = [str(w) for w in (*(launcher(name) if isinstance(name, str) else name), script, "--config", config, *words)]
        self.process = subprocess.Popen(
            self.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout), daemon=True)
        self._reader.start()

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_) -> None:
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(LIMIT_S)

    def reached(self, *ranks: int) -> list[int]:
        """The pids of these ranks, once all of them are where they are held."""
        files = [self.hold / f"reached-{rank}" for rank in ranks]
        self.until(lambda: all(f.exists() for f in files), f"ranks {ranks} held")
        return [int(f.read_text()) for f in files]

    def forget(self) -> None:
        """Let the next launch of this run meet the test anew."""
        for path in self.hold.iterdir():
            path.unlink()

    def go(self) -> None:
        (self.hold / "go").touch()

    def until(self, true, what: str, limit_s: float = LIMIT_S) -> None:
        """Wait for `true()`; fails with the output when the run ends or the time is over first."""
        give_up_at = time.monotonic() + limit_s
        while not true():
            assert time.monotonic() < give_up_at, f"{what}: not within {limit_s} s\n{self.output}"
            assert self.process.poll() is None or self.alive() or true(), f"{what}: it ended before\n{self.output}"
            time.sleep(0.02)

    def alive(self) -> list[int]:
        """Every process of this run: the launcher, its workers (torchrun's have sessions of their own), and orphans of a dead launcher."""
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"HOLD={self.hold}\0".encode() in environ.read_bytes():  # empty once it has ended
                    found.append(int(environ.parent.name))
            except OSError:
                continue
        return found

    def ended(self, limit_s: float = LIMIT_S) -> str:
        """The output, once the launcher and every worker have ended."""
        give_up_at = time.monotonic() + limit_s
        while self.process.poll() is None or self.alive():
            assert time.monotonic() < give_up_at, f"still running: {self.alive()}\n{self.output}"
            time.sleep(0.02)
        self._reader.join(5)
        return self.output

    @property
    def output(self) -> str:
        return "".join(self.lines)
