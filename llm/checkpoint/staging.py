"""Host copies of a rank's slices, so that training may change the originals while a thread writes the copies."""

from contextlib import suppress
from typing import TYPE_CHECKING

from llm.checkpoint.slices import Slice, state_hash
from llm.log import log

if TYPE_CHECKING:
    import torch

_STILL_LOCKED: list["torch.Tensor"] = []
"""Buffers that could not be unregistered. Kept for ever: the driver goes on copying to their pages,
whatever malloc would put at their addresses next."""


class Staging:
    """One buffer, made at the first use and kept from save to save: fresh memory costs as much time as the copy itself.

    It takes 12 bytes of host memory for each parameter that this rank owns (weight and two Adam moments, fp32): 3.6 GB for 300 million on
    one rank, half of that on each of two. Page-locked where the slices are on a GPU, so that the copy runs at the speed of the bus.
    """

    def __init__(self):
        self._buffer: torch.Tensor | None = None
        self._is_locked = False
        self._may_lock = True
        self._gpu_hash: int | None = None
        self._told = False

    def missing_bytes(self, slices: list[Slice]) -> int:
        """How much host memory the next copy takes beyond what is kept."""
        total = sum(s.values.numel() for s in slices)
        return 4 * total if self._buffer is None or self._buffer.numel() < total else 0

    def give_up(self) -> bool:
        """Free the memory, since this save has to be a synchronous one; returns whether it is the first time."""
        self.close()
        first, self._told = not self._told, True
        return first

    def close(self) -> None:
        """Free the memory. No copy to it may be under way."""
        buffer, was_locked = self._buffer, self._is_locked
        self._buffer, self._is_locked = None, False
        if was_locked and not _unlock(buffer):
            _STILL_LOCKED.append(buffer)

    def copy(self, slices: list[Slice]) -> list[Slice]:
        """The same slices with values of their own; those of the previous call are overwritten. Raises MemoryError or RuntimeError."""
        import torch

        total = sum(s.values.numel() for s in slices)
        on_gpu = any(s.values.is_cuda for s in slices)
        if self._buffer is None or self._buffer.numel() < total:
            self.close()  # before the new one is made
            self._buffer = torch.empty(total, dtype=torch.float32)
            self._is_locked = on_gpu and self._may_lock and _lock(self._buffer, slices[0].values.device)
        staged, at = [], 0
        try:
            for s in slices:
                values = self._buffer[at : at + s.values.numel()]
                values.copy_(s.values.detach(), non_blocking=self._is_locked)
                staged.append(Slice(s.name, s.kind, s.start, values))
                at += s.values.numel()
        finally:
            if on_gpu:
                torch.cuda.synchronize()  # the copies were only queued, and the next step would change what they read
        self._gpu_hash = state_hash(slices) if on_gpu else None
        return staged

    def check(self, copy_hash: int) -> None:
        """Raise RuntimeError when the last copy, whose `state_hash` this is, is not what was on the GPU. The next one is then not page-locked."""
        if self._gpu_hash in (None, copy_hash):
            return
        self._may_lock = False
        self.close()
        raise RuntimeError("the copy in host memory is not what the GPU held; the next save copies without page-locked memory")


def _lock(buffer: "torch.Tensor", device: "torch.device") -> bool:
    """Page-lock it, if CUDA can. Not pin_memory=True: that rounds up to a power of two, up to twice the memory."""
    import torch

    error = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    if not error:
        return True
    log.warning(f"The buffer for asynchronous saves could not be page-locked (CUDA error {error}): copying to it will be slower.")
    with suppress(RuntimeError):
        torch.ones(1, device=device)  # CUDA reports the error once more to the next kernel: to this one
    return False


def _unlock(buffer: "torch.Tensor") -> bool:
    """Whether the driver has forgotten the buffer, so that its memory may be freed."""
    import torch

    error = int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))
    if error:
        log.warning(f"The buffer for asynchronous saves could not be given back (CUDA error {error}): {buffer.nbytes / 1e9:,.2f} GB stay taken.")
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")  # as in _lock
    return not error
