"""Causal self-attention with grouped kv heads. Heads lie before tokens where attention is computed, as sdpa wants them."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.chunks import EAGER_QUERIES
from llm.model.layers import Linear, RMSNorm, rotate


def sdpa_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None, mask_B1TS: Tensor | None = None) -> Tensor:
    """torch's fused kernels. The T queries are the last T of the S positions; each sees `window` of them at most, itself included.

    `mask_B1TS`: where they may look, if that is not all up to themselves.
    """
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    all_seen = mask_B1TS is None and (window is None or window >= S)
    # is_causal lines up with the first key, not the last
    mask = None if all_seen and T in (1, S) else _seen(T, S, q_BHTK.device, window, mask_B1TS)
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, mask, is_causal=mask is None and T == S, enable_gqa=grouped)


def eager_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None, mask_B1TS: Tensor | None = None) -> Tensor:
    """The same by definition, with softmax in fp32: the reference that the others are tested against.

    On a CPU in bf16 it beats the fused kernels up to some 512 tokens a row (torch 2.13, AVX512); its scores are rounded to bf16.
    """
    H, T, K = q_BHTK.shape[1:]
    G, S = k_BGSK.shape[1:3]
    k_BHSK, v_BHSK = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSK, v_BGSK))
    seen, parts = _seen(T, S, q_BHTK.device, window, mask_B1TS), []
    for start in range(0, T, EAGER_QUERIES):  # a part's queries look at no key behind their own end, so a third of the work falls away
        stop = min(start + EAGER_QUERIES, T)
        keys = S - T + stop
        scores = (q_BHTK[:, :, start:stop] * K**-0.5) @ k_BHSK[:, :, :keys].transpose(2, 3)
        scores = scores.masked_fill(~seen[..., start:stop, :keys], float("-inf"))
        parts.append(scores.softmax(dim=-1, dtype=torch.float32).to(v_BHSK.dtype) @ v_BHSK[:, :, :keys])
    return torch.cat(parts, dim=2)


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """True where query t, at position S - T + t, may look."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen if window is None else seen.triu(S - T - window + 1)


def _seen(T: int, S: int, device: torch.device, window: int | None, mask: Tensor | None) -> Tensor:
    """`mask`, which looks at nothing later already, within the window; without one all up to each query."""
    if mask is None:
        return causal_mask(T, S, device, window)
    return mask if window is None else mask & causal_mask(T, S, device, window)


def document_mask(doc_ids_BT: Tensor) -> Tensor:
    """[B, 1, T, T], True where query and key are of one document and the key is not later."""
    is_same_BTT = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
    T = doc_ids_BT.shape[1]
    return (is_same_BTT & causal_mask(T, T, doc_ids_BT.device))[:, None]


def positions_in_documents(doc_ids_BT: Tensor) -> Tensor:
    """int64[B, T]: each token's place in its document, from 0 where the document, or the row, begins."""
    place_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    is_first_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return place_T - torch.where(is_first_BT, place_T, 0).cummax(dim=1).values


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

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, remember: Callable | None, mask_B1TT: Tensor | None = None) -> Tensor:
        """rope: tables for these T positions. remember: appends k and v to a cache and gives back all that it holds. mask: of documents."""
        B, T = x_BTD.shape[:2]
        q_BTHK, k_BTGK, v_BTGK = self.qkv(x_BTD).view(B, T, -1, self.d_head).split(self.heads, dim=2)
        q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *rope), rotate(k_BTGK, *rope)
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if remember is not None:
            k_BGSK, v_BGSK = remember(k_BGSK, v_BGSK)
        y_BHTK = self.attend(q_BHTK.to(k_BGSK.dtype), k_BGSK, v_BGSK, self.window, mask_B1TT)  # a cache may be more exact
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1).to(q_BHTK.dtype))
