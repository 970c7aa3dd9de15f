"""What a benchmark says of the machine and the code it ran on."""

import json
import os
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llm import durable


def machine(packages: list[str]) -> dict:
    """Hardware, system, the versions of these packages (None: missing) and the commit."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(), "load_average": load,
        "python": platform.python_version(), "system": platform.platform(), "commit": _commit(),
        "packages": {name: _version(name) for name in packages},
    }  # fmt: skip


def write_json(report: dict, path: Path | None) -> None:
    """All figures of a run, where they were asked for."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, json.dumps(report, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        words = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def in_rounds(rounds: list[dict[str, float]], name: str, base: str) -> dict[str, float]:
    """Median speed of `name`, and its ratio to that of `base` in the same round: median, smallest, largest."""
    ratios = [r[name] / r[base] for r in rounds]
    return {
        "tokens_per_second": statistics.median(r[name] for r in rounds),
        "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
    }  # fmt: skip
