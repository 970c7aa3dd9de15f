"""What is done to a model before an engine holds it: activation checkpointing and compilation."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm.config import EngineConfig


def wrap_model(model: nn.Module, cfg: EngineConfig, world_size: int) -> None:
    """Checkpoint and compile `model` in place; names of parameters stay."""
    if cfg.activation_checkpointing:
        for block in model.blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    if cfg.compile and world_size == 1 and cfg.zero_stage == 0:
        model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False)  # nobody waits for gradients: one graph is fastest
    elif cfg.compile:
        _compile_parts(model)


def _compile_parts(model: nn.Module) -> None:
    """Blocks one by one: equal blocks share one compiled artifact, and each block's gradients appear when its own backward ends, so that
    reducing them overlaps with the rest. The loss holds no weights, so no engine hooks into it.
    """
    for block in model.blocks:
        # forward and not the module, so that ZeRO-3's hooks on a block stay outside of its graph
        block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    model.loss = torch.compile(model.loss, fullgraph=True, dynamic=False)
