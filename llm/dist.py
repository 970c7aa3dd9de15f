"""Who this process is among how many. The only reader of RANK, WORLD_SIZE, SLURM and OMPI variables; decisions travel on a gloo group."""

import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

from llm.log import UserError, log, set_rank, terminal

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and the device it computes on ("cpu", "cuda:0", "mps")."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    group: Any = None  # torch.distributed gloo group; None when alone

    def on(self, device: str) -> "World":
        return replace(self, device=device)

    def sum_ints(self, values: list[int]) -> list[int]:
        """Sum over ranks, element by element, wrapping at 64 bits. Collective."""
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def sum_tensor(self, tensor: Any) -> None:
        """Add up the ranks' tensors in place: by NCCL on a GPU, by gloo on a CPU. Collective."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (anything JSON can hold), in order of rank, on every rank. Collective."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        # JSON and not all_gather_object: that one unpickles what it receives
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([mine.numel()]), group=self.group)
        longest = int(max(n.item() for n in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        received = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(received, padded, group=self.group)
        return [json.loads(t[: n.item()].numpy().tobytes()) for t, n in zip(received, lengths, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Collective."""
        return self.gather(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        """Return once every rank is here. Collective."""
        self.sum_ints([0])

    def together(self, work: Callable[[], Result]) -> Result:
        """Run `work` on every rank; when it raises a UserError on any, all ranks raise that one, told once. Collective."""
        result, mine = None, None
        try:
            result = work()
        except UserError as error:
            mine = error
        failures = self.gather(None if mine is None else [str(mine), mine.exit_code])
        first = next((f for f in failures if f is not None), None)
        if first is None:
            return result
        error = mine if mine is not None else UserError(first[0])
        error.exit_code = first[1]  # whichever rank the launcher looks at
        if self.size > 1:
            if self.rank == 0 and not error.told:
                log.error(first[0])
            terminal().flush()
            self.barrier()  # else a launcher may kill rank 0 for another rank's exit before it has told
            error.told = True
        raise error

    def on_rank_0(self, work: Callable[[], Result]) -> Result:
        """Rank 0's result (anything JSON can hold) on every rank, or its UserError on every rank. Collective."""
        return self.broadcast(self.together(lambda: work() if self.rank == 0 else None))


LAUNCHER_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # STEP: srun's; a batch script has the others too, and is one process
)


def has_launcher() -> bool:
    """Whether torchrun or deepspeed started this process; mpirun and srun end their processes themselves."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()


def is_restarted() -> bool:
    """Whether torchrun or Slurm has started this command before, and now does so again by itself."""
    return any(int(os.environ.get(name) or 0) > 0 for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))


def mpi_ranks() -> int:
    """Processes that an mpirun has started together with this one; 1 without it."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


