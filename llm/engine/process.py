"""What a training process asks of its own runtime: numbers too small to matter are zero, memory is kept, garbage is collected between steps."""

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llm.log import log

COLLECT_EVERY = 200  # steps; what a step leaves behind is small, since all that was there before is frozen
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # <malloc.h>
_TOP_PAD_BYTES = 1 << 28


@contextmanager
def settled(device: str, keep_memory: bool) -> Iterator[None]:
    """For the length of training. Flushing denormals and keeping memory last as long as the process."""
    torch.set_flush_denormal(True)  # before the first parallel op: its threads inherit it
    if device == "cpu" and keep_memory:
        keep_freed_memory()
    gc.collect()
    gc.freeze()
    gc.disable()  # else each rank stops at moments of its own, and all the others wait for it
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect_garbage(step: int) -> None:
    """Call after each step: on all ranks at the same ones."""
    if step % COLLECT_EVERY == 0:
        gc.collect()


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed instead of giving it back to the kernel, which would have to clear it again for the next step.

    The logits of a step with a vocabulary of 32k are hundreds of megabytes. The price is memory: up to half as much again. Returns
    whether this C library can.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1), mallopt(_TOP_PAD, _TOP_PAD_BYTES)]
    if not all(done):
        log.debug(f"mallopt refused a setting: {done}")
    return all(done)
