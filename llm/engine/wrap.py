"""What is done to a model before an engine holds it: activation checkpointing and compilation, block by block."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm.config import EngineConfig


def wrap_blocks(model: nn.Module, cfg: EngineConfig) -> None:
    """Checkpoint and compile `model.blocks` in place; names of parameters stay.

    Blocks one by one and not the whole model: equal blocks share one compiled artifact, and each block's gradients appear when its own
    backward ends, so that reducing them overlaps with the rest.
    """
    for block in model.blocks:
        if cfg.activation_checkpointing:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        if cfg.compile:
            # forward and not the module, so that ZeRO-3's hooks on a block stay outside of its graph
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
