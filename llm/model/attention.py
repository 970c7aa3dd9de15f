"""Causal self-attention with grouped kv heads. Heads lie before tokens where attention is computed, as sdpa wants them."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.layers import Linear, RMSNorm, rotate


def sdpa_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None) -> Tensor:
    """torch's fused kernels. The T queries are the last T of the S positions; each sees `window` of them at most, itself included."""
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    all_seen = window is None or window >= S
    # is_causal lines up with the first key, not the last
    mask_TS = None if all_seen and T in (1, S) else causal_mask(T, S, q_BHTK.device, window)
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, mask_TS, is_causal=mask_TS is None and T == S, enable_gqa=grouped)


def eager_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None) -> Tensor:
    """The same by definition, with softmax in fp32: the reference that the others are tested against.

    On a CPU in bf16 it beats the fused kernels up to some 512 tokens a row (torch 2.13, AVX512); its scores are rounded to bf16.
    """
    H, T, K = q_BHTK.shape[1:]
    G, S = k_BGSK.shape[1:3]
    k_BHSK, v_BHSK = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSK, v_BGSK))
    scores_BHTS = (q_BHTK * K**-0.5) @ k_BHSK.transpose(2, 3)
    scores_BHTS = scores_BHTS.masked_fill(~causal_mask(T, S, q_BHTK.device, window), float("-inf"))
    return scores_BHTS.softmax(dim=-1, dtype=torch.float32).to(v_BHSK.dtype) @ v_BHSK


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """True where query t, at position S - T + t, may look."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen if window is None else seen.triu(S - T - window + 1)


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention}


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads = [cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads]
        self.d_head = cfg.d_head
        self.attend, self.window = ATTENTION[cfg.attention], cfg.sliding_window
        self.qkv = Linear(cfg.d_model, sum(self.heads) * cfg.d_head, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.out = Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=cfg.bias)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, remember: Callable | None) -> Tensor:
        """rope: tables for these T positions. remember: appends k and v to a cache and gives back all that it holds."""
        B, T = x_BTD.shape[:2]
        q_BTHK, k_BTGK, v_BTGK = self.qkv(x_BTD).view(B, T, -1, self.d_head).split(self.heads, dim=2)
        q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *rope), rotate(k_BTGK, *rope)
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if remember is not None:
            k_BGSK, v_BGSK = remember(k_BGSK, v_BGSK)
        y_BHTK = self.attend(q_BHTK, k_BGSK, v_BGSK, self.window)
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1))
