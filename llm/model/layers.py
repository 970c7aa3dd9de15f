"""The parts of a block other than attention: linear maps, norms, rotary positions, MLPs."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.products import linear


class Linear(nn.Linear):
    """nn.Linear whose memory is left as it comes: llm/model/init.py fills every weight, so filling it here would be done twice."""

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding whose memory is left as it comes, as in Linear."""

    def reset_parameters(self) -> None:
        pass


class RMSNorm(nn.Module):
    """Scales the last axis to unit root mean square; arXiv 1910.07467."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # one dtype for both, or torch falls back from its fused kernel; the mean is taken in fp32 either way
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def make_norm(cfg: ModelConfig) -> nn.Module:
    """The norm in front of attention, MLP and head."""
    if cfg.norm == "rmsnorm":
        return RMSNorm(cfg.d_model, cfg.norm_eps)
    return nn.LayerNorm(cfg.d_model, cfg.norm_eps, bias=cfg.bias)


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) of the first R dimensions, as Hugging Face's Llama pairs them, by its position's angle; R/2 is cos's width.

    In fp32, because angles in bf16 blur far positions. Not with x.roll, which is one kernel fewer: on CPU its compiled form is 1.25x
    slower for the whole block.
    """
    half = cos.shape[-1]
    rest = x_BTHK.shape[-1] - 2 * half
    a, b, *still = x_BTHK.split([half, half] + [rest] * (rest > 0), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, *still), dim=-1).to(x_BTHK.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate) * up), gate and up in one matmul; arXiv 2002.05202."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.gate_up = Linear(cfg.d_model, 2 * cfg.d_ff, bias=cfg.bias)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=cfg.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTF) * up_BTF)


class GeluMLP(nn.Module):
    """down(gelu(up)), with GPT-2's tanh form of the GELU."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.up = Linear(cfg.d_model, cfg.d_ff, bias=cfg.bias)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=cfg.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate="tanh"))


MLP = {"swiglu": SwiGLU, "gelu": GeluMLP}
