"""AdamW with decay on matrices only, and moments that exist before the first step."""

import torch
from torch import nn

from llm.config import TrainConfig


def build_adamw(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over `model`; norms, biases and embeddings (also one that is tied to the head) go without weight decay."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed, plain = [], []
    for p in model.parameters():
        (decayed if p.ndim >= 2 and id(p) not in embeddings else plain).append(p)
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=cfg.lr, betas=cfg.betas, eps=cfg.adam_eps, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def create_moments(optimizer: torch.optim.AdamW, tensors: list[torch.Tensor]) -> None:
    """Give AdamW the state that its first step would create, so that a checkpoint may be saved or loaded before it."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),  # on the device, as fused wants it
            "exp_avg": torch.zeros_like(tensor, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(tensor, requires_grad=False),
        }


def adam_step(optimizer: torch.optim.AdamW) -> int:
    """Updates applied so far; one more where an error has left an update that moved some tensors and not others."""
    return int(torch.stack([state["step"] for state in optimizer.state.values()]).max().item())


def set_adam_step(optimizer: torch.optim.AdamW, step: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(step)
