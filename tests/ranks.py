"""Real processes for tests: `run_ranks` starts them, lets them meet over gloo through a file, and brings their results back.

They are forked from a server that has imported torch and DeepSpeed once, which takes seconds, and has done nothing else. What they print goes
where the server's output went when it was started, so tests of what a rank says ask the rank, or read a file.
"""

import json
import os
import traceback
from pathlib import Path

import torch.multiprocessing as multiprocessing

from llm import dist

IMPORTED_ONCE = [
    "llm.train.run", "llm.engine.deepspeed_engine", "llm.generate.load", "deepspeed", "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2", "torch._inductor.compile_fx", "torch.utils.tensorboard", "setuptools", "pytest",
]  # fmt: skip


def fork(target, *args) -> multiprocessing.Process:
    """Start `target(*args)`, a module-level function, in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    process = context.Process(target=_with_environment, args=(target, dict(os.environ), args), daemon=True)
    process.start()
    return process


def _with_environment(target, environment: dict, args: tuple) -> None:
    import torch

    os.environ.clear()  # the server has the environment of its own start
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*args)


def run_ranks(fn, world_size: int, tmp_path: Path, *args, timeout_s: float = 120) -> list:
    """Run `fn(world, *args)` on `world_size` ranks and return their (JSON-able) results by rank. `fn` is a module-level function."""
    codes, meeting = _run(fn, world_size, tmp_path, args, timeout_s)
    errors = [(meeting / f"{rank}.error").read_text() for rank in range(world_size) if (meeting / f"{rank}.error").exists()]
    assert not errors, "\n".join(errors)
    assert all(code == 0 for code in codes), codes
    return [json.loads((meeting / f"{rank}.json").read_text()) for rank in range(world_size)]


def exit_codes(fn, world_size: int, tmp_path: Path, *args, timeout_s: float = 120) -> list[int]:
    """Run `fn(world, *args)` on `world_size` ranks that need not come to an end by themselves; how each ended."""
    return _run(fn, world_size, tmp_path, args, timeout_s)[0]


def _run(fn, world_size: int, tmp_path: Path, args: tuple, timeout_s: float) -> tuple[list[int], Path]:
    meeting = tmp_path / f"meet-{len(list(tmp_path.iterdir()))}"
    meeting.mkdir()
    processes = [fork(_one_rank, fn, rank, world_size, str(meeting), args) for rank in range(world_size)]
    try:
        for process in processes:
            process.join(timeout_s)
        alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
        assert not alive, f"ranks {alive} still ran after {timeout_s} s"
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes], meeting


def _one_rank(fn, rank: int, world_size: int, meeting: str, args: tuple) -> None:
    try:
        world = dist.start(init_method=f"file://{meeting}/rendezvous", place=(rank, world_size, rank), timeout_minutes=1)
        result = fn(world, *args)
        Path(meeting, f"{rank}.json").write_text(json.dumps(result))
        dist.stop(world)
    except BaseException:
        Path(meeting, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # as llm.cli does: gloo's threads may abort the process while the interpreter is taken down
