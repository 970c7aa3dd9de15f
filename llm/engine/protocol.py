"""What the training loop, evaluation and checkpoints may ask of an engine, and the little that every engine shares."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from llm.checkpoint.slices import Slice
from llm.data.stream import Batch
from llm.dist import World
from llm.log import UserError
from llm.model.varlen import document_starts

Params = list[tuple[str, tuple[int, ...]]]


class EngineError(UserError):
    """The engine cannot be had as configured."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did; the same on every rank."""

    loss: float
    """Mean over all counted targets of the step, on all ranks."""
    grad_norm: float
    """Global L2 norm before clipping; nan where nothing was applied."""
    applied: bool


class ForwardClock:
    """Seconds that this rank spends in the blocks run `with` it. On CUDA by events, so that nothing waits for the device."""

    def __init__(self, device: str):
        self._cuda = device.startswith("cuda")
        self._spans = []

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *error) -> None:
        self._spans.append((self._began, self._now()))

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> float:
        """Seconds since the last call. On CUDA only once the device has done the work, as after a `train_step`."""
        spans, self._spans = self._spans, []
        return sum(a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in spans)


class Reader(Protocol):
    def read(self, name: str, kind: str, start: int, numel: int) -> torch.Tensor:
        """Elements [start, start + numel) of a flattened parameter or moment, 1-D fp32."""


class Engine(Protocol):
    params: Params
    """Name and shape of every parameter, in the model's order; tied weights once."""
    forward_clock: ForwardClock
    """Has run in the forward passes of `train_step`. Only under ZeRO-3 does a rank wait for others in them."""
    no_varlen: str | None
    """Why documents are not kept apart by varlen_attn: None where they are, "" where that goes without saying. `build_engine` finds out."""

    def train_step(self, micro_batches: list[Batch], n_targets: int, lr: float, accept: Callable[[float], bool]) -> Update:
        """Make one optimizer step on this rank's micro-batches. Collective.

        `n_targets`: counted targets of the whole step, over all ranks. Before any weight moves, every rank calls `accept` with the same
        loss; when it says no, or a gradient is not finite anywhere, the gradients are dropped and nothing else has changed.
        """

    def try_out(self, batch: Batch) -> None:
        """Take a batch through the model and back, for the memory that it needs; nothing is kept of it. No rank waits for another, but in ZeRO-3."""

    def drop_gradients(self) -> bool:
        """After a `train_step` that raised: forget what it had come to. False if that cannot be, as in DeepSpeed."""

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """This rank's (summed loss, counted targets). Under ZeRO-3 collective: as many calls on every rank."""

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and fp32 value of every parameter, on this rank's device, not to be written to. Collective.

        They are the engine's own, good until the next step; under ZeRO-3 copies.
        """

    def local_slices(self) -> Iterator[Slice]:
        """This rank's own pieces of weights and moments; over all ranks they cover each parameter exactly once."""

    def load_slices(self, reader: Reader) -> None:
        """Replace weights and moments. Collective."""

    def state(self) -> dict:
        """Scalars to save beside the slices."""

    def load_state(self, state: dict) -> None: ...


def named_shapes(model: torch.nn.Module) -> Params:
    """Every parameter's name and shape; call it before ZeRO-3 empties the parameters."""
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def autocast(precision: str, device: str) -> AbstractContextManager:
    """bf16 matmuls over fp32 weights, or nothing. `precision` is resolved (llm/engine/precision.py)."""
    assert precision in ("bf16", "fp32"), precision
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def model_inputs(batch: Batch, device: str, varlen: bool = False) -> dict[str, torch.Tensor]:
    """A batch as the model's keyword arguments, on the device. `varlen`: documents apart by varlen_attn, not by a mask."""
    given = {"tokens_BT": batch.tokens_BT, "targets_BT": batch.targets_BT, "doc_ids_BT": batch.doc_ids_BT}
    if varlen and batch.doc_ids_BT is not None:
        given["doc_starts"] = document_starts(batch.doc_ids_BT)
    # from page-locked memory, or a GPU's host would wait for each copy
    lock = torch.Tensor.pin_memory if torch.device(device).type == "cuda" else lambda tensor: tensor
    return {name: lock(tensor).to(device, non_blocking=True) for name, tensor in given.items() if tensor is not None}


def count_targets(batch: Batch) -> int:
    return int((batch.targets_BT != -100).sum())


def global_sums(rank_losses: list[torch.Tensor], world: World, *others: torch.Tensor) -> list[float]:
    """The sum of summed losses over micro-batches and ranks, then that of each other scalar over ranks, in fp64. Collective.

    Every rank gets the same bits. The one wait for the device in a step.
    """
    of_rank = torch.stack([*rank_losses, *others]).cpu().double()
    totals = torch.cat([of_rank[: len(rank_losses)].sum(dim=0, keepdim=True), of_rank[len(rank_losses) :]])
    if world.size > 1:
        dist.all_reduce(totals, group=world.group)
    return totals.tolist()
