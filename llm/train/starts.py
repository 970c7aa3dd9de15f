"""starts.jsonl: one line for each sitting that began, with the machine, the versions, the command and the whole resolved config.

sittings.jsonl has a line for each that ended as it should, so what was killed shows here alone.
"""

import json
import os
import platform
import socket
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import llm
from llm.config import BatchPlan, RunConfig
from llm.dist import World
from llm.log import log

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
        "device": _device_name(world.device),
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "versions": {"tally": llm.__version__, "python": platform.python_version()} | _versions(),
        "config": cfg.model_dump(mode="json"),
    }
    try:
        with open(cfg.log_folder / "starts.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps(record), file=file)
    except OSError as error:  # what training needs is tried elsewhere
        log.warning(f"{cfg.log_folder / 'starts.jsonl'}: cannot be written ({error.strerror}). Training begins all the same.")
    return record


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return f"{device}, {torch.cuda.get_device_name(device)}"
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if device == "cpu" and about.exists() else []
    return next((f"{device}, {line.split(':', 1)[1].strip()}" for line in lines if line.startswith("model name")), device)
