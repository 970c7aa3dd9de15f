"""Who this process is among how many. The only reader of RANK, WORLD_SIZE, SLURM and OMPI variables; decisions travel on a gloo group."""

import hashlib
import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

from llm.cli import RETRY
from llm.log import UserError, clock, log, set_rank, terminal
from llm.rank_failures import Failures, RankFailed, in_words

Result = TypeVar("Result")
AGREE_WITHIN_S = 5.0  # after a failure: the others may be on their way, or be in a collective that this rank never joins
MEET_WITHIN_S = 1800.0
FIRST_NOTICE_S = 5.0  # of waiting for other ranks; then after twice as long each time
LONGEST_NOTICE_S = 300.0
NEVER_S = 100 * 24 * 3600.0


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and the device it computes on ("cpu", "cuda:0", "mps")."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: str = "cpu"
    group: Any = None  # torch.distributed gloo group; None when alone
    failures: Failures | None = field(default=None, compare=False)
    """What ends another rank, and the way to tell what ends this one; None when alone."""

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
        """Run `work` on every rank; when it raises on any, all ranks raise, told once and with one exit code. Collective.

        `work` itself is best without collectives: ranks in one that another never joins are ended after some seconds.
        """
        result, mine = None, None
        try:
            result = work()
        except BaseException as error:  # some libraries' errors are no Exception
            if self.size == 1 or isinstance(error, _ASKED_TO_END):
                raise
            mine = error
        outcome = None if mine is None else [in_words(self.rank, mine), exit_code_of(mine)]
        failures = self._gathered_outcomes(outcome, mine)
        first = next((f for f in failures if f is not None), None)
        if first is None:
            return result
        is_first = failures.index(first) == self.rank
        keeps_own = is_first or isinstance(mine, UserError) or getattr(mine, "is_shared", False)
        error = mine if keeps_own else RankFailed(*first)
        if mine is not None and error is not mine:
            log.debug("This rank failed, too.", exc_info=mine)
        if isinstance(error, UserError):
            error.exit_code = first[1]  # whichever rank the launcher looks at
        if self.rank == 0 and not getattr(error, "told", False):
            only_there = not is_first and failures.count(None) > 0
            log.error(first[0] + (f" This is so on rank {failures.index(first)}." if only_there else ""))
        terminal().flush()
        self.barrier()  # else a launcher may kill rank 0 for another rank's exit before it has told
        error.told = error.is_shared = True
        raise error

    def _gathered_outcomes(self, outcome: list | None, error: Exception | None) -> list[list | None]:
        """Each rank's outcome. A rank that failed posts it when the others do not come, for they may be elsewhere."""
        if error is None:
            return self.gather(outcome)
        overdue = threading.Timer(AGREE_WITHIN_S, self.failures.post, [error])
        overdue.start()
        try:
            return self.gather(outcome)
        except RuntimeError:  # the others have left for it
            raise error from None
        finally:
            overdue.cancel()

    def refuse_differences(self, what: str, content: str) -> None:
        """Raise UserError on every rank unless `content`, a text or its digest, is the same on all. Collective."""
        of_ranks = self.gather([hashlib.sha256(content.encode()).hexdigest(), socket.gethostname()])
        for rank, (digest, host) in enumerate(of_ranks):
            if digest != of_ranks[0][0]:
                error = UserError(
                    f"{what}: other content on rank {rank} (host {host}) than on rank 0 (host {of_ranks[0][1]}). Give every host the "
                    f"same files."
                )
                self.together(lambda error=error: _raise(error))

    def on_rank_0(self, work: Callable[[], Result]) -> Result:
        """Rank 0's result (anything JSON can hold) on every rank, or its UserError on every rank. Collective."""
        return self.broadcast(self.together(lambda: work() if self.rank == 0 else None))


def _raise(error: Exception) -> None:
    raise error


_ASKED_TO_END = (KeyboardInterrupt, SystemExit, GeneratorExit)


def exit_code_of(error: BaseException) -> int:
    return error.exit_code if isinstance(error, UserError) else 1


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


def start(
    *, init_method: str | None = None, place: tuple[int, int, int] | None = None, timeout_minutes: float = 30
) -> World:
    """Join the other processes, if any, and return this one's place. Collective.

    Both backends are prepared, so the device may be chosen after the config is known: CPU tensors travel by gloo, CUDA ones by NCCL.
    `timeout_minutes`: of collectives, until `set_timeout`.
    """
    rank, size, local_rank = place or read_environment()
    set_rank(rank)
    if size == 1:
        return World()
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local_rank))
    if init_method is None:
        _settle_address()
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        use_growing_segments()
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if has_cuda else "gloo"
    store = _meet(init_method, rank, size, local_rank)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, store=store)
    world = World(rank, size, local_rank, group=dist.new_group(backend="gloo", timeout=timeout))
    start_id = world.broadcast(uuid.uuid4().hex)  # a store may outlive a start, and hold what ended that one
    own_store = store.clone() if init_method is None else store  # a file's has no connection to wait for
    return replace(world, failures=Failures(dist.PrefixStore(start_id, own_store), rank, size))