def read_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) from torchrun, deepspeed, mpirun or srun; (0, 1, 0) when alone."""
    env = os.environ
    for rank, size, local in LAUNCHER_VARIABLES:
        if rank in env and size in env:
            return int(env[rank]), int(env[size]), int(env.get(local, 0))
    return 0, 1, 0


def start(*, init_method: str | None = None, place: tuple[int, int, int] | None = None, timeout_minutes: float = 30) -> World:
    """Join the other processes, if any, and return this one's place. Collective.

    Both backends are prepared, so the device may be chosen after the config is known: CPU tensors travel by gloo, CUDA ones by NCCL.
    """
    rank, size, local_rank = place or read_environment()
    set_rank(rank)
    if size == 1:
        return World()
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if _is_on_one_host():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if init_method is None and "MASTER_ADDR" not in os.environ:
        raise UserError(
            "Several processes, but MASTER_ADDR is not set, so they cannot find each other. Start with torchrun, or export MASTER_ADDR "
            "(the host of rank 0) and MASTER_PORT; with mpirun -x MASTER_ADDR=HOST. See docs/clusters.md."
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    if init_method is None and "GLOO_SOCKET_IFNAME" not in os.environ and (interface := _interface_towards(os.environ["MASTER_ADDR"])):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        use_growing_segments()
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"
    restartable = init_method is None and "TORCHELASTIC_RESTART_COUNT" in os.environ
    meeting = {"store": _store_of_this_start(timeout)} if restartable else {"init_method": init_method}
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, **meeting)
    return World(rank, size, local_rank, group=dist.new_group(backend="gloo", timeout=timeout))


def _is_on_one_host() -> bool:
    """Whether mpirun or srun has started all its processes on this host."""
    env = os.environ
    mpi_here, nodes = env.get("OMPI_COMM_WORLD_LOCAL_SIZE"), env.get("SLURM_STEP_NUM_NODES")
    return mpi_here == env["OMPI_COMM_WORLD_SIZE"] if mpi_here else nodes == "1"


def _interface_towards(host: str) -> str | None:
    """The network interface through which `host` is reached; None when that is this host, or nothing tells.

    Left alone, gloo looks up this host's own name, which many systems call 127.0.1.1, and other hosts are told to connect there.
    """
    if sys.platform != "linux":
        return None
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way, suppress(OSError):
        way.connect((host, 9))  # a datagram socket: chooses a route and sends nothing
        ours = socket.inet_aton(way.getsockname()[0])
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                if fcntl.ioctl(way, get_address, struct.pack("256s", name.encode()))[20:24] == ours and name != "lo":
                    return name
    return None


def _store_of_this_start(timeout: timedelta) -> Any:
    """torchrun's store, a part of it for each restart: with a fixed port it still holds the addresses of ranks that are dead."""
    import torch.distributed as dist

    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(f"start-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def joined() -> Iterator[World]:
    """Join the others for the length of a `with`. After an error that all ranks share they part in order; else the launcher ends them."""
    world = start()
    try:
        yield world
    except UserError as error:
        if error.told:
            stop(world)
        raise
    stop(world)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone or does not answer."""
    import torch.distributed as dist

    words = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused", "remote process exited")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


def stop(world: World) -> None:
    """Leave the others."""
    if world.size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def pick_device(wanted: str, world: World) -> str:
    """The device for this process. `auto`: with several ranks the GPU of the local rank, alone the one chosen by the person or the freest."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and not gpus):
        return "cpu"
    if wanted == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("engine.device is mps, but this torch has no working MPS. Use cpu or auto.")
        return "mps"
    if not gpus:
        raise UserError(f"engine.device is {wanted}, but torch {torch.__version__} sees no GPU. Use --device cpu, or install a CUDA build of torch.")
    use_growing_segments()
    if world.size > 1:
        if world.local_rank >= gpus:
            raise UserError(f"{world.local_rank + 1} or more processes on this machine, but it has {gpus} GPUs. Start one process for each GPU.")
        index = world.local_rank
    elif ":" in wanted:
        index = int(wanted.split(":")[1])
        if index >= gpus:
            raise UserError(f"engine.device is {wanted}, but this machine has {gpus} GPUs, counted from 0.")
    else:
        index = _choose_gpu(gpus) if gpus > 1 else 0
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def use_growing_segments() -> None:
    """Have torch's allocator grow its pieces of GPU memory, not take ever new ones, so that less is lost between them. What a person has set stays.

    To be called before anything is asked of a GPU: torch reads the variable once, then.
    """
    # WSL says that it can, and then fails with the first tensor (pytorch/pytorch#192330)
    works = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if works and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _choose_gpu(gpus: int) -> int:
    """Ask a person at a terminal; else take the GPU with the most free memory."""
    import torch

    free = _free_memory(gpus)
    freest = max(range(gpus), key=lambda i: free[i])
    for i in range(gpus):
        log.info(f"  {i}  {torch.cuda.get_device_name(i)}, {free[i] / 2**30:.0f} GiB free")
    if not (sys.stdin and sys.stdin.isatty() and terminal().isatty()):
        log.info(f"GPU {freest} has the most free memory and is used; --device cuda:N decides otherwise.")
        return freest
    answer = input(f"Which GPU? [{freest}] ").strip()
    if answer and (not answer.isdecimal() or int(answer) >= gpus):
        raise UserError(f"There is no GPU '{answer}'; choose 0 to {gpus - 1}.")
    return int(answer) if answer else freest


def _free_memory(gpus: int) -> list[int]:
    """Free bytes of each GPU, in the order in which torch counts them.

    The driver is asked. CUDA itself would make a context on each GPU, 0.5 GB for as long as this
    process lives, so it is asked only where nvidia-smi does not answer.
    """
    of_driver = _free_memory_by_uuid()
    uuids = [_uuid(gpu) for gpu in range(gpus)]
    return [
        of_driver[uuid] if uuid in of_driver else _free_memory_by_cuda(gpu)
        for gpu, uuid in enumerate(uuids)
    ]


def _free_memory_by_uuid() -> dict[str | None, int]:
    words = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    known = re.findall(r"^(\S+), (\d+)$", said, re.MULTILINE)  # for others it says [N/A]
    return {uuid: int(mib) << 20 for uuid, mib in known}


def _uuid(gpu: int) -> str | None:
    import torch

    try:
        return f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"
    except (RuntimeError, AssertionError, AttributeError):
        return None


def _free_memory_by_cuda(gpu: int) -> int:
    import torch

    try:
        return torch.cuda.mem_get_info(gpu)[0]
    except RuntimeError:  # too full for a context even
        return 0
