"""`engine.precision: auto`: bf16 where this machine multiplies matrices faster in it, else fp32."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from llm.config import RunConfig
from llm.dist import World
from llm.log import log
from llm.model.products import times_transposed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIN_SPEEDUP = 1.2  # of bf16 over fp32; below it the coarser rounding buys nothing
SECONDS = 0.1  # of timing
FIELD = "engine.precision"


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a large matrix product on one device, of a CPU on one core, by precision.

    0 where it has no such product.
    """

    fp32: float
    bf16: float

    @property
    def fastest(self) -> str:
        """What `auto` means on this device."""
        return "bf16" if self.bf16 >= MIN_SPEEDUP * self.fp32 else "fp32"

    def speedup_without(self, precision: str) -> float:
        """How many times as fast the other precision is."""
        ours, other = getattr(self, precision), getattr(self, _other(precision))
        return other / ours if ours else float("inf")

    def __str__(self) -> str:
        return f"{_giga(self.bf16)} GFLOP/s in bf16, {_giga(self.fp32)} in fp32"


def _other(precision: str) -> str:
    return {"bf16": "fp32", "fp32": "bf16"}[precision]


def _giga(rate: float) -> str:
    return f"{rate / 1e9:,.3g}" if rate < 1e11 else f"{rate / 1e9:,.0f}"


def measure_rates(device: str) -> Rates:
    """Time a large product of each precision, by turns, some 100 ms in all.

    On a CPU with one thread and by CPU time, which other programs do not slow down.
    """
    is_cpu = device.startswith("cpu")
    n, clock = (512, time.thread_time) if is_cpu else (4096, time.perf_counter)
    products = {name: _product(device, dtype, n) for name, dtype in DTYPES.items()}
    seconds = {name: float("inf") for name in products}
    rounds, began_at = 0, time.perf_counter()
    with _one_thread() if is_cpu else nullcontext():
        while rounds < 2 or time.perf_counter() - began_at < SECONDS:  # the first prepares kernels
            for name, product in products.items():
                seconds[name] = min(seconds[name], _seconds_of(product, clock))
            rounds += 1
    return Rates(**{name: 2 * n**3 / s for name, s in seconds.items()})


def _product(device: str, dtype: torch.dtype, n: int) -> Callable[[], float]:
    """A product of n x n matrices by the library that training uses. It waits for the device."""
    generator = torch.Generator().manual_seed(0)  # the run's own goes into its checkpoints
    a, b = (torch.randn(n, n, generator=generator).to(device, dtype) for _ in range(2))
    return lambda: times_transposed(a, b)[0, 0].item()


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _seconds_of(product: Callable[[], float], clock: Callable[[], float]) -> float:
    """Of one call; infinite where this device or this build of torch has no such product."""
    started_at = clock()
    try:
        product()
    except (RuntimeError, TypeError) as error:
        log.debug(f"no product in this precision: {error}")
        return float("inf")
    return clock() - started_at


def _place(device: str) -> str:
    return "CPU, by one core" if device.startswith("cpu") else device


def choose(device: str) -> str:
    """What `auto` means on this device, logged with the reason."""
    rates = measure_rates(device)
    log.info(f"precision: auto is {rates.fastest} on this {_place(device)}, {rates}")
    return rates.fastest


def warn_if_slow(precision: str, device: str, advice: str) -> None:
    """Warn where the other precision is clearly faster on this device, with the factor and `advice`."""
    rates = measure_rates(device)
    factor = rates.speedup_without(precision)
    if factor >= MIN_SPEEDUP:
        told = f"{_other(precision)} is {factor:,.3g} times as fast as {precision}"
        log.warning(f"{told} on this {_place(device)}, {rates}. {advice}")


def resolve_precision(cfg: RunConfig, world: World, saved: str | None = None) -> RunConfig:
    """`cfg` with its precision resolved, the same on every rank. Collective.

    `auto` is what the run's checkpoint has (`saved`), in a new run what rank 0 measures.
    """
    given = cfg.engine.precision
    if given == "auto" and saved is None:
        return cfg.in_precision(world.on_rank_0(lambda: choose(world.device)))
    precision = saved if given == "auto" else given
    if world.rank == 0 and given == "auto":
        change = f"{FIELD}={_other(precision)} --accept-change {FIELD}"
        warn_if_slow(precision, world.device, f"The run keeps {precision}, unless you add {change}.")
    elif world.rank == 0 and precision == "bf16":  # fp32 may be asked for, whatever it costs
        warn_if_slow(precision, world.device, f"{FIELD}=fp32 or auto takes the faster one.")
    return cfg.in_precision(precision)
