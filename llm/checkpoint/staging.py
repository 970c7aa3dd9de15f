"""Host copies of a rank's slices, so that training may change the originals while a thread writes the copies."""

from typing import TYPE_CHECKING

from llm.checkpoint.slices import Slice
from llm.log import log

if TYPE_CHECKING:
    import torch


class Staging:
    """One buffer, made at the first use and kept from save to save: fresh memory costs as much time as the copy itself.

    It takes 12 bytes of host memory for each parameter that this rank owns (weight and two Adam moments, fp32): 3.6 GB for 300 million on
    one rank, half of that on each of two. Page-locked where the slices are on a GPU, so that the copy runs at the speed of the bus.
    """

    def __init__(self):
        self._buffer: torch.Tensor | None = None
        self._told = False

    def missing_bytes(self, slices: list[Slice]) -> int:
        """How much host memory the next copy takes beyond what is kept."""
        total = sum(s.values.numel() for s in slices)
        return 4 * total if self._buffer is None or self._buffer.numel() < total else 0

    def give_up(self) -> bool:
        """Free the memory, since this save has to be a synchronous one; returns whether it is the first time."""
        self._buffer, first, self._told = None, not self._told, True
        return first

    def copy(self, slices: list[Slice]) -> list[Slice]:
        """The same slices with values of their own; those of the previous call are overwritten. Raises MemoryError or RuntimeError."""
        import torch

        total = sum(s.values.numel() for s in slices)
        on_gpu = any(s.values.is_cuda for s in slices)
        if self._buffer is None or self._buffer.numel() < total:
            self._buffer = None  # before the new one is made
            self._buffer = _host_buffer(total, on_gpu)
        staged, at = [], 0
        for s in slices:
            values = self._buffer[at : at + s.values.numel()]
            values.copy_(s.values.detach(), non_blocking=on_gpu)
            staged.append(Slice(s.name, s.kind, s.start, values))
            at += s.values.numel()
        if on_gpu:
            torch.cuda.synchronize()  # the copies were only queued, and the next step would change what they read
        return staged


def _host_buffer(numel: int, page_locked: bool) -> "torch.Tensor":
    import torch

    buffer = torch.empty(numel, dtype=torch.float32)
    if page_locked:  # not pin_memory=True: that rounds up to a power of two, up to twice the memory
        error = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), 4 * numel, 0)
        if int(error):
            log.warning(f"The buffer for asynchronous saves could not be page-locked (CUDA error {int(error)}): copying to it will be slower.")
    return buffer
