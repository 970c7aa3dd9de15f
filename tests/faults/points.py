"""Fault points, put around the program's own functions from outside: FAULT=point[:rank[:nth[:kind]]], several with commas between.

POINTS lie in a save, in the order in which it passes them; init, compile, step, micro_batch, eval and save are phases of a sitting.
What the rank does when it comes to the point for the nth time:

  kill      SIGKILL (the default)        ENOSPC EIO MemoryError    raises that
  hang      never comes back             bitflip                   turns a bit of the file just written (on_disk)
  hold      says so in a file of the folder HOLD (reached-RANK, with its pid) and waits there for the file `go`
  crash     raises a ValueError          late                      goes on after five seconds
  segfault  crashes in native code

Points from before_rename on are passed by rank 0 alone: meant for another rank, they mean that rank 0 kills that one when it gets there.
"""

import ctypes
import errno
import os
import random
import signal
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

POINTS = (
    "before_shard", "mid_shard", "after_shard", "before_barrier", "before_manifest", "before_rename", "after_rename", "before_prune", "mid_prune",
)  # fmt: skip
ON_RANK_0 = POINTS[POINTS.index("before_rename") :]
LIMIT_S = 60
LATE_S = 5


def install(rank: int, hold: Path) -> None:
    """Arm this process, which is `rank`, with what FAULT says. `hold`: a folder that all ranks and the test share."""
    _say(hold, f"pid-{rank}", str(os.getpid()))
    for fault in os.environ["FAULT"].split(","):
        given = fault.split(":")
        point, whom, nth, kind = [*given, *("", "0", "1", "kill")[len(given) :]]
        if rank == 0 if point in ON_RANK_0 else whom in (str(rank), "all"):
            _arm(point, rank if whom == "all" else int(whom), int(nth), kind, hold)


def _arm(point: str, victim: int, nth: int, kind: str, hold: Path) -> None:
    visits = count(1)

    def fire(path: Path | None = None, first: Callable[[], None] | None = None) -> None:
        if next(visits) == nth:
            if first:
                first()
            ACTS[kind](victim, hold, path)

    WRAPS[point](fire)


def _say(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f".{name}").write_text(text)
    (folder / f".{name}").rename(folder / name)  # whole when it is there


# ------------------------------------------------------------------ what is done there


def _kill(victim: int, hold: Path, path: Path | None) -> None:
    os.kill(int((hold / f"pid-{victim}").read_text()), signal.SIGKILL)


def _raise(error: BaseException):
    def act(victim: int, hold: Path, path: Path | None) -> None:
        raise error

    return act


def _hold(victim: int, hold: Path, path: Path | None) -> None:
    _say(hold, f"reached-{victim}", str(os.getpid()))
    give_up_at = time.monotonic() + LIMIT_S
    while not (hold / "go").exists():
        assert time.monotonic() < give_up_at, "the test never said go"
        time.sleep(0.02)


def _hang(victim: int, hold: Path, path: Path | None) -> None:
    while True:
        signal.pause()


def _flip_a_bit(victim: int, hold: Path, path: Path | None) -> None:
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)


ACTS = {
    "kill": _kill,
    "ENOSPC": _raise(OSError(errno.ENOSPC, "No space left on device")),
    "EIO": _raise(OSError(errno.EIO, "Input/output error")),
    "EROFS": _raise(OSError(errno.EROFS, "Read-only file system")),
    "EDQUOT": _raise(OSError(errno.EDQUOT, "Disk quota exceeded")),
    "MemoryError": _raise(MemoryError()),
    "hang": _hang,
    "bitflip": _flip_a_bit,
    "hold": _hold,
    "crash": _raise(ValueError("made for the test")),
    "segfault": lambda *_: ctypes.string_at(0),
    "late": lambda *_: time.sleep(LATE_S),
}


# ------------------------------------------------------------------ where


