"""Plain torch: one device, or DDP over several. The reference that every other engine must agree with."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llm.checkpoint.slices import KINDS, Slice
from llm.config import RunConfig
from llm.data.stream import Batch
from llm.dist import World
from llm.engine.optimizer import adam_step, build_adamw, create_moments, set_adam_step, set_lr
from llm.engine.protocol import ForwardClock, Reader, Update, autocast, count_targets, global_sums, model_inputs, named_shapes


class TorchEngine:
    no_varlen = ""

    def __init__(self, cfg: RunConfig, world: World, model: nn.Module):
        self.world, self.clip_norm, self.precision = world, cfg.train.clip_norm, cfg.engine.precision
        self.model = model.to(world.device)
        self.params = named_shapes(model)
        self.optimizer = build_adamw(model, cfg.train)
        create_moments(self.optimizer, list(model.parameters()))
        self.replica = distribute(model, world)
        self.forward_clock = ForwardClock(world.device)

    def train_step(self, micro_batches: list[Batch], n_targets: int, lr: float, accept: Callable[[float], bool]) -> Update:
        assert n_targets > 0
        rank_losses = []
        for batch in micro_batches:
            accumulate_only = self.world.size > 1 and len(rank_losses) < len(micro_batches) - 1
            with self.replica.no_sync() if accumulate_only else nullcontext():
                with self.forward_clock:
                    loss = self._loss(self.replica, batch)
                (loss * (self.world.size / n_targets)).backward()  # DDP averages over ranks; the global mean needs their sum
            rank_losses.append(loss.detach())
        update = self._update(rank_losses, n_targets, lr, accept)
        self.drop_gradients()
        return update

    def drop_gradients(self) -> bool:
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)  # DDP's stay where they are, in its buckets
        return True

    def try_out(self, batch: Batch) -> None:
        torch.autograd.grad(self._loss(self.model, batch), list(self.model.parameters()))  # and not backward, which would have DDP reduce

    def _update(self, rank_losses: list[torch.Tensor], n_targets: int, lr: float, accept: Callable[[float], bool]) -> Update:
        """Move the weights, unless the loss is refused or a gradient is not finite on any rank.

        Gradients should be equal on all ranks by now, but a fault of one rank's memory must not let it decide otherwise than the rest.
        """
        grad_norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        loss_sum, spoilt_ranks = global_sums(rank_losses, self.world, (~grad_norm.isfinite()).float())
        loss = loss_sum / n_targets
        if not accept(loss) or spoilt_ranks:
            return Update(loss, math.nan, applied=False)
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip_norm, grad_norm)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        return Update(loss, grad_norm.item(), applied=True)

    def _loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        with autocast(self.precision, self.world.device):
            return model(**model_inputs(batch, self.world.device, self.no_varlen is None))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self.model.eval()
        loss = self._loss(self.model, batch).item()
        self.model.train()
        return loss, count_targets(batch)

    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters())

    def local_slices(self) -> Iterator[Slice]:
        for name, kind, whole in self._tensors():
            share = -(-whole.numel() // self.world.size)
            start = self.world.rank * share
            yield Slice(name, kind, start, whole[start : start + share])

    def load_slices(self, reader: Reader) -> None:
        for name, kind, whole in self._tensors():
            whole.copy_(reader.read(name, kind, 0, whole.numel()))

    def _tensors(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for name, p in self.model.named_parameters():
            for kind in KINDS:
                tensor = p.detach() if kind == "fp32" else self.optimizer.state[p][kind]
                yield name, kind, tensor.view(-1)

    def state(self) -> dict:
        return {"optimizer_step": adam_step(self.optimizer)}

    def load_state(self, state: dict) -> None:
        set_adam_step(self.optimizer, state["optimizer_step"])


def distribute(model: nn.Module, world: World) -> nn.Module:
    """`model` behind DDP, or itself when there is one rank."""
    if world.size == 1:
        return model
    for p in model.parameters():  # what is there when DDP comes moves into its buckets, so that nothing is accumulated beside them
        p.grad = torch.zeros_like(p)
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.startswith("cuda") else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        # None are unused, but otherwise DDP cuts its buckets anew after the first backward, and with three ranks or more a resumed run
        # would then add up its first step's gradients in another order than the run that never stopped
        find_unused_parameters=True,
    )
