"""starts.jsonl: one line for each sitting that began, with the machine, the versions, the command and the whole resolved config.

sittings.jsonl has a line for each that ended as it should, so what was killed shows here alone.
"""

import os
import platform
import socket
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llm
from llm.batch_plan import BatchPlan
from llm.config import RunConfig
from llm.dist import World
from llm.train.lines import note

LIBRARIES = ("torch", "deepspeed", "numpy", "tokenizers")


def note_start(cfg: RunConfig, world: World, plan: BatchPlan, step: int) -> dict:
    """Append to the log of starts and return the record. Rank 0 only."""
    record = {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "step": step,
        "command": sys.argv,
        "host": socket.gethostname(),
        "ranks": world.size,
        "batch": str(plan),
        "device": ", ".join(filter(None, (world.device, device_name(world.device)))),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "versions": {"tally": llm.__version__, "python": platform.python_version()} | _versions(),
        "config": cfg.model_dump(mode="json"),
    }
    note(cfg.log_folder / "starts.jsonl", record)
    return record


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: str) -> str:
    """The GPU's name, or the processor's; empty where nothing tells."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")  # Linux has it
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
