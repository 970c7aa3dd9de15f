"""What devices can do at best, and how they are joined: bytes of memory, bytes a second, FLOP/s."""

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from llm.config import RunConfig
from llm.log import UserError
from llm.model.flops import peak_flops

GIB = 1 << 30
# Of a device's memory: what the driver, NCCL's and cuBLAS's buffers and fragmentation leave to tensors. Assumed, not measured.
USABLE = 0.92
CPUINFO = Path("/proc/cpuinfo")
CPU_FLOPS_PER_CORE = 100e9  # sustained in a training step, not a peak: benchmarks/RESULTS.md has 90 (fp32) to 280 (bf16) G


class PlanError(UserError):
    """What was asked cannot be planned."""


@dataclass(frozen=True)
class Device:
    """One device. Rates are bytes a second, one way."""

    name: str
    flops: float
    """Dense bf16 at best; for a CPU what a training step reaches."""
    memory: int
    hbm: float
    node_link: float
    """To the other devices of its machine."""
    network: float
    """From machine to machine: all network cards of one together."""

    @property
    def usable(self) -> int:
        return int(USABLE * self.memory)

    @property
    def kind(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"


# Memory as nvidia-smi reports it (modal-labs/modal-client#2797; B200: pytorch/ao#4002); hbm and links from NVIDIA's data sheets of A100, H100,
# H200, DGX B200, L40S and Ada; FLOP/s: llm/model/flops.py. Network: the cards of a DGX of that kind (8 of 200 or 400 Gbit/s), for the last two,
# which have no usual machine, one of 100 Gbit/s.
_GPUS = {
    #        name of peak_flops  MiB     hbm      NVLink or PCIe  network
    "a100": ("A100", 81_920, 2.04e12, 300e9, 200e9),
    "a100-40gb": ("A100", 40_960, 1.555e12, 300e9, 200e9),
    "h100": ("H100", 81_559, 3.35e12, 450e9, 400e9),
    "h200": ("H200", 143_771, 4.8e12, 450e9, 400e9),
    "b200": ("B200", 182_630, 7.67e12, 900e9, 400e9),
    "l40s": ("L40S", 46_068, 0.864e12, 32e9, 12.5e9),
    "4090": ("RTX 4090", 24_564, 1.008e12, 16e9, 12.5e9),  # no peer to peer: each byte goes through the host, so half of PCIe
}
NAMES = (*_GPUS, "cpu")


def find_device(name: str) -> Device:
    """The device of this name. Raises PlanError."""
    if name.lower() == "cpu":
        return _cpu()
    if name.lower() not in _GPUS:
        raise PlanError(f"--gpu {name}: not in the table of llm/plan/hardware.py. There are: {', '.join(NAMES)}.")
    label, mib, hbm, link, network = _GPUS[name.lower()]
    return Device(name.lower(), peak_flops(label), mib << 20, hbm, link, network)


def shared_by(device: Device, processes: int) -> Device:
    """A CPU's cores and memory are shared out over its processes; a GPU is one process's own."""
    return device if device.name != "cpu" else replace(device, flops=device.flops / processes, memory=device.memory // processes)


def device_here() -> str:
    """The name of what this machine has: a GPU of the table, else cpu."""
    if not shutil.which("nvidia-smi"):
        return "cpu"
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    words = done.stdout.lower().replace("-", " ").split()
    return next((name for name in sorted(_GPUS, key=len, reverse=True) if set(name.split("-")) <= set(words)), "cpu")


def resolve_precision(cfg: RunConfig, device: Device) -> tuple[RunConfig, str | None]:
    """The config with its precision resolved for this device, and a note where that is an assumption.

    Every GPU of the table is faster in bf16; a CPU where it has instructions for it. Training measures it instead.
    """
    if cfg.engine.precision != "auto":
        return cfg, None
    precision = "bf16" if device.kind == "cuda" or _has_bf16_products() else "fp32"
    note = f"assumed: engine.precision auto is {precision} on {device.name}; training measures it"
    return cfg.in_precision(precision), note


def _has_bf16_products() -> bool:
    """Whether this CPU says that it multiplies in bf16 (Intel's and AMD's names of it)."""
    words = CPUINFO.read_text().split() if CPUINFO.exists() else []
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(words)


def _cpu() -> Device:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", CPU_FLOPS_PER_CORE * (os.cpu_count() or 1), memory, hbm=20e9, node_link=5e9, network=1.25e9)