def _around(owner, name: str, *, before=None, after=None) -> None:
    """`before(args)` and `after(args)` beside what `owner` calls `name`."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if before:
            before(args)
        result = original(*args, **kwargs)
        if after:
            after(args)
        return result

    setattr(owner, name, wrapped)


def _path_of(handle: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{handle}"))


def _is_shard_of_a_save(path: Path) -> bool:
    return path.name.startswith("shard-") and path.parent.name.startswith(".tmp-step-")


def _in_a_shard(fire) -> None:
    """Half of a shard is written, and none of it is safe on the disk."""

    def half(args) -> None:
        path = _path_of(args[0])
        if _is_shard_of_a_save(path):
            fire(path, first=lambda: os.truncate(path, path.stat().st_size // 2))

    _around(os, "fsync", before=half)


def _on_disk(fire) -> None:
    """A shard is written and safe, but not read back yet."""
    _around(os, "fsync", after=lambda args: fire(_path_of(args[0])) if _is_shard_of_a_save(_path_of(args[0])) else None)


def _on_publishing(fire) -> None:
    from llm.checkpoint.saver import Save

    _around(Save, "_outcome", before=lambda args: fire() if args[-1].__name__ == "publish" else None)


def _on_rename(fire, when: str) -> None:
    _around(Path, "rename", **{when: lambda args: fire() if args[0].name.startswith(".tmp-step-") else None})


def _in_pruning(fire) -> None:
    from llm.checkpoint import folder

    def half(args) -> None:
        shards = list(Path(args[0]).glob("shard-*"))
        if Path(args[0]).name.startswith(".trash-step-") and shards:
            fire(first=shards[0].unlink)

    _around(folder.shutil, "rmtree", before=half)


def _in_fsync(fire) -> None:
    _around(os, "fsync", before=lambda args: fire() if "/.tmp-step-" in str(_path_of(args[0])) else None)


def _saver():
    from llm.checkpoint import saver

    return saver


def _resume():
    from llm.checkpoint import resume

    return resume


def _run():
    from llm.train import run

    return run


def _loop():
    from llm.train import loop

    return loop


def _forward(fire) -> None:
    from llm.engine.torch_engine import TorchEngine

    _around(TorchEngine, "_loss", before=lambda _: fire())


def _torch():
    import torch

    return torch


def _torch_engine_file():
    from llm.engine import torch_engine

    return torch_engine


def _torch_engine():
    return _torch_engine_file().TorchEngine


def _first_step(fire) -> None:
    from llm.train import start as starting

    build = starting.build_engine

    def build_and_wrap(*args):
        engine = build(*args)
        _around(engine, "train_step", before=lambda _: fire())
        return engine

    starting.build_engine = build_and_wrap


WRAPS = {
    "before_shard": lambda fire: _around(_saver(), "write_slices", before=lambda _: fire()),
    "mid_shard": _in_a_shard,
    "on_disk": _on_disk,
    "after_shard": lambda fire: _around(_saver(), "write_slices", after=lambda _: fire()),
    "before_barrier": lambda fire: _around(_saver().Save, "commit", before=lambda _: fire()),
    "before_manifest": _on_publishing,
    "before_rename": lambda fire: _on_rename(fire, "before"),
    "after_rename": lambda fire: _on_rename(fire, "after"),
    "before_prune": lambda fire: _around(_run().Keeper, "_after_commit", before=lambda _: fire()),
    "mid_prune": _in_pruning,
    "staging": lambda fire: _around(_saver().Staging, "copy", before=lambda _: fire()),
    "fsync": _in_fsync,
    "manifest": lambda fire: _around(_saver().folder.durable, "write_text", before=lambda args: fire() if args[0].name == "MANIFEST.json" else None),
    "verify": lambda fire: _around(_resume(), "damage", before=lambda _: fire()),
    "init": lambda fire: _around(_run(), "Metrics", before=lambda _: fire()),
    "compile": _first_step,
    "step": lambda fire: _around(_loop(), "step_digest", before=lambda _: fire()),
    "micro_batch": _forward,
    "eval": lambda fire: _around(_run(), "validate", before=lambda _: fire()),
    "save": lambda fire: _around(_run().Keeper, "save", before=lambda _: fire()),
    "stream": lambda fire: _around(_loop().Stream, "step", before=lambda _: fire()),
    "loss": lambda fire: _around(_torch_engine(), "_loss", after=lambda _: fire()),
    "backward": lambda fire: _around(_torch().Tensor, "backward", before=lambda _: fire()),
    "reduction": lambda fire: _around(_torch_engine_file(), "global_sums", before=lambda _: fire()),
    "optimizer": lambda fire: _around(_torch().optim.AdamW, "step", before=lambda _: fire()),
    "group": lambda fire: _around(_torch(), "_foreach_add_", before=lambda _: fire()),  # of parameters, in the optimizer
    "updated": lambda fire: _around(_torch_engine(), "_update", after=lambda _: fire()),
    "evaluate": lambda fire: _around(_torch_engine(), "evaluate", before=lambda _: fire()),
    "metrics": lambda fire: _around(_run().Metrics, "step", before=lambda _: fire()),
    "board": lambda fire: _around(_run().Metrics, "_on_board", before=lambda _: fire()),
    "validated": lambda fire: _around(_run().Metrics, "validation", before=lambda _: fire()),
    "sample": lambda fire: _around(_run(), "autocast", before=lambda _: fire()),
    "manifest_of": lambda fire: _around(_run().Keeper, "_manifest", before=lambda _: fire()),
    "applied": lambda fire: _around(_loop(), "chain", before=lambda _: fire()),
}