def _settle_address() -> None:
    """Complete what says where all ranks meet. Raises UserError."""
    env = os.environ
    if _is_on_one_host():
        env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_ADDR" not in env:
        raise UserError(
            "Several processes, but MASTER_ADDR is not set, so they cannot find each other. Start with torchrun, or export MASTER_ADDR "
            "(the host of rank 0) and MASTER_PORT; with mpirun -x MASTER_ADDR=HOST. See docs/clusters.md."
        )
    port = env.setdefault("MASTER_PORT", "29500")
    if not port.isdigit() or not 0 < int(port) < 65_536:
        raise UserError(f"MASTER_PORT is {port!r}: give a port that is free on MASTER_ADDR, a number from 1 to 65535.")
    if "GLOO_SOCKET_IFNAME" not in env and (interface := _interface_towards(env["MASTER_ADDR"])):
        env["GLOO_SOCKET_IFNAME"] = interface


def set_timeout(seconds: float | None) -> None:
    """How long collectives wait, in all groups that this process is in by now; None: as good as for ever.

    A group made later begins with torch's own 10 or 30 minutes. NCCL ends the process when the time is over, past every
    exit record, so this is to be longer than the watchdog waits.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds or NEVER_S), group)


# ---------------------------------------------------------------- meeting


class _Patience:
    """Tells at growing intervals that this rank waits; after MEET_WITHIN_S it raises UserError."""

    def __init__(self, speaks: bool):
        self._speaks, self._began, self._notice_s = speaks, time.monotonic(), FIRST_NOTICE_S

    def wait(self, what: Callable[[], str]) -> None:
        """Wait a moment for `what`, which is asked for only when it is told."""
        waited_s = time.monotonic() - self._began
        if waited_s > MEET_WITHIN_S:
            error = UserError(f"Gave up after {clock(waited_s)}: {what()}. Start all ranks, with one MASTER_ADDR and MASTER_PORT.")
            error.exit_code = RETRY
            raise error
        if waited_s > self._notice_s:
            if self._speaks:
                log.warning(f"{what()}, for {clock(waited_s)} so far")
            self._notice_s += min(max(self._notice_s, FIRST_NOTICE_S), LONGEST_NOTICE_S)
        time.sleep(0.02 if waited_s < 1 else 0.2)


def _meet(init_method: str | None, rank: int, size: int, local_rank: int) -> Any:
    """The store that all ranks share, once all are there. Raises UserError."""
    import torch.distributed as dist

    patience = _Patience(speaks=local_rank == 0)  # one for each host
    if init_method:
        place, (store, _, _) = init_method, next(dist.rendezvous(init_method, rank, size))
    else:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        # with a fixed port torchrun's still holds the addresses of the ranks of an earlier start, which are dead
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", _tcp_store(rank, place, patience))
    store.set(f"here-{rank}", "")
    while not store.check([f"here-{other}" for other in range(size)]):
        patience.wait(lambda: _waiting_for([r for r in range(size) if not store.check([f"here-{r}"])], size, place))
    return store


def _waiting_for(missing: list[int], size: int, place: str) -> str:
    which = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}{', …' * (len(missing) > 8)}"
    return f"waiting for {len(missing)} of {size} ranks at {place} ({which})"


def _tcp_store(rank: int, place: str, patience: _Patience) -> Any:
    """Rank 0's store, or torchrun's. Raises UserError when the port is taken."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=MEET_WITHIN_S)
    if rank == 0 and not is_torchruns:
        try:
            return dist.TCPStore(address, port, is_master=True, timeout=limit, wait_for_workers=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"Port {port} of this host is in use, so no rank can meet rank 0 there: another job has it, or what is left of one. "
                f"End that, or choose another: MASTER_PORT=N, --master-port N of torchrun, --master_port N of deepspeed."
            ) from None
    while problem := _unreachable(address, port):
        patience.wait(lambda problem=problem: f"waiting for {'torchrun' if is_torchruns else 'rank 0'} at {place} ({problem})")
    return dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)


def _unreachable(address: str, port: int) -> str | None:
    """Why nothing answers there; None when something does."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


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


@contextmanager
def joined(**place: Any) -> Iterator[World]:
    """Join the others for the length of a `with`, as `start(**place)` does. What ends one rank ends all, with one exit code.

    After an error that all ranks share they part in order. One of this rank alone is told to the others, which leave with it.
    """
    world = start(**place)
    try:
        yield world
    except Exception as error:
        if getattr(error, "is_shared", False):
            stop(world)
        elif cause := cause_elsewhere(world, error):
            raise cause from error
        elif world.failures and world.failures.wait_until_known() and isinstance(error, UserError):
            error.told = True
        raise
    stop(world)


def cause_elsewhere(world: World, error: Exception) -> RankFailed | None:
    """The failure of another rank that ends this one, if `error` is its echo or came second; else the others get to know of `error`."""
    if world.failures is None or isinstance(error, RankFailed) or getattr(error, "is_shared", False):
        return None
    if is_lost_rank(error) or exit_code_of(error) == RETRY:  # each rank notices for itself
        return world.failures.of_others()
    return world.failures.post(error)


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone or does not answer."""
    import torch.distributed as dist

    words = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused", "remote process exited")
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(w in str(error).lower() for w in words))


def stop(world: World) -> None:
    """Leave the others. Collective."""
    if world.size > 1:
        import torch.distributed as dist

        world.failures.close()
        with suppress(RuntimeError):  # a rank has gone already
            world.barrier()  # the store is rank 0's: from here on nobody looks into it
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
