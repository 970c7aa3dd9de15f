"""How much more memory this process may take before the machine, or the container it runs in, kills something."""

import socket
from pathlib import Path


def host_name() -> str:
    """The same for all processes that share this machine's memory."""
    boot = _text(Path("/proc/sys/kernel/random/boot_id"))
    return boot or socket.gethostname()


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What can be had without swapping, the limits of control groups included; None where nothing tells (no Linux)."""
    limits = [_meminfo(proc)]
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            top = cgroups / controllers
            names = ("memory.max", "memory.current") if not controllers else ("memory.limit_in_bytes", "memory.usage_in_bytes")
            group = top / path.lstrip("/")
            limits += [_left_in(place, *names) for place in (group, *group.parents) if place.is_relative_to(top)]
    return min((limit for limit in limits if limit is not None), default=None)


def _meminfo(proc: Path) -> int | None:
    found = [line.split() for line in _text(proc / "meminfo").splitlines() if line.startswith("MemAvailable:")]
    return int(found[0][1]) << 10 if found else None


def _left_in(group: Path, limit: str, used: str) -> int | None:
    """A control group's limit less what it uses; the cache of files is not counted, for the kernel gives it up."""
    most, now = _text(group / limit), _text(group / used)
    if not (most.isdigit() and now.isdigit()):
        return None  # "max", or no such group here
    cache = dict(line.split() for line in _text(group / "memory.stat").splitlines() if len(line.split()) == 2)
    reclaimable = int(cache.get("inactive_file", 0)) + int(cache.get("active_file", 0))
    return max(0, int(most) - int(now) + reclaimable)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
