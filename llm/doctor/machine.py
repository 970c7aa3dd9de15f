"""This machine and what is installed on it: Python, torch, GPUs, kernels, DeepSpeed, a compiler, shared memory, limits."""

import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from llm.config import ModelConfig
from llm.doctor.line import FAIL, OK, WARN, Line, first_words

SHM = Path("/dev/shm")
SHM_BYTES = 128 << 20  # NCCL wants some 10 MB for each pair of GPUs that it cannot join otherwise; Docker gives 64 MB unless told
OPEN_FILES = 4096
COMPARED = 2048  # tokens: at 32,768 attention by definition would hold 69 GB of scores of 32 heads


def python() -> Line:
    old = sys.version_info < (3, 11)
    return Line("python", FAIL if old else OK, f"{platform.python_version()}, {sys.executable}", "Tally needs 3.11 or newer.")


def torch() -> Line:
    import torch

    advice = _outside("torch", torch.__version__.split("+")[0])
    return Line("torch", WARN if advice else OK, f"{torch.__version__}, {torch.get_num_threads()} threads", advice)


def gpu() -> Line:
    """Driver, CUDA and NCCL, or that there are none."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        parts = (f"{len(names)} x {', '.join(sorted(set(names)))}", f"driver {_driver()}", f"CUDA {torch.version.cuda}", f"NCCL {nccl}")
        return Line("gpu", OK, ", ".join(parts))
    if _driver() != "none":
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        advice = "Install the build of torch that fits the driver, or look why nvidia-smi does not list the GPUs."
        return Line("gpu", FAIL, f"driver {_driver()} is there, but torch cannot use a GPU; it is {built}", advice)
    return Line("gpu", OK, "none (driver none, CUDA none, NCCL none): training runs on the CPU")


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module\D*([\d.]+)", path.read_text()) if path.exists() else None
    return found[1] if found else "none"


def precision(device: str, wanted: str) -> Line:
    """What engine.precision computes in here, and how fast this device multiplies in it."""
    from llm.engine.precision import MIN_SPEEDUP, measure_rates

    rates = measure_rates(device)
    chosen = rates.fastest if wanted == "auto" else wanted
    found = f"{chosen}{' (auto)' if wanted == 'auto' else ''}: {rates}"
    factor = rates.speedup_without(chosen)
    advice = f"fp32 is {factor:,.3g} times as fast here: engine.precision=auto takes it in a new run."
    is_slow = chosen == "bf16" and factor >= MIN_SPEEDUP  # fp32 may be asked for, whatever it costs
    return Line("precision", WARN if is_slow else OK, found, advice)


def resolved_precision(wanted: str, device: str) -> str:
    """What `wanted` (auto, bf16, fp32) means on this device."""
    from llm.engine.precision import measure_rates

    return measure_rates(device).fastest if wanted == "auto" else wanted


def attention(device: str, model: ModelConfig, precision: str, is_masked: bool) -> Line:
    """The kernel that a training step takes for rows of this shape, and how far it is from attention by definition."""
    import torch

    from llm.engine.attention_kernel import attention_kernel, training_kernels, varlen_trouble
    from llm.model.attention import ATTENTION, eager_attention

    dtype, limit = (torch.bfloat16, 5e-2) if precision == "bf16" else (torch.float32, 1e-3)
    torch.manual_seed(0)
    heads = (model.n_heads, model.n_kv_heads, model.n_kv_heads)
    tokens = min(model.seq_len, COMPARED)
    q, k, v = (torch.randn(1, n, tokens, model.d_head, device=device, dtype=dtype) for n in heads)
    with training_kernels(model, is_masked):
        no_varlen = varlen_trouble(model, precision, device) if is_masked else ""
        kernel = attention_kernel(model, precision, device, is_masked, no_varlen)
        off = (ATTENTION[model.attention](q, k, v) - eager_attention(q.float(), k.float(), v.float())).abs().max().item()
    found = f"{kernel}, in {precision} at {model.seq_len:,} tokens a row; off by {off:.1e} over {tokens:,}"
    advice = "model.attention=eager does without this kernel; another build of torch may mend it."
    return Line("attention", OK if off < limit else FAIL, found, advice)


def deepspeed() -> Line:
    """Whether it can be imported; what it must do is tried by all ranks together."""
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        return Line("deepspeed", WARN, "not installed", "pip install deepspeed, or train with engine.zero_stage=0.")
    advice = _outside("deepspeed", found)
    return Line("deepspeed", WARN if advice else OK, f"{found}; of its own ops none is needed, so none is compiled", advice)


def compiler(device: Callable[[], str]) -> Line:
    """Have torch.compile make a small function from nothing, and compare what it gives."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    advice = "Install one (apt-get install g++) or name it in CXX. Without it training works, but engine.compile=true does not."
    if path is None:
        return Line("compiler", FAIL, f"there is no C++ compiler {name} on the PATH", advice)
    import torch

    started_at = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # else it would take what an earlier call has made
        try:
            x = torch.arange(1000.0, device=device())
            off = (torch.compile(_small)(x) - _small(x)).abs().max().item()
        except Exception as error:  # torch's own classes, subprocesses, the linker
            return Line("compiler", FAIL, f"{path}: {first_words(str(error))}", advice)
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR") if before is None else os.environ.update(TORCHINDUCTOR_CACHE_DIR=before)
    seconds = time.perf_counter() - started_at
    if off > 1e-3:
        return Line("compiler", FAIL, f"{path}: what torch.compile made is off by {off:.1e}", "Leave engine.compile off with this torch.")
    return Line("compiler", OK, f"{path}, torch.compile made a small function in {seconds:.1f} s")


def _small(x):
    return x.sin() + 1


def shared_memory() -> Line:
    if sys.platform != "linux":
        return Line("shared-memory", OK, "not looked at: this is no Linux")
    if not SHM.is_dir():
        return Line("shared-memory", FAIL, f"there is no {SHM}", "Mount a tmpfs there: NCCL passes data between processes through it.")
    size = os.statvfs(SHM)
    total, free = size.f_blocks * size.f_frsize, size.f_bavail * size.f_frsize
    small = free < SHM_BYTES
    advice = f"NCCL and loaders pass data through it: mount -o remount,size=1G {SHM}, or docker run --shm-size=1g (or --ipc=host)."
    return Line("shared-memory", FAIL if small else OK, f"{SHM} has {free / 1e6:,.0f} MB free of {total / 1e6:,.0f} MB", advice)


def open_files() -> Line:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    status = FAIL if soft < 256 else WARN if soft < OPEN_FILES else OK
    advice = f"ulimit -n {OPEN_FILES}" + (f" (the hard limit is {hard}: LimitNOFILE= or limits.conf)" if hard < OPEN_FILES else "")
    return Line("open-files", status, f"a process may open {soft:,}", f"{advice}: sockets and shards count.")


def _outside(package: str, found: str) -> str:
    """What to do when it is not a version that Tally asks for; empty when it is."""
    from packaging.requirements import Requirement

    try:
        wanted = next(r for r in map(Requirement, requires("tally-llm") or ()) if r.name == package and r.marker is None)
    except (PackageNotFoundError, StopIteration):
        return ""  # run from a checkout that is not installed
    return "" if wanted.specifier.contains(found, prereleases=True) else f"Tally was tested with {wanted}: pip install '{wanted}'."
