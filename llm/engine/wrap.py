"""What is done to a model before an engine holds it: activation checkpointing and compilation."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm.config import EngineConfig
from llm.model.loss import take_loss


def wrap_model(model: nn.Module, cfg: EngineConfig, world_size: int) -> None:
    """Checkpoint a share of the blocks and compile `model`, in place; names of parameters stay."""
    for i in cfg.recomputed_blocks(len(model.blocks)):
        block = model.blocks[i]
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if not cfg.compile:
        return
    model.head.take_loss = torch.compile(take_loss, fullgraph=True, dynamic=False)
    if world_size == 1 and cfg.zero_stage == 0:
        model.hidden = torch.compile(model.hidden, fullgraph=True, dynamic=False)  # nobody waits for gradients: one graph is fastest
        return
    # equal blocks share one compiled artifact, and each block's gradients appear when its own backward ends, so that reducing them
    # overlaps with the rest
    for block in model.blocks:
        # forward and not the module, so that ZeRO-3's hooks on a block stay outside of its graph
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
